"""Swapping packs between the ranks of steps until no swap makes their loads more alike.

All ranks wait for the one with most to do, so a step costs max / mean of what it could, for the vision
encoder (ViT patches) and for the language model (attention) each. The objective is the sum of max / mean over
steps and loads. Two packs are swapped where that lowers it most: within a step, or between steps.

              rank 0   rank 1   max / mean              rank 0   rank 1   max / mean
    step 0      9        4         1.38                   5        4         1.11
    step 1      8        5         1.23                   8        9         1.06

Only packs of a rank that is the largest of its step on some load are moved away: another one can win little.
Their partners lie within `reach` slots: the order that it starts from has alike packs side by side, and on
the seeded workloads 16 steps to either side gave what all steps gave, four times as fast.

The sums are integers and each quotient is one division, so every machine decides alike.

Source: the swaps are the exchange neighbourhood of local search for multi-way number partitioning; two loads
at once and steps that differ are this library's.

Shapes: N packs and as many slots, K loads, C cells (a rank of a step), S steps, 2 largest cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vlmpack.kernels.compiled import kernel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

LEAST_GAIN: Final = 1e-9
"""A swap must gain as much, and a later candidate must be better by as much: rounding decides nothing."""


@kernel
def cell_of(slot: int, num_ranks: int, batch_size: int) -> int:
    """Return the cell of a slot: slots go step by step, in a step pack by pack, and there rank by rank."""
    return slot // (num_ranks * batch_size) * num_ranks + slot % num_ranks


@kernel
def rank_cells(sum_CK: Int64s, step: int, num_ranks: int, top_SK2: Int64s) -> None:
    """Write a step's two cells with most of each load, the first of equals first; -1 where there is none."""
    for load in range(sum_CK.shape[1]):
        first, second = -1, -1
        for cell in range(step * num_ranks, (step + 1) * num_ranks):
            if first < 0 or sum_CK[cell, load] > sum_CK[first, load]:
                first, second = cell, first
            elif second < 0 or sum_CK[cell, load] > sum_CK[second, load]:
                second = cell
        top_SK2[step, load, 0] = first
        top_SK2[step, load, 1] = second


@kernel
def max_over_mean(largest: int, total: int, num_ranks: int) -> float:
    """Return the largest load of a rank over the mean, 1 where no rank has any."""
    return largest * num_ranks / total if total > 0 else 1.0


@kernel
def largest_other(sum_CK: Int64s, top_SK2: Int64s, step: int, load: int, cell: int, other: int) -> int:
    """Return the largest load in a step, two cells left out; 0 where those are the two largest.

    Then the larger of the two stays the largest of all: their sum stays, so it has at least their mean.
    """
    for place in range(2):
        top = top_SK2[step, load, place]
        if top >= 0 and top != cell and top != other:
            return int(sum_CK[top, load])
    return 0


@kernel
def objective_after(
    load_NK: Int64s,
    sum_CK: Int64s,
    total_SK: Int64s,
    top_SK2: Int64s,
    num_ranks: int,
    pack: int,
    cell: int,
    partner: int,
    partner_cell: int,
) -> float:
    """Return the objective of the one or two steps concerned if the packs of two cells were swapped. O(K)."""
    step, partner_step = cell // num_ranks, partner_cell // num_ranks
    objective = 0.0
    for load in range(load_NK.shape[1]):
        more = load_NK[partner, load] - load_NK[pack, load]
        here = max(sum_CK[cell, load] + more, largest_other(sum_CK, top_SK2, step, load, cell, partner_cell))
        there = sum_CK[partner_cell, load] - more
        if step == partner_step:
            objective += max_over_mean(max(here, there), total_SK[step, load], num_ranks)
        else:
            there = max(there, largest_other(sum_CK, top_SK2, partner_step, load, partner_cell, cell))
            objective += max_over_mean(here, total_SK[step, load] + more, num_ranks)
            objective += max_over_mean(there, total_SK[partner_step, load] - more, num_ranks)
    return objective


@kernel
def objective_of(sum_CK: Int64s, total_SK: Int64s, top_SK2: Int64s, step: int, num_ranks: int) -> float:
    """Return a step's sum of max / mean over its loads."""
    objective = 0.0
    for load in range(sum_CK.shape[1]):
        largest = sum_CK[top_SK2[step, load, 0], load]
        objective += max_over_mean(largest, total_SK[step, load], num_ranks)
    return objective


@kernel
def is_largest(top_SK2: Int64s, step: int, cell: int) -> bool:
    """Return whether a cell has the most of some load in its step."""
    largest = False
    for load in range(top_SK2.shape[1]):
        largest |= top_SK2[step, load, 0] == cell
    return largest


@kernel
def swap_to_balance(
    load_NK: Int64s,
    slot_N: Int64s,
    num_ranks: int,
    batch_size: int,
    reach: int,
    max_sweeps: int,
    sum_CK: Int64s,
    total_SK: Int64s,
    top_SK2: Int64s,
    objective_S: Floats,
) -> int:
    """Swap packs until a sweep over all of them makes no swap; return the sweeps. O(sweeps x N x reach x K).

    Args:
        load_NK: int64 [N, K], what each pack loads, at least 0.
        slot_N: int64 [N], the pack in each slot; changed in place. N divides by the ranks; the last step may
            have fewer packs than the others.
        num_ranks: Ranks.
        batch_size: Packs a rank and step.
        reach: Slots to either side in which a pack's partner may lie.
        max_sweeps: At most so many.
        sum_CK: int64 [C, K], zeros; afterwards what each cell loads.
        total_SK: int64 [S, K], zeros; afterwards what each step loads.
        top_SK2: int64 [S, K, 2], scratch.
        objective_S: float64 [S], scratch; afterwards each step's objective.
    """
    num_slots, num_loads = load_NK.shape
    for slot in range(num_slots):
        cell = cell_of(slot, num_ranks, batch_size)
        for load in range(num_loads):
            sum_CK[cell, load] += load_NK[slot_N[slot], load]
            total_SK[cell // num_ranks, load] += load_NK[slot_N[slot], load]
    for step in range(objective_S.shape[0]):
        rank_cells(sum_CK, step, num_ranks, top_SK2)
        objective_S[step] = objective_of(sum_CK, total_SK, top_SK2, step, num_ranks)
    for sweep in range(max_sweeps):
        has_swapped = False
        for slot in range(num_slots):
            cell = cell_of(slot, num_ranks, batch_size)
            step = cell // num_ranks
            if not is_largest(top_SK2, step, cell):
                continue
            chosen, most = -1, 0.0
            for other in range(max(slot - reach, 0), min(slot + reach + 1, num_slots)):
                other_cell = cell_of(other, num_ranks, batch_size)
                if other_cell == cell:
                    continue
                gain = objective_S[step] - objective_after(
                    load_NK, sum_CK, total_SK, top_SK2, num_ranks,
                    slot_N[slot], cell, slot_N[other], other_cell,
                )  # fmt: skip
                if other_cell // num_ranks != step:
                    gain += objective_S[other_cell // num_ranks]
                if gain > most + LEAST_GAIN:
                    chosen, most = other, gain
            if chosen < 0:
                continue
            has_swapped = True
            other_cell = cell_of(chosen, num_ranks, batch_size)
            for load in range(num_loads):
                more = load_NK[slot_N[chosen], load] - load_NK[slot_N[slot], load]
                sum_CK[cell, load] += more
                sum_CK[other_cell, load] -= more
                total_SK[step, load] += more
                total_SK[other_cell // num_ranks, load] -= more
            pack = slot_N[slot]
            slot_N[slot] = slot_N[chosen]
            slot_N[chosen] = pack
            for changed in (step, other_cell // num_ranks):
                rank_cells(sum_CK, changed, num_ranks, top_SK2)
                objective_S[changed] = objective_of(sum_CK, total_SK, top_SK2, changed, num_ranks)
        if not has_swapped:
            return sweep + 1
    return max_sweeps
