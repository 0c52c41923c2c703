"""The look-ahead window: waiting samples, indexed so that the best match is found without sorting.

O(axes) to insert and to remove. Keeping rows sorted instead was tried and lost: insertion and removal took
136 ns a sample (window of 256) where the rest of the packer takes 100 ns, while a row of 10 to 100 keys is
scanned in 3 to 14 ns, because the compiler turns the scan into vector instructions.

    tokens of a sample ----> key = tokens << 16 | slot     the axis with many levels is the fine one
    tiles of a sample  ----> class = tiles // unit         the axis with few levels is the coarse one

    class_CM    class 0  | key key key
                class 1  | key
                class 5  | key key key key key             "which sample of 5 tiles has the most
                class 10 | key key key                      tokens, but at most 731?" scans one row

Which two axes are indexed is decided in `window_axes`; the others are checked, not searched.

Shapes: W slots, C classes, A axes; F fields of a slot, M fields of a class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from vlmpack.kernels.compiled import kernel

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]

KEY, CLASS, INDEX, PLACE, OLDER, NEWER, ARRIVAL, BORN, ORDER, COST = range(10)
"""Fields of a slot: its key, its class and index there, its place in the order, its neighbours by age, its
arrival index, the packs emitted before it came; the slot that stands at this place in the order (a
permutation, occupied slots first, from which random picks are drawn); and from `COST` on its costs."""

COUNT, OLDEST, NEWEST, PACKS, FINE, COARSE, UNIT, BLUR, SHIFT = range(9)
LONGEST_WAIT, LONGEST_DELAY, TOTAL = 9, 10, 11
"""Fields of `meta`: samples that wait, the oldest and newest slot (-1: none), packs emitted, the two indexed
axes, the width of a class, what two floors can hide, the shift of fine values, the longest wait in packs and
in samples; from `TOTAL` on the summed costs of the samples that wait, and after them of all that came."""

SIZE, LEAST, MEMBER = 0, 1, 2
"""Fields of a class: how many keys it has, the smallest one (`HIDDEN`: none), from `MEMBER` on the keys."""

SLOT_BITS: Final = 16
MAX_LOOKAHEAD: Final = 1 << SLOT_BITS
SLOT_MASK: Final = MAX_LOOKAHEAD - 1
HIDDEN: Final = 1 << 62
"""A key that no search returns: it stands in the class while its sample is in the pack being filled."""
PAD: Final = 31
"""Classes are scanned up to a multiple of 32 keys, hidden ones behind their end: without a scalar rest a scan
of 24 keys takes 3 ns instead of 10."""
MAX_CLASSES: Final = 128
"""A coarse axis with fewer levels is indexed exactly, one with more in `SLICES` slices."""
SLICES: Final = 48


class Window(NamedTuple):
    """The waiting samples, as arrays that the kernels update in place and take one by one."""

    slots: Int64s
    """int64 [W, 9 + A], one row a slot: `KEY` to `COST`."""
    classes: Int64s
    """int64 [MAX_CLASSES, 2 + W], one row a class: `SIZE` to `MEMBER`."""
    meta: Int64s
    """int64 [11 + 2 A]: `COUNT` to `TOTAL`."""


def make_window(lookahead: int, num_axes: int) -> Window:
    """Return an empty window. O(lookahead) memory, about 1 KiB a slot.

    Args:
        lookahead: Slots, at most `MAX_LOOKAHEAD`.
        num_axes: Axes of a cost.
    """
    slot_WF = np.zeros((lookahead, COST + num_axes), np.int64)
    slot_WF[:, ORDER] = np.arange(lookahead)
    class_CM = np.full((MAX_CLASSES, MEMBER + ((lookahead + PAD) & ~PAD)), HIDDEN, np.int64)
    class_CM[:, SIZE] = 0
    meta = np.zeros(TOTAL + 2 * num_axes, np.int64)
    meta[OLDEST] = meta[NEWEST] = -1
    meta[UNIT] = HIDDEN  # one class until the first refresh
    return Window(slots=slot_WF, classes=class_CM, meta=meta)


@kernel
def insert(
    slot_WF: Int64s, class_CM: Int64s, meta: Int64s, cost_NA: Int64s, sample: int, arrival: int
) -> None:
    """Put row `sample` of the costs into a free slot. O(axes)."""
    slot, num_axes = slot_WF[meta[COUNT], ORDER], cost_NA.shape[1]
    for axis in range(num_axes):
        slot_WF[slot, COST + axis] = cost_NA[sample, axis]
        meta[TOTAL + axis] += cost_NA[sample, axis]
        meta[TOTAL + num_axes + axis] += cost_NA[sample, axis]
    slot_WF[slot, PLACE] = meta[COUNT]
    slot_WF[slot, ARRIVAL] = arrival
    slot_WF[slot, BORN] = meta[PACKS]
    slot_WF[slot, OLDER] = meta[NEWEST]
    slot_WF[slot, NEWER] = -1
    if meta[NEWEST] >= 0:
        slot_WF[meta[NEWEST], NEWER] = slot
    else:
        meta[OLDEST] = slot
    meta[NEWEST] = slot
    meta[COUNT] += 1
    enlist(slot_WF, class_CM, meta, slot)


@kernel
def remove(slot_WF: Int64s, class_CM: Int64s, meta: Int64s, slot: int) -> None:
    """Take a sample out; its slot becomes free. O(axes), and O(class) where it had the smallest key."""
    for axis in range(slot_WF.shape[1] - COST):
        meta[TOTAL + axis] -= slot_WF[slot, COST + axis]
    last = meta[COUNT] - 1
    place, moved = slot_WF[slot, PLACE], slot_WF[last, ORDER]
    slot_WF[place, ORDER], slot_WF[last, ORDER] = moved, slot
    slot_WF[moved, PLACE] = place
    meta[COUNT] = last
    older, newer = slot_WF[slot, OLDER], slot_WF[slot, NEWER]
    if older >= 0:
        slot_WF[older, NEWER] = newer
    else:
        meta[OLDEST] = newer
    if newer >= 0:
        slot_WF[newer, OLDER] = older
    else:
        meta[NEWEST] = older
    _delist(slot_WF, class_CM, slot)


@kernel
def hide(slot_WF: Int64s, class_CM: Int64s, slot: int) -> None:
    """Keep a sample from being found while it is in the pack being filled. O(1)."""
    class_CM[slot_WF[slot, CLASS], MEMBER + slot_WF[slot, INDEX]] = HIDDEN


@kernel
def show(slot_WF: Int64s, class_CM: Int64s, slot: int) -> None:
    """Undo `hide`. O(1)."""
    class_CM[slot_WF[slot, CLASS], MEMBER + slot_WF[slot, INDEX]] = slot_WF[slot, KEY]


@kernel
def is_hidden(slot_WF: Int64s, class_CM: Int64s, slot: int) -> bool:
    """Return whether a sample is in the pack being filled. O(1)."""
    return bool(class_CM[slot_WF[slot, CLASS], MEMBER + slot_WF[slot, INDEX]] == HIDDEN)


@kernel
def largest_key(class_CM: Int64s, group: int, limit: int) -> int:
    """Return the largest key of a class that is at most `limit`, or -1. O(class), in vector instructions."""
    best = -1
    for index in range((class_CM[group, SIZE] + PAD) & ~PAD):
        key = class_CM[group, index + MEMBER]
        best = max(best, key if key <= limit else -1)
    return best


@kernel
def enlist(slot_WF: Int64s, class_CM: Int64s, meta: Int64s, slot: int) -> None:
    """Append a sample to its class. O(1)."""
    key = ((slot_WF[slot, COST + meta[FINE]] >> meta[SHIFT]) << SLOT_BITS) | slot
    group = slot_WF[slot, COST + meta[COARSE]] // meta[UNIT]
    if slot_WF[slot, COST + meta[COARSE]] != group * meta[UNIT]:  # it does not share the others' divisor
        meta[BLUR] = 2 * (meta[UNIT] - 1)
    index = class_CM[group, SIZE]
    class_CM[group, MEMBER + index] = key
    class_CM[group, SIZE] = index + 1
    class_CM[group, LEAST] = min(class_CM[group, LEAST], key)
    slot_WF[slot, KEY] = key
    slot_WF[slot, CLASS] = group
    slot_WF[slot, INDEX] = index


@kernel
def _delist(slot_WF: Int64s, class_CM: Int64s, slot: int) -> None:
    key, group, index = slot_WF[slot, KEY], slot_WF[slot, CLASS], slot_WF[slot, INDEX]
    last = class_CM[group, SIZE] - 1
    moved = class_CM[group, MEMBER + last]
    class_CM[group, MEMBER + index] = moved
    class_CM[group, MEMBER + last] = HIDDEN
    class_CM[group, SIZE] = last
    slot_WF[moved & SLOT_MASK, INDEX] = index
    if key == class_CM[group, LEAST]:
        least = HIDDEN
        for other in range((last + PAD) & ~PAD):
            least = min(least, class_CM[group, other + MEMBER])
        class_CM[group, LEAST] = least
