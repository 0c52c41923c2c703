"""Next fit: keep one bin open, close it when a sample does not fit. O(n), order kept; up to twice the packs.

What a loader does that packs "until the next one does not fit": no look-ahead, no delay, neighbours stay
together, and 10 to 25 % of the room stays empty. Source: D. S. Johnson, "Fast algorithms for bin packing" (J.
Comput. Syst. Sci. 8, 1974): fewer than twice the optimum on one axis.

Shapes: N samples, A axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmpack.kernels.compiled import kernel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]


@kernel
def next_fit(cost_NA: Int64s, order_N: Int64s, budget_A: Int64s, room_A: Int64s, bin_N: Int64s) -> int:
    """Write each sample's bin into `bin_N` and return the number of bins.

    Args:
        cost_NA: int64 [N, A], every row within the budget.
        order_N: int64 [N], the order in which samples are placed.
        budget_A: int64 [A], the limit of a bin on each axis.
        room_A: int64 [A], working space.
        bin_N: int64 [N], the output.
    """
    num_bins = 0
    for rank in range(order_N.shape[0]):
        sample = order_N[rank]
        fits = num_bins > 0
        for axis in range(budget_A.shape[0]):
            fits &= cost_NA[sample, axis] <= room_A[axis]
        if not fits:
            num_bins += 1
            for axis in range(budget_A.shape[0]):
                room_A[axis] = budget_A[axis]
        for axis in range(budget_A.shape[0]):
            room_A[axis] -= cost_NA[sample, axis]
        bin_N[sample] = num_bins - 1
    return num_bins
