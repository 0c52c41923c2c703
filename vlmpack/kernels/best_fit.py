"""Best fit: each sample into the fullest bin with room. About O(n log bins); packs tighter, mixes less.

"Fullest" is the least room on axis 0, ties go to the lowest bin. Longest first it is best-fit decreasing.
On several axes the fullest bin by tokens is not the one that matches best, and it gains nothing over first
fit; on one axis `best_fit_decreasing_one_axis` makes as many bins a hundred times faster.

Source: D. S. Johnson, A. Demers, J. D. Ullman, M. R. Garey and R. L. Graham, "Worst-case performance bounds
for simple one-dimensional packing algorithms" (SIAM J. Comput. 3, 1974): 17/10 of the optimum, decreasing
11/9.

Shapes: N samples, A axes, B bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from vlmpack.kernels.bin_treap import LEFT, add_bin, drop_bin, first_in_order
from vlmpack.kernels.shares import measure

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]


@njit(nogil=True)
def best_fit(cost_NA: Int64s, order_N: Int64s, budget_A: Int64s, num_entries: int, bin_N: Int64s) -> int:
    """Write each sample's bin into `bin_N` and return the number of bins.

    Args:
        cost_NA: int64 [N, A], every row within the budget.
        order_N: int64 [N], the order in which samples are placed.
        budget_A: int64 [A], the limit of a bin on each axis.
        num_entries: `shares.num_entries(A)`.
        bin_N: int64 [N], the output.
    """
    num_bins, root, capacity = 0, -1, 64
    share_BE = np.empty((capacity, num_entries), np.int32)
    child_B2 = np.empty((capacity, 2), np.int32)
    room_BA = np.empty((capacity, budget_A.shape[0]), np.int64)
    path_B = np.empty(capacity, np.int32)
    need_KE = np.empty((1, num_entries), np.int32)
    for rank in range(order_N.shape[0]):
        sample = order_N[rank]
        measure(cost_NA, sample, budget_A, need_KE, 0)
        chosen = first_in_order(share_BE, child_B2, room_BA, root, LEFT, need_KE, cost_NA, sample, path_B)
        if chosen < 0:
            chosen = num_bins
            num_bins += 1
            if num_bins > capacity:
                capacity *= 2
                share_BE = np.concatenate((share_BE, np.empty_like(share_BE)))
                child_B2 = np.concatenate((child_B2, np.empty_like(child_B2)))
                room_BA = np.concatenate((room_BA, np.empty_like(room_BA)))
                path_B = np.empty(capacity, np.int32)
            room_BA[chosen] = budget_A
        else:
            root = drop_bin(share_BE, child_B2, room_BA, root, 1, chosen, budget_A, path_B)
        for axis in range(budget_A.shape[0]):
            room_BA[chosen, axis] -= cost_NA[sample, axis]
        root = add_bin(share_BE, child_B2, room_BA, root, 1, chosen, budget_A, path_B)
        bin_N[sample] = chosen
    return num_bins
