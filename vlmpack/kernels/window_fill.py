"""Fill packs from a look-ahead window, oldest sample first: O(n), within 1 % of the bound on several axes.

Each pack starts with the sample that waits longest, so none waits for more packs than the window has slots.
Random picks that keep the rest of the pack in proportion follow until about two samples are missing, then an
exact search closes it; of a few such tries the one with the least waste wins. Waste is priced by how scarce
its axis is in the window, to a high power: what stays behind decides how well the next packs close, and a
sharp price keeps it mixed. The trade-off: best-fit decreasing is ten times faster where one axis binds.

Sources: filling one bin at a time by how well an item matches what is left: R. Panigrahy et al., "Heuristics
for vector bin packing" (Microsoft Research 2011), sections 2.2 and 3. Prices from what is still to be packed:
V. Gupta and A. Radovanovic, "Interior-point-based online stochastic bin packing" (Oper. Res. 68, 2020).

Shapes: W slots, A axes, N or M samples, P packs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vlmpack.kernels.compiled import kernel
from vlmpack.kernels.completion import GOOD_ENOUGH, INVERSE, SHARE, TARGET, WEIGHT, complete, fits, waste_with
from vlmpack.kernels.window import (
    ARRIVAL,
    BORN,
    COARSE,
    COST,
    COUNT,
    FINE,
    LONGEST_DELAY,
    LONGEST_WAIT,
    OLDEST,
    ORDER,
    PACKS,
    TOTAL,
    hide,
    insert,
    is_hidden,
    remove,
    show,
)
from vlmpack.kernels.window_axes import REFRESH, refresh_axes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Int32s = npt.NDArray[np.int32]
    Int64s = npt.NDArray[np.int64]

MISSING: Final = 2.0
"""Random picks end when about this many average samples are missing: what the exact search can close."""
PICKS: Final = 4
"""Candidates for a random pick."""
FIRST_PICKS: Final = 16
"""Candidates for the first pick where one axis binds: the largest counts, and few packs have place for it."""
MAX_SCANS: Final = 64
"""Bound of the exact search in one try; 200 give the same packs 10 % slower."""
LARGE_FIRST: Final = 0.05
"""How much size counts against proportion in a random pick."""
BALANCE: Final = 0.05
"""Price of a balanced axis that is off its target by all of it; 1 is a pack that is empty on limited axes."""


@kernel
def fill_pack(
    slot_WF: Int64s,
    class_CM: Int64s,
    meta: Int64s,
    budget_A: Int64s,
    num_hard: int,
    room_A: Int64s,
    price_KA: Floats,
    trial_W: Int64s,
    pack_W: Int64s,
    seed: int,
    tries: int,
) -> int:
    """Take the next pack out of the window; return how many samples it has. O(tries x search).

    Args:
        slot_WF: See `Window`.
        class_CM: See `Window`.
        meta: See `Window`; at least one sample waits.
        budget_A: int64 [A].
        num_hard: Axes with a budget; those behind them are balanced, not limited.
        room_A: See `Scratch`.
        price_KA: See `Scratch`.
        trial_W: See `Scratch`.
        pack_W: See `Scratch`; receives the pack's arrival indices, the oldest sample first.
        seed: Decides the random picks, together with the number of packs so far.
        tries: Packs to try; the best is taken.
    """
    if meta[PACKS] % REFRESH == 0:
        refresh_axes(slot_WF, class_CM, meta, budget_A, num_hard)
    _set_prices(meta, num_hard, price_KA)
    oldest = meta[OLDEST]
    hide(slot_WF, class_CM, oldest)
    size, best, natural = 0, 2.0 + 1e6 * BALANCE, 0
    state = _first_random(seed, meta[PACKS])
    for turn in range(tries):
        for axis in range(room_A.shape[0]):
            limit = budget_A[axis] if axis < num_hard else int(price_KA[TARGET, axis])
            room_A[axis] = limit - slot_WF[oldest, COST + axis]
        # Packs that close with two samples have few variants: every other try picks one sample more.
        at_least = natural + (turn % 2 if natural > 0 else min(turn, 1))
        num_picked, state = _pick(
            slot_WF, class_CM, meta, num_hard, room_A, price_KA, trial_W, at_least, state
        )
        if turn == 0:
            natural = num_picked
        bare = waste_with(slot_WF, room_A, price_KA, num_hard, -1, -1)
        closed, one, two = complete(
            slot_WF, class_CM, meta, room_A, price_KA, num_hard, min(best, bare), MAX_SCANS
        )
        if closed < best or size == 0:
            best = closed
            size = _take_try(trial_W, pack_W, num_picked, one, two)
        for index in range(num_picked):
            show(slot_WF, class_CM, trial_W[index])
        if best <= GOOD_ENOUGH:
            break
    show(slot_WF, class_CM, oldest)
    pack_W[0] = oldest
    _emit(slot_WF, class_CM, meta, pack_W, size)
    return size


@kernel
def window_fill(
    slot_WF: Int64s,
    class_CM: Int64s,
    meta: Int64s,
    budget_A: Int64s,
    num_hard: int,
    room_A: Int64s,
    price_KA: Floats,
    trial_W: Int64s,
    pack_W: Int64s,
    seed: int,
    tries: int,
    cost_NA: Int64s,
    order_N: Int64s | Int32s,
    next_SA: Int64s,
    pack_N: Int64s,
) -> int:
    """Pack a whole data set as a stream would be packed; return the number of packs. O(N).

    Args:
        slot_WF: See `fill_pack`, for all of the window and scratch arrays.
        class_CM: See `fill_pack`.
        meta: See `fill_pack`; no sample waits.
        budget_A: See `fill_pack`.
        num_hard: See `fill_pack`.
        room_A: See `fill_pack`.
        price_KA: See `fill_pack`.
        trial_W: See `fill_pack`.
        pack_W: See `fill_pack`.
        seed: See `fill_pack`.
        tries: See `fill_pack`.
        cost_NA: int64 [N, A], every row within the budget.
        order_N: integers [N], the order in which samples enter the window.
        next_SA: int64 [S, A], working space. Rows of the next samples are fetched S at a time: one by one,
            each would wait for memory where the order is random.
        pack_N: int64 [N], the output: packs in the order in which they close.
    """
    entered, stage = 0, next_SA.shape[0]
    while True:
        while entered < order_N.shape[0] and meta[COUNT] < slot_WF.shape[0]:
            if entered % stage == 0:
                for ahead in range(min(stage, order_N.shape[0] - entered)):
                    for axis in range(next_SA.shape[1]):
                        next_SA[ahead, axis] = cost_NA[order_N[entered + ahead], axis]
            insert(slot_WF, class_CM, meta, next_SA, entered % stage, order_N[entered])
            entered += 1
        if meta[COUNT] == 0:
            return int(meta[PACKS])
        size = fill_pack(
            slot_WF, class_CM, meta, budget_A, num_hard, room_A, price_KA, trial_W, pack_W, seed, tries
        )
        for index in range(size):
            pack_N[pack_W[index]] = meta[PACKS] - 1


@kernel
def window_feed(
    slot_WF: Int64s,
    class_CM: Int64s,
    meta: Int64s,
    budget_A: Int64s,
    num_hard: int,
    room_A: Int64s,
    price_KA: Floats,
    trial_W: Int64s,
    pack_W: Int64s,
    seed: int,
    tries: int,
    cost_MA: Int64s,
    first_arrival: int,
    max_waiting: int,
    max_load: int,
    member_M: Int64s,
    end_P: Int64s,
) -> int:
    """Push samples into a window and take out the packs that are due; return how many packs. O(M).

    Args:
        slot_WF: See `fill_pack`, for all of the window and scratch arrays.
        class_CM: See `fill_pack`.
        meta: See `fill_pack`.
        budget_A: See `fill_pack`.
        num_hard: See `fill_pack`.
        room_A: See `fill_pack`.
        price_KA: See `fill_pack`.
        trial_W: See `fill_pack`.
        pack_W: See `fill_pack`.
        seed: See `fill_pack`.
        tries: See `fill_pack`.
        cost_MA: int64 [M, A], the samples to push, every row within the budget.
        first_arrival: Arrival index of the first of them; the others follow.
        max_waiting: After each sample, packs are taken out until fewer than this many wait; with 1 all.
        max_load: And until those that wait use less than this of axis 0.
        member_M: int64 [waiting + M], the output: arrival indices pack by pack.
        end_P: int64 [waiting + M], the output: where each pack ends in `member_M`.
    """
    num_packs, num_members = 0, 0
    for pushed in range(cost_MA.shape[0] + 1):  # once more without a sample: what was due already
        if pushed > 0:
            insert(slot_WF, class_CM, meta, cost_MA, pushed - 1, first_arrival + pushed - 1)
        while meta[COUNT] > 0 and (meta[COUNT] >= max_waiting or meta[TOTAL] >= max_load):
            size = fill_pack(
                slot_WF, class_CM, meta, budget_A, num_hard, room_A, price_KA, trial_W, pack_W, seed, tries
            )
            delay = first_arrival + pushed - 1 - pack_W[0]
            meta[LONGEST_DELAY] = max(meta[LONGEST_DELAY], delay)
            for index in range(size):
                member_M[num_members + index] = pack_W[index]
            num_members += size
            end_P[num_packs] = num_members
            num_packs += 1
    return num_packs


@kernel
def _next_random(state: int) -> int:
    """Return the next number of a xorshift sequence, 1 to 2^31 - 1; the same with and without JIT."""
    state ^= (state << 13) & 0x7FFFFFFF
    state ^= state >> 17
    return state ^ ((state << 5) & 0x7FFFFFFF)


@kernel
def _first_random(seed: int, packs: int) -> int:
    state = ((seed & 0x7FFFFFFF) * 1103515245 + 12345) & 0x7FFFFFFF
    state = ((state ^ (packs & 0x7FFFFFFF)) * 1664525 + 1013904223) & 0x7FFFFFFF
    state = ((state ^ (state >> 15)) * 48271) & 0x7FFFFFFF
    return _next_random(state | 1)


@kernel
def _set_prices(meta: Int64s, num_hard: int, price_KA: Floats) -> None:
    """Price each limited axis by its need of packs to the sixteenth power; set targets of the others.

    The power was chosen among 2 to 64. Low powers keep wasting tokens for tiles, high ones swing.
    """
    num_axes, most, needed = price_KA.shape[1], 0.0, 0.0
    for axis in range(num_hard):
        most = max(most, meta[TOTAL + axis] * price_KA[INVERSE, axis])
        needed = max(needed, meta[TOTAL + num_axes + axis] * price_KA[INVERSE, axis])
    total, scale = 0.0, 1.0 / most
    for axis in range(num_hard):
        scarcity = meta[TOTAL + axis] * price_KA[INVERSE, axis] * scale
        for _ in range(4):
            scarcity *= scarcity
        price_KA[WEIGHT, axis] = scarcity * price_KA[INVERSE, axis]
        total += scarcity
    scale = 1.0 / total
    for axis in range(num_hard):
        price_KA[WEIGHT, axis] *= scale
    for axis in range(num_hard, num_axes):
        price_KA[TARGET, axis] = meta[TOTAL + num_axes + axis] / needed
        price_KA[WEIGHT, axis] = BALANCE / max(price_KA[TARGET, axis], 1.0)
    for axis in (meta[FINE], meta[COARSE]):
        price_KA[SHARE, axis] = meta[COUNT] / max(meta[TOTAL + axis], 1)


@kernel
def _pick(
    slot_WF: Int64s,
    class_CM: Int64s,
    meta: Int64s,
    num_hard: int,
    room_A: Int64s,
    price_KA: Floats,
    trial_W: Int64s,
    at_least: int,
    state: int,
) -> tuple[int, int]:
    """Add random samples until about two are missing; of `PICKS` candidates the one that keeps proportion."""
    count, fine, coarse = meta[COUNT], meta[FINE], meta[COARSE]
    fine_share, coarse_share = price_KA[SHARE, fine], price_KA[SHARE, coarse]
    num_picked = 0
    while num_picked + 1 < count:
        missing = min(room_A[fine] * fine_share, room_A[coarse] * coarse_share)
        if num_picked >= at_least and missing <= MISSING:
            break
        chosen, least = -1, 1e18
        for _ in range(FIRST_PICKS if num_picked == 0 and fine == coarse else PICKS):
            state = _next_random(state)
            slot = slot_WF[(state * count) >> 31, ORDER]
            if not fits(slot_WF, room_A, num_hard, slot) or is_hidden(slot_WF, class_CM, slot):
                continue
            fine_cost = slot_WF[slot, COST + fine]
            fine_left = (room_A[fine] - fine_cost) * fine_share
            coarse_left = (room_A[coarse] - slot_WF[slot, COST + coarse]) * coarse_share
            skew = abs(fine_left - coarse_left) - LARGE_FIRST * (fine_cost * fine_share)
            if skew < least:
                chosen, least = slot, skew
        if chosen < 0:
            break
        hide(slot_WF, class_CM, chosen)
        trial_W[num_picked] = chosen
        num_picked += 1
        for axis in range(room_A.shape[0]):
            room_A[axis] -= slot_WF[chosen, COST + axis]
    return num_picked, state


@kernel
def _take_try(trial_W: Int64s, pack_W: Int64s, num_picked: int, one: int, two: int) -> int:
    """Copy a try behind the oldest sample; return the pack's size."""
    for index in range(num_picked):
        pack_W[1 + index] = trial_W[index]
    size = 1 + num_picked
    if one >= 0:
        pack_W[size] = one
        size += 1
    if two >= 0:
        pack_W[size] = two
        size += 1
    return size


@kernel
def _emit(slot_WF: Int64s, class_CM: Int64s, meta: Int64s, pack_W: Int64s, size: int) -> None:
    """Take the chosen samples out of the window and replace their slots by their arrival indices."""
    for index in range(size):
        slot = pack_W[index]
        meta[LONGEST_WAIT] = max(meta[LONGEST_WAIT], meta[PACKS] - slot_WF[slot, BORN])
        pack_W[index] = slot_WF[slot, ARRIVAL]
        remove(slot_WF, class_CM, meta, slot)
    meta[PACKS] += 1
