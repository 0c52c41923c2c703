"""Which two axes of a window are indexed: the ones on which its samples need most packs. O(window).

Decided from the waiting samples alone, every `REFRESH` packs: the choice is the same after a restore, and a
stream may change its kind. Where one axis binds alone, it is both: its classes are equal slices of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vlmpack.kernels.compiled import kernel
from vlmpack.kernels.window import (
    BLUR,
    COARSE,
    COST,
    COUNT,
    FINE,
    HIDDEN,
    MAX_CLASSES,
    ORDER,
    SHIFT,
    SIZE,
    SLICES,
    SLOT_BITS,
    TOTAL,
    UNIT,
    enlist,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]

REFRESH: Final = 256
BINDING: Final = 0.5
"""A second axis is indexed when the waiting samples need at least this share of the packs of the first."""


@kernel
def refresh_axes(slot_WF: Int64s, class_CM: Int64s, meta: Int64s, budget_A: Int64s, num_hard: int) -> None:
    """Choose the indexed axes for the samples that wait now; index anew if they changed. O(W).

    Args:
        slot_WF: See `Window`.
        class_CM: See `Window`.
        meta: See `Window`; at least one sample waits.
        budget_A: int64 [A].
        num_hard: Axes with a budget; those behind them are balanced, not limited.
    """
    first, second = neediest_axes(meta, budget_A, num_hard)
    step_first, step_second = _step(slot_WF, meta, first), _step(slot_WF, meta, second)
    if budget_A[first] // step_first < budget_A[second] // step_second:  # the finer axis makes the keys
        first, second = second, first
        step_second = step_first
    unit, limit = step_second, budget_A[second]
    if first == second or limit // unit >= MAX_CLASSES:
        unit = max(limit // SLICES + 1, step_second)
    shift = 0
    while budget_A[first] >> shift >= 1 << (62 - SLOT_BITS):
        shift += 1
    changed = meta[FINE] != first or meta[COARSE] != second or meta[UNIT] != unit or meta[SHIFT] != shift
    meta[FINE], meta[COARSE], meta[UNIT], meta[SHIFT] = first, second, unit, shift
    meta[BLUR] = 2 * (unit - step_second)
    if not changed:
        return
    for group in range(class_CM.shape[0]):
        for index in range(class_CM.shape[1]):
            class_CM[group, index] = HIDDEN
        class_CM[group, SIZE] = 0
    for place in range(meta[COUNT]):
        enlist(slot_WF, class_CM, meta, slot_WF[place, ORDER])


@kernel
def neediest_axes(meta: Int64s, budget_A: Int64s, num_hard: int) -> tuple[int, int]:
    """Return the two axes that need most packs, the neediest first; it alone twice if no other binds."""
    first, second = 0, -1
    most, next_most = meta[TOTAL] / budget_A[0], -1.0
    for axis in range(1, num_hard):
        need = meta[TOTAL + axis] / max(budget_A[axis], 1)
        if need > most:
            first, second = axis, first
            most, next_most = need, most
        elif need > next_most:
            second, next_most = axis, need
    if second < 0 or next_most < BINDING * most:
        second = first
    return first, second


@kernel
def _step(slot_WF: Int64s, meta: Int64s, axis: int) -> int:
    """Return the greatest common divisor of the waiting samples' costs on an axis, at least 1."""
    step = 0
    for place in range(meta[COUNT]):
        value = slot_WF[slot_WF[place, ORDER], COST + axis]
        while value:
            step, value = value, step % value
        if step == 1:
            break
    return max(step, 1)
