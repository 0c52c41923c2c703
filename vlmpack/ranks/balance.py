"""Balance: packs into steps whose ranks have alike loads of ViT patches and of attention.

    a window of packs -> halves by whichever load varies more, again and again, down to a step (a k-d tree)
                      -> pairs of neighbouring steps are split anew (`kernels.balance_splits`)
                      -> packs are swapped between them while that helps (`kernels.balance_swaps`)
                      -> steps in random order, and in each step the ranks

With one pack a rank, a step's packs must be alike: grouping. With several, their sums must be: the swaps do
that alone, and get closer. The trade-off: packs of a kind meet in one step. The next step is of another.

Every number that decides is an integer, or the result of single roundings: all ranks, whatever their
processors, arrive at one order. They do not talk about it.

Source: J. L. Bentley, "Multidimensional binary search trees used for associative searching", Communications
of the ACM 18 (1975), section 3: median cuts. Which load is cut is by variance.

Shapes: N packs, K loads.
"""

from __future__ import annotations

from fractions import Fraction
from math import fsum
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from vlmpack.kernels import split_pairs, swap_to_balance

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.packing.inputs import Int64s

Balance: TypeAlias = Literal["patches", "attention", "both"]
"""Which load the ranks of a step should share evenly."""

COLUMNS: Final[dict[Balance, list[int]]] = {"patches": [0], "attention": [1], "both": [0, 1]}
"""Columns of a table of loads: ViT patches, attention."""

_REACH: Final = 16
"""Steps to either side in which a partner may lie."""
_MAX_SWEEPS: Final = 32
"""More than the seeded workloads take, which is up to 23."""
_DIRECTIONS: Final = ((1, 0), (2, 1), (1, 1), (1, 2), (0, 1), (-1, 2), (-1, 1), (-2, 1))
"""Along which two steps are split, for two loads: all around, about 22 degrees apart."""
_UNIT: Final = 1 << 12
"""A load equal to the window's mean, where loads are compared with each other."""


def balanced_steps(load_NK: Int64s, num_ranks: int, batch_size: int, rng: np.random.Generator) -> Int64s:
    """Return the packs of a window in an order whose steps have alike ranks. O(N log^2 N + N x reach).

    Step s is the next `num_ranks * batch_size` packs, and rank r of it has each `num_ranks`-th from r on. The
    result's sum of max / mean over steps is never above that of the order given.

    Args:
        load_NK: int64 [N, K], what each pack loads, at least 0; N divides by the ranks. Where it does not
            divide by a step, the last step has fewer packs and stays last.
        num_ranks: Ranks.
        batch_size: Packs a rank and step.
        rng: Decides the order of steps, and which rank gets which of a step's shares.

    Returns:
        int64 [N], a permutation.
    """
    load_NK = np.ascontiguousarray(load_NK)
    num_packs, num_loads = load_NK.shape
    assert num_packs % num_ranks == 0, f"{num_packs} packs are not even over {num_ranks} ranks"
    size = num_ranks * batch_size
    num_steps = -(-num_packs // size)
    given = np.arange(num_packs, dtype=np.int64)
    slots = alike(load_NK, size)
    if batch_size == 1:
        directions = np.array(_DIRECTIONS if num_loads == 2 else [(1,)], np.int64)
        split_pairs(load_NK, _shares(load_NK), slots, num_ranks, directions, _REACH, _MAX_SWEEPS)
    objective = np.empty(num_steps)
    swap_to_balance(
        load_NK,
        slots,
        num_ranks,
        batch_size,
        _REACH * size,
        _MAX_SWEEPS,
        np.zeros((num_steps * num_ranks, num_loads), np.int64),
        np.zeros((num_steps, num_loads), np.int64),
        np.empty((num_steps, num_loads, 2), np.int64),
        objective,
    )
    if objective_of(load_NK, num_ranks, batch_size) <= fsum(objective):
        slots = given
    return _shuffled(slots, num_ranks, batch_size, rng)


def max_over_mean(load_NK: Int64s, num_ranks: int, batch_size: int) -> npt.NDArray[np.float64]:
    """Return how much more the busiest rank of each step has than the mean. O(N K).

    Args:
        load_NK: int64 [N, K] in the order of `balanced_steps`.
        num_ranks: Ranks.
        batch_size: Packs a rank and step.

    Returns:
        float64 [S, K], at least 1; 1 where no rank has any.
    """
    largest_SK, total_SK = step_loads(load_NK, num_ranks, batch_size)
    return np.where(total_SK > 0, largest_SK * num_ranks / np.maximum(total_SK, 1), 1.0)


def step_loads(load_NK: Int64s, num_ranks: int, batch_size: int) -> tuple[Int64s, Int64s]:
    """Return the largest load of a rank and the load of all ranks, both int64 [S, K]. O(N K).

    Args:
        load_NK: int64 [N, K] in the order of `balanced_steps`.
        num_ranks: Ranks.
        batch_size: Packs a rank and step.
    """
    num_packs, num_loads = load_NK.shape
    num_steps = -(-num_packs // (num_ranks * batch_size))
    padded = np.zeros((num_steps * batch_size * num_ranks, num_loads), np.int64)
    padded[:num_packs] = load_NK
    rank_SRK = padded.reshape(num_steps, batch_size, num_ranks, num_loads).sum(axis=1)
    return rank_SRK.max(axis=1), rank_SRK.sum(axis=1)


def objective_of(load_NK: Int64s, num_ranks: int, batch_size: int) -> float:
    """Return the sum of max / mean over steps and loads, rounded once, so that no machine adds otherwise."""
    return fsum(max_over_mean(load_NK, num_ranks, batch_size).flat)


def _shuffled(slots: Int64s, num_ranks: int, batch_size: int, rng: np.random.Generator) -> Int64s:
    """Shuffle the whole steps, and in each step the ranks' shares; a shorter last step stays last."""
    size = num_ranks * batch_size
    num_whole = len(slots) // size
    steps_SBR = slots[: num_whole * size].reshape(num_whole, batch_size, num_ranks)
    steps_SBR = steps_SBR[rng.permutation(num_whole)]
    ranks_SR = rng.permuted(np.tile(np.arange(num_ranks), (num_whole, 1)), axis=1)
    steps_SBR = np.take_along_axis(steps_SBR, ranks_SR[:, None, :], axis=2)
    rest_BR = slots[num_whole * size :].reshape(-1, num_ranks)[:, rng.permutation(num_ranks)]
    return np.concatenate([steps_SBR.reshape(-1), rest_BR.reshape(-1)])


def alike(load_NK: Int64s, size: int) -> Int64s:
    """Return packs such that each `size` neighbours are alike in all loads. O(N log^2 N).

    Args:
        load_NK: int64 [N, K], at least 0.
        size: Packs of a group; the last group may be smaller.

    Returns:
        int64 [N], a permutation.
    """
    share_NK = _shares(load_NK)
    parts, done = [np.arange(len(load_NK), dtype=np.int64)], []
    while parts:
        part = parts.pop()
        if len(part) <= size:
            done.append(part)
            continue
        half = -(-len(part) // size) // 2 * size
        inside = share_NK[part]
        cut = max(range(inside.shape[1]), key=lambda load: _spread(inside[:, load]))
        part = part[np.argsort(inside[:, cut], kind="stable")]
        parts += [part[half:], part[:half]]
    return np.concatenate(done) if done else np.empty(0, np.int64)


def _shares(load_NK: Int64s) -> Int64s:
    """Return the loads in parts of `_UNIT` of their mean, rounded down."""
    total_K = np.maximum(load_NK.sum(axis=0), 1)
    shares: Int64s = np.floor(load_NK / total_K * (len(load_NK) * _UNIT)).astype(np.int64)
    return shares


def _spread(values: Int64s) -> Fraction:
    """Return a measure that orders arrays of one length by their standard deviation over their mean."""
    total = int(values.sum())
    return Fraction(int(np.square(values).sum()), total * total) if total else Fraction(0)
