"""A tournament tree over bins in the order of their opening: the lowest bin with room, in about O(log bins).

Bins are leaves from left to right; a node holds what `shares` keeps of the bins below it.

Shapes: B bins that fit in the tree (a power of two), A axes, E entries of a node. Node 1 is the root, bin b
is node B + b; bins that are not open have shares of -1, so that nothing fits there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmpack.kernels.compiled import kernel
from vlmpack.kernels.shares import fits_bin, may_fit, measure

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Int32s = npt.NDArray[np.int32]
    Int64s = npt.NDArray[np.int64]


@kernel
def copy_leaves(share_NE: Int32s, larger_NE: Int32s) -> None:
    """Write a tree into one of twice the size, filled with -1. O(bins), so O(1) a bin over a run."""
    size = share_NE.shape[0] // 2
    for leaf in range(size):
        for entry in range(share_NE.shape[1]):
            larger_NE[2 * size + leaf, entry] = share_NE[size + leaf, entry]
    for node in range(2 * size - 1, 0, -1):
        _take_maxima(larger_NE, node)


@kernel
def update_leaf(share_NE: Int32s, room_BA: Int64s, bin_id: int, budget_A: Int64s) -> None:
    """Measure a bin's room anew and repair the maxima above it. O(axes x log bins)."""
    node = share_NE.shape[0] // 2 + bin_id
    measure(room_BA, bin_id, budget_A, share_NE, node)
    changed = True
    while node > 1 and changed:
        node //= 2
        changed = _take_maxima(share_NE, node)


@kernel
def lowest_bin(share_NE: Int32s, room_BA: Int64s, need_KE: Int32s, cost_NA: Int64s, sample: int) -> int:
    """Return the lowest bin in which a sample fits on every axis, or -1: first fit's question."""
    size, node = share_NE.shape[0] // 2, 1
    while True:
        if may_fit(share_NE, node, need_KE):
            if node < size:
                node *= 2
                continue
            if fits_bin(room_BA, node - size, cost_NA, sample):
                return int(node - size)
        while node & 1:  # a right child: its parent is done, too
            node //= 2
        if node == 0:
            return -1
        node += 1


@kernel
def _take_maxima(share_NE: Int32s, node: int) -> bool:
    changed = False
    for entry in range(share_NE.shape[1]):
        share = max(share_NE[2 * node, entry], share_NE[2 * node + 1, entry])
        changed |= share != share_NE[node, entry]
        share_NE[node, entry] = share
    return changed
