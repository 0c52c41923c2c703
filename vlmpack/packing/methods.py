"""The dispatch table of the packing algorithms, and what "auto" chooses.

| method | what it is | when |
|---|---|---|
| auto | best-fit decreasing where one axis binds alone, else balanced; streams: balanced | always, first |
| fast, balanced, best | the window packer with 1, 4 or 16 tries a pack | several axes bind; streams |
| best_fit_decreasing, first_fit_decreasing | the textbook's best | one axis binds; to compare |
| best_fit, first_fit, next_fit | samples in their own order | neighbours should stay together |
| worst_fit_decreasing | the reference pipeline's "balanced greedy knapsack" | drop-in |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import numpy as np

from vlmpack.errors import ConfigError
from vlmpack.kernels.best_fit import best_fit
from vlmpack.kernels.best_fit_decreasing_one_axis import (
    WORD,
    best_fit_decreasing_one_axis,
    place_loads,
    take_places,
)
from vlmpack.kernels.first_fit import first_fit
from vlmpack.kernels.next_fit import next_fit
from vlmpack.kernels.shares import num_entries
from vlmpack.kernels.totals import HIGH, LOW, SUM, pack_loads, relabel
from vlmpack.kernels.worst_fit_decreasing import worst_fit_decreasing
from vlmpack.packing.engine import EFFORTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmpack.packing.inputs import Int64s
    from vlmpack.packing.problem import Problem

Method: TypeAlias = Literal[
    "auto",
    "fast",
    "balanced",
    "best",
    "best_fit_decreasing",
    "first_fit_decreasing",
    "worst_fit_decreasing",
    "best_fit",
    "first_fit",
    "next_fit",
]

METHODS: Final[tuple[Method, ...]] = get_args(Method)
"""Names for the `method` argument."""

ALONE: Final = 0.5
"""An axis binds alone if no other needs more than this share of the packs that it needs."""

MAX_HISTOGRAM: Final = 1 << 26
"""Best fit by histogram is for limits up to this, and up to `MAX_LEVELS` for each sample."""
MAX_LEVELS: Final = 64


def check_method(method: str) -> None:
    """Refuse a name that is not in `METHODS`.

    Args:
        method: What the user wrote.

    Raises:
        ConfigError: If there is no such method.
    """
    if method not in METHODS:
        raise ConfigError(f"no packing method {method!r}; choose one of {', '.join(METHODS)}")


def choose(method: Method, problem: Problem) -> Method:
    """Return the algorithm that "auto" stands for with a whole data set; any other name stays.

    Args:
        method: One of `METHODS`.
        problem: The samples.
    """
    if method != "auto":
        return method
    return "best_fit_decreasing" if binding_axis(problem) is not None else "balanced"


def choose_for_stream(method: Method) -> Method:
    """Return the algorithm that "auto" stands for with a stream; any other name stays.

    Args:
        method: One of `METHODS`.
    """
    return "balanced" if method == "auto" else method


def binding_axis(problem: Problem) -> int | None:
    """Return the axis that binds alone and that the histogram kernel can pack by, or None.

    Args:
        problem: The samples.
    """
    binding = problem.binding_axes(ALONE)
    return binding[0] if len(binding) == 1 and _has_histogram(problem, binding[0]) else None


def _has_histogram(problem: Problem, axis: int) -> bool:
    limit = int(problem.budget[axis])
    small_enough = limit <= min(MAX_HISTOGRAM, MAX_LEVELS * (problem.costs.shape[0] + 1024))
    return small_enough and int(problem.totals[LOW, axis]) >= 1


def pack_at_once(
    problem: Problem, method: Method, *, delta: int = 0, rng: np.random.Generator | None = None
) -> tuple[Int64s, Int64s]:
    """Run one of the textbook algorithms over all samples.

    Args:
        problem: The samples, at least one.
        method: Any of `METHODS` but "auto" and those of `EFFORTS`.
        delta: Spare bins of worst-fit decreasing.
        rng: Numbers the bins at random; None: in the order in which the algorithm opened them.

    Returns:
        int64 [n], the bin of each sample, without gaps; int64 [bins, axes], what each bin holds.
    """
    assert method not in EFFORTS, "the window packer has its own driver"
    bin_N = np.empty(problem.costs.shape[0], np.int64)
    axis = binding_axis(problem) if method == "best_fit_decreasing" else None
    if axis is not None:
        # Packing only the bins that are over another budget once more was tried: 1.2 % above the bound
        # instead of 0.03 %.
        load_BA = _best_fit_by(problem, axis, rng, bin_N)
        if not _may_exceed_another(problem, axis) or not np.any(load_BA > problem.budget):
            return bin_N, load_BA
    if method == "worst_fit_decreasing":
        bin_N, num_bins = _worst_fit(problem, delta, bin_N)
    else:
        num_bins = _AT_ONCE[method](problem, bin_N)
    return bin_N, number_and_weigh(problem, rng, bin_N, num_bins)


def number_and_weigh(
    problem: Problem, rng: np.random.Generator | None, bin_N: Int64s, num_bins: int
) -> Int64s:
    """Renumber bins at random, in place, and return int64 [bins, axes], what each holds. O(n).

    Args:
        problem: The samples.
        rng: None leaves the numbers as they are.
        bin_N: int64 [n].
        num_bins: How many there are.
    """
    if rng is not None:
        relabel(bin_N, rng.permutation(num_bins))
    load_BA = np.zeros((num_bins, problem.budget.shape[0]), np.int64)
    pack_loads(problem.costs, bin_N, load_BA)
    return load_BA


def _worst_fit(problem: Problem, delta: int, bin_N: Int64s) -> tuple[Int64s, int]:
    cost_NA, budget_A = problem.costs, problem.budget
    order_N = np.argsort(-cost_NA[:, 0], kind="stable")
    num_open = -(-int(problem.totals[SUM, 0]) // int(budget_A[0])) + delta
    worst_fit_decreasing(cost_NA, order_N, budget_A, num_entries(budget_A.shape[0]), num_open, bin_N)
    used = np.bincount(bin_N) > 0
    return (np.cumsum(used) - 1)[bin_N], int(used.sum())


def _may_exceed_another(problem: Problem, axis: int) -> bool:
    most_in_a_bin = int(problem.budget[axis]) // int(problem.totals[LOW, axis])
    return any(
        other != axis and high * most_in_a_bin > limit
        for other, (high, limit) in enumerate(
            zip(problem.totals[HIGH].tolist(), problem.budget.tolist(), strict=True)
        )
    )


def _best_fit_by(problem: Problem, axis: int, rng: np.random.Generator | None, bin_N: Int64s) -> Int64s:
    """Pack by one axis into `bin_N` and return int64 [bins, axes], what each bin holds."""
    n, limit = problem.costs.shape[0], int(problem.budget[axis])
    words = limit // WORD + 1
    start_V, place_N = np.zeros(limit + 2, np.int64), np.empty(n, np.int32)
    num_bins = best_fit_decreasing_one_axis(
        problem.costs,
        axis,
        limit,
        start_V,
        np.zeros(words + words // WORD + 1, np.int64),
        np.empty(limit + 1, np.int32),
        np.empty(n, np.int32),
        place_N,
    )
    if rng is not None:
        relabel(place_N, rng.permutation(num_bins))
    load_BA = np.zeros((num_bins, problem.budget.shape[0]), np.int64)
    if load_BA.shape[1] == 1:
        place_loads(start_V, place_N, load_BA[:, 0])
    take_places(problem.costs, axis, start_V, place_N, bin_N)
    if load_BA.shape[1] > 1:
        pack_loads(problem.costs, bin_N, load_BA)
    return load_BA


def largest_first(problem: Problem) -> Int64s:
    """Return the samples by the sum of their shares of the budget, each axis weighted by its need of packs.

    This is the order "FFDSum" of R. Panigrahy et al. (2011), section 2.1.

    Args:
        problem: The samples.
    """
    size_N = np.zeros(problem.costs.shape[0], np.float64)
    for axis, need in enumerate(problem.needs()):
        size_N -= problem.costs[:, axis] * (need / max(int(problem.budget[axis]), 1))
    return np.argsort(size_N, kind="stable")


def _best_fit(problem: Problem, bin_N: Int64s, order_N: Int64s | None = None) -> int:
    return _any_fit(best_fit, problem, bin_N, order_N)


def _best_fit_decreasing(problem: Problem, bin_N: Int64s) -> int:
    return _best_fit(problem, bin_N, largest_first(problem))


def _first_fit(problem: Problem, bin_N: Int64s, order_N: Int64s | None = None) -> int:
    return _any_fit(first_fit, problem, bin_N, order_N)


def _any_fit(
    kernel: Callable[[Int64s, Int64s, Int64s, int, Int64s], int],
    problem: Problem,
    bin_N: Int64s,
    order_N: Int64s | None,
) -> int:
    if order_N is None:
        order_N = np.arange(bin_N.shape[0])
    return kernel(problem.costs, order_N, problem.budget, num_entries(problem.budget.shape[0]), bin_N)


def _first_fit_decreasing(problem: Problem, bin_N: Int64s) -> int:
    return _first_fit(problem, bin_N, largest_first(problem))


def _next_fit(problem: Problem, bin_N: Int64s) -> int:
    order_N = np.arange(bin_N.shape[0])
    return next_fit(problem.costs, order_N, problem.budget, np.zeros_like(problem.budget), bin_N)


_AT_ONCE: Final[dict[str, Callable[[Problem, Int64s], int]]] = {
    "best_fit_decreasing": _best_fit_decreasing,
    "first_fit_decreasing": _first_fit_decreasing,
    "best_fit": _best_fit,
    "first_fit": _first_fit,
    "next_fit": _next_fit,
}
