"""A tournament tree over open bins: which bin still has room, in about O(log bins).

Bins are leaves from left to right in the order in which they were opened; a node holds, per axis, the
largest room left below it. A node whose largest room is too small on any axis is skipped with all its
bins. With one axis a search is exactly one walk down; with several axes the maxima of a node may belong
to different bins, so a search can look into a subtree in vain. Measured cost stays near logarithmic.

Shapes: B bins that fit in the tree (a power of two), A axes; `room_NA` is [2 B, A], root at row 1, bin b at
row B + b, and bins that are not open have room -1, so that nothing fits there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]


@njit(nogil=True)
def make_tree(num_bins: int, num_axes: int) -> Int64s:
    """Return a tree with room for at least `num_bins` bins, none of them open. O(num_bins)."""
    size = 1
    while size < num_bins:
        size *= 2
    return np.full((2 * size, num_axes), -1, np.int64)


@njit(nogil=True)
def grown(room_NA: Int64s) -> Int64s:
    """Return a tree of twice the size with the same bins. O(bins), so O(1) a bin over a run."""
    size = room_NA.shape[0] // 2
    larger_NA = make_tree(2 * size, room_NA.shape[1])
    larger_NA[2 * size : 3 * size] = room_NA[size:]
    for node in range(2 * size - 1, 0, -1):
        for axis in range(room_NA.shape[1]):
            larger_NA[node, axis] = max(larger_NA[2 * node, axis], larger_NA[2 * node + 1, axis])
    return larger_NA


@njit(nogil=True)
def set_room(room_NA: Int64s, bin_id: int, room_A: Int64s) -> None:
    """Write the room of a bin and repair the maxima above it. O(axes x log bins)."""
    node = room_NA.shape[0] // 2 + bin_id
    for axis in range(room_A.shape[0]):
        room_NA[node, axis] = room_A[axis]
    while node > 1:
        node //= 2
        changed = False
        for axis in range(room_A.shape[0]):
            room = max(room_NA[2 * node, axis], room_NA[2 * node + 1, axis])
            if room != room_NA[node, axis]:
                room_NA[node, axis] = room
                changed = True
        if not changed:
            return


@njit(nogil=True)
def take(room_NA: Int64s, bin_id: int, cost_A: Int64s) -> None:
    """Put a cost into a bin in which it fits. O(axes x log bins)."""
    leaf = room_NA.shape[0] // 2 + bin_id
    set_room(room_NA, bin_id, room_NA[leaf] - cost_A)


@njit(nogil=True)
def fits(room_A: Int64s, cost_A: Int64s) -> bool:
    """Return whether a cost is within the room on every axis."""
    for axis in range(cost_A.shape[0]):  # noqa: SIM110 - numba does not compile generators
        if cost_A[axis] > room_A[axis]:
            return False
    return True


@njit(nogil=True)
def lowest_bin(room_NA: Int64s, cost_A: Int64s) -> int:
    """Return the lowest bin in which the cost fits on every axis, or -1: first fit's question."""
    size = room_NA.shape[0] // 2
    node = 1
    while True:
        if fits(room_NA[node], cost_A):
            if node >= size:
                return node - size
            node *= 2
            continue
        while node & 1:  # both children of the parent are done
            node //= 2
        if node == 0:
            return -1
        node += 1


@njit(nogil=True)
def emptiest_bin(room_NA: Int64s, cost_A: Int64s) -> int:
    """Return the bin with the most room on axis 0 among those in which the cost fits, or -1.

    Ties go to the lowest bin: worst fit's question. The child with more room is searched first, the
    other one only when it could still hold something better.
    """
    size = room_NA.shape[0] // 2
    stack_nodes = np.empty(128, np.int64)
    stack_first = np.empty(128, np.int64)  # the lowest bin below the node
    stack_width = np.empty(128, np.int64)
    stack_nodes[0], stack_first[0], stack_width[0] = 1, 0, size
    depth, best, best_room = 1, -1, -1
    while depth:
        depth -= 1
        node, first, width = stack_nodes[depth], stack_first[depth], stack_width[depth]
        room = room_NA[node, 0]
        if room < best_room or (room == best_room and first > best) or not fits(room_NA[node], cost_A):
            continue
        if node >= size:
            best, best_room = node - size, room
            continue
        left, half = 2 * node, width // 2
        go_left_first = room_NA[left, 0] >= room_NA[left + 1, 0]
        for turn in range(2):  # the child to visit first is pushed last
            right = (turn == 0) == go_left_first
            stack_nodes[depth] = left + right
            stack_first[depth] = first + half * right
            stack_width[depth] = half
            depth += 1
    return best
