"""A treap over bins by their room on axis 0: the fullest or emptiest bin that fits, in about O(log bins).

A search tree by (room on axis 0, bin id) and a heap by a fixed hash of the bin id, so its depth is
logarithmic whatever the order of insertion. Each node holds what `shares` keeps of its subtree. In-order
from the left, the first bin that fits is best fit's; from the right, worst fit's. A tournament tree in order
of opening answers worst fit only by looking at most bins: 25 s for a million samples on three axes.

Source: R. Seidel and C. R. Aragon, "Randomized search trees" (Algorithmica 16, 1996).

Shapes: B bins, A axes, E entries of a node. `child_B2` holds -1 where there is no child.
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

LEFT, RIGHT = 0, 1


@kernel
def first_in_order(
    share_BE: Int32s,
    child_B2: Int32s,
    room_BA: Int64s,
    root: int,
    side: int,
    need_KE: Int32s,
    cost_NA: Int64s,
    sample: int,
    path_B: Int32s,
) -> int:
    """Return the first bin from one side in which a sample fits on every axis, or -1.

    Args:
        share_BE: int32 [B, E], maxima over each subtree.
        child_B2: int32 [B, 2].
        room_BA: int64 [B, A].
        root: The top bin, -1 in an empty treap.
        side: `LEFT` for the least room on axis 0 first, `RIGHT` for the most.
        need_KE: int32 [1, E], the sample, measured.
        cost_NA: int64 [N, A].
        sample: Row of `cost_NA`.
        path_B: int32 [B], working space.
    """
    node, depth = root, 0
    while True:
        while node >= 0 and may_fit(share_BE, node, need_KE):
            path_B[depth] = node
            depth += 1
            node = child_B2[node, side]
        if depth == 0:
            return -1
        depth -= 1
        node = path_B[depth]
        if fits_bin(room_BA, node, cost_NA, sample):
            return int(node)
        node = child_B2[node, 1 - side]


@kernel
def add_bin(
    share_BE: Int32s,
    child_B2: Int32s,
    room_BA: Int64s,
    root: int,
    tie: int,
    bin_id: int,
    budget_A: Int64s,
    path_B: Int32s,
) -> int:
    """Put a bin into the treap; return the new root. O(axes x log bins).

    Args:
        share_BE: See `first_in_order`.
        child_B2: See `first_in_order`.
        room_BA: See `first_in_order`.
        root: See `first_in_order`.
        tie: 1 to order bins with equal room by their id, -1 to order them the other way round.
        bin_id: The bin, not in the treap.
        budget_A: int64 [A].
        path_B: int32 [B], working space.
    """
    depth, node, parent, side = 0, root, -1, LEFT
    while node >= 0 and _priority(node) >= _priority(bin_id):
        path_B[depth] = node
        depth += 1
        parent, side = node, RIGHT if _before(room_BA, node, bin_id, tie) else LEFT
        node = child_B2[node, side]
    root = _attach(child_B2, root, parent, side, bin_id)
    path_B[depth] = bin_id
    depth += 1
    below, above = bin_id, bin_id  # where the next smaller and the next larger bin are attached
    below_side, above_side = LEFT, RIGHT
    while node >= 0:
        path_B[depth] = node
        depth += 1
        if _before(room_BA, node, bin_id, tie):
            child_B2[below, below_side] = node
            below, below_side = node, RIGHT
            node = child_B2[node, RIGHT]
        else:
            child_B2[above, above_side] = node
            above, above_side = node, LEFT
            node = child_B2[node, LEFT]
    child_B2[below, below_side] = -1
    child_B2[above, above_side] = -1
    _repair(share_BE, child_B2, room_BA, budget_A, path_B, depth)
    return root


@kernel
def drop_bin(
    share_BE: Int32s,
    child_B2: Int32s,
    room_BA: Int64s,
    root: int,
    tie: int,
    bin_id: int,
    budget_A: Int64s,
    path_B: Int32s,
) -> int:
    """Take a bin out of the treap before its room changes; return the new root. O(axes x log bins).

    Args:
        share_BE: See `first_in_order`.
        child_B2: See `first_in_order`.
        room_BA: See `first_in_order`.
        root: See `first_in_order`.
        tie: See `add_bin`.
        bin_id: The bin, in the treap.
        budget_A: int64 [A].
        path_B: int32 [B], working space.
    """
    depth, node, parent, side = 0, root, -1, LEFT
    while node != bin_id:
        path_B[depth] = node
        depth += 1
        parent, side = node, RIGHT if _before(room_BA, node, bin_id, tie) else LEFT
        node = child_B2[node, side]
    less, more = child_B2[bin_id, LEFT], child_B2[bin_id, RIGHT]
    while less >= 0 and more >= 0:
        if _priority(less) >= _priority(more):
            root = _attach(child_B2, root, parent, side, less)
            parent, side = less, RIGHT
            less = child_B2[less, RIGHT]
        else:
            root = _attach(child_B2, root, parent, side, more)
            parent, side = more, LEFT
            more = child_B2[more, LEFT]
        path_B[depth] = parent
        depth += 1
    root = _attach(child_B2, root, parent, side, less if less >= 0 else more)
    _repair(share_BE, child_B2, room_BA, budget_A, path_B, depth)
    return root


@kernel
def _priority(bin_id: int) -> int:
    mixed = ((int(bin_id) + 1) * 1103515245) & 0x7FFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 48271) & 0x7FFFFFFF
    return mixed ^ (mixed >> 13)


@kernel
def _before(room_BA: Int64s, one: int, other: int, tie: int) -> bool:
    if room_BA[one, 0] != room_BA[other, 0]:
        return bool(room_BA[one, 0] < room_BA[other, 0])
    return one * tie < other * tie


@kernel
def _attach(child_B2: Int32s, root: int, parent: int, side: int, node: int) -> int:
    if parent < 0:
        return node
    child_B2[parent, side] = node
    return root


@kernel
def _repair(
    share_BE: Int32s, child_B2: Int32s, room_BA: Int64s, budget_A: Int64s, path_B: Int32s, depth: int
) -> None:
    """Take the maxima of the nodes on a path anew, from its end to the root."""
    for step in range(depth - 1, -1, -1):
        node = path_B[step]
        measure(room_BA, node, budget_A, share_BE, node)
        for side in range(2):
            child = child_B2[node, side]
            if child >= 0:
                for entry in range(share_BE.shape[1]):
                    share_BE[node, entry] = max(share_BE[node, entry], share_BE[child, entry])
