"""The best one or two waiting samples that complete a pack: exact on every axis, early out when good enough.

    room left: 1,204 tokens, 18 tiles          sum of classes 18: 0 + 18, 1 + 17, 5 + 13, 8 + 10
                                               each sample of the smaller class with the largest key of the
    a sample of 473 tokens, 5 tiles   --->     other that still fits: 731 tokens at 13 tiles, nothing left

Sums are tried from the fullest down, until even a pack without any other waste could not beat the best one
found; within a sum the most unequal pair of classes comes first, so that large samples leave while there are
small ones to go with them. O(class pairs + scans x class size); `max_scans` bounds it.

Tried and lost: a two-pointer walk over sorted rows, which finds the same pairs at two thirds of the speed.

Shapes: W slots, C classes, A axes; F fields of a slot, M fields of a class, K rows of prices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from vlmpack.kernels.compiled import kernel
from vlmpack.kernels.window import (
    BLUR,
    COARSE,
    COST,
    FINE,
    HIDDEN,
    LEAST,
    MEMBER,
    SHIFT,
    SIZE,
    SLOT_BITS,
    SLOT_MASK,
    UNIT,
    largest_key,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

GOOD_ENOUGH: Final = 0.0004
"""Weighted waste, as a share of a pack, at which the search ends: 1.6 of 4,096 tokens."""

DOES_NOT_FIT: Final = 1e9

WEIGHT, TARGET, SHARE, INVERSE = range(4)
"""Rows of `price_KA`: the price of a unit of waste (on limited axes, times the budgets they sum to 1); the
load that a pack should have on a balanced axis; waiting samples per unit of cost; one over the budget."""


class Scratch(NamedTuple):
    """What the search writes to; made once by `make_scratch`, handed to kernels array by array."""

    room: Int64s
    """int64 [A]: what the pack being filled has left; on balanced axes, what it has to the target."""
    price: Floats
    """float64 [4, A]: `WEIGHT` to `INVERSE`."""
    trial: Int64s
    """int64 [W]: the slots of the current try."""
    pack: Int64s
    """int64 [W]: the slots of the best try."""


def make_scratch(lookahead: int, budget_A: Int64s) -> Scratch:
    """Return scratch space for a window. O(lookahead).

    Args:
        lookahead: Slots of the window.
        budget_A: int64 [A]; anything on balanced axes.
    """
    num_axes = budget_A.shape[0]
    price_KA = np.zeros((4, num_axes), np.float64)
    price_KA[INVERSE] = 1.0 / np.maximum(budget_A, 1)
    return Scratch(
        room=np.zeros(num_axes, np.int64),
        price=price_KA,
        trial=np.zeros(lookahead, np.int64),
        pack=np.zeros(lookahead, np.int64),
    )


@kernel
def fits(slot_WF: Int64s, room_A: Int64s, num_hard: int, slot: int) -> bool:
    """Return whether a sample is within the room on every limited axis. O(axes)."""
    within = True
    for axis in range(num_hard):
        within &= slot_WF[slot, COST + axis] <= room_A[axis]
    return within


@kernel
def waste_with(slot_WF: Int64s, room_A: Int64s, price_KA: Floats, num_hard: int, one: int, two: int) -> float:
    """Return the weighted waste of the pack with slots `one` and `two`, where they are not -1. O(axes).

    What a limited axis has left is waste, and so is any distance from a balanced axis' target.
    """
    waste = 0.0
    for axis in range(room_A.shape[0]):
        left = room_A[axis]
        if one >= 0:
            left -= slot_WF[one, COST + axis]
        if two >= 0:
            left -= slot_WF[two, COST + axis]
        if left < 0 and axis < num_hard:
            return DOES_NOT_FIT
        waste += price_KA[WEIGHT, axis] * abs(left)
    return waste


@kernel
def complete(
    slot_WF: Int64s,
    class_CM: Int64s,
    meta: Int64s,
    room_A: Int64s,
    price_KA: Floats,
    num_hard: int,
    best: float,
    max_scans: int,
) -> tuple[float, int, int]:
    """Find the one or two samples that leave least weighted waste in `room_A`.

    Args:
        slot_WF: See `Window`.
        class_CM: See `Window`; samples that are in the pack are hidden.
        meta: See `Window`.
        room_A: See `Scratch`.
        price_KA: See `Scratch`.
        num_hard: Axes with a budget.
        best: Only a waste below this is of interest.
        max_scans: Classes that may be scanned for a second sample.

    Returns:
        The waste found or `best`; the first and second slot, -1 where there is none.
    """
    fine, coarse, unit = meta[FINE], meta[COARSE], meta[UNIT]
    room_fine = room_A[fine] >> meta[SHIFT]
    fine_price = price_KA[WEIGHT, fine] * (1 << meta[SHIFT])
    one, two = -1, -1
    for total in range(room_A[coarse] // unit, -1, -1):
        least_waste = price_KA[WEIGHT, coarse] * max(0, room_A[coarse] - total * unit - meta[BLUR])
        if least_waste >= best:
            break
        if coarse == fine:
            least_waste = 0.0  # the gap that the keys leave is all the waste there is
        key = largest_key(class_CM, total, (room_fine << SLOT_BITS) | SLOT_MASK)
        if key >= 0 and least_waste + fine_price * (room_fine - (key >> SLOT_BITS)) < best:
            waste = waste_with(slot_WF, room_A, price_KA, num_hard, key & SLOT_MASK, -1)
            if waste < best:
                best, one, two = waste, key & SLOT_MASK, -1
        if best <= GOOD_ENOUGH:
            break
        for low in range(total // 2 + 1):
            high = total - low
            least_low, least_high = class_CM[low, LEAST] >> SLOT_BITS, class_CM[high, LEAST] >> SLOT_BITS
            if least_low + least_high > room_fine:
                continue  # too much, or one of the classes is empty
            few, many, least_many = low, high, least_high
            if class_CM[low, SIZE] > class_CM[high, SIZE]:
                few, many, least_many = high, low, least_low
            for index in range(MEMBER, MEMBER + class_CM[few, SIZE]):
                first = class_CM[few, index]
                room_second = room_fine - (first >> SLOT_BITS)
                if room_second < least_many:
                    continue
                max_scans -= 1
                if few == many:
                    class_CM[few, index] = HIDDEN  # not with itself
                second = largest_key(class_CM, many, (room_second << SLOT_BITS) | SLOT_MASK)
                if few == many:
                    class_CM[few, index] = first
                if second >= 0 and least_waste + fine_price * (room_second - (second >> SLOT_BITS)) < best:
                    slots = first & SLOT_MASK, second & SLOT_MASK
                    waste = waste_with(slot_WF, room_A, price_KA, num_hard, slots[0], slots[1])
                    if waste < best:
                        best, one, two = waste, slots[0], slots[1]
                if best <= GOOD_ENOUGH or max_scans <= 0:
                    break
            if best <= GOOD_ENOUGH or max_scans <= 0:
                break
        if best <= GOOD_ENOUGH or max_scans <= 0:
            break
    return best, one, two
