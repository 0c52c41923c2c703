"""Sums over samples and packs in one pass each: what NumPy needs several passes and copies for. O(n).

Shapes: N samples, A axes, P packs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vlmpack.kernels.compiled import kernel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Int32s = npt.NDArray[np.int32]
    Int64s = npt.NDArray[np.int64]

LOW, HIGH, SUM = 0, 1, 2
"""Rows that `axis_totals` writes."""
NUM_TOTALS: Final = 3


@kernel
def axis_totals(cost_NA: Int64s, total_KA: Int64s) -> None:
    """Write the smallest and the largest cost and the sum of each axis into int64 [3, A]; N is at least 1."""
    for axis in range(cost_NA.shape[1]):
        low, high, total = cost_NA[0, axis], cost_NA[0, axis], 0
        for sample in range(cost_NA.shape[0]):
            cost = cost_NA[sample, axis]
            low, high, total = min(low, cost), max(high, cost), total + cost
        total_KA[LOW, axis], total_KA[HIGH, axis], total_KA[SUM, axis] = low, high, total


@kernel
def pack_loads(cost_NA: Int64s, pack_N: Int64s, load_PA: Int64s) -> None:
    """Add each sample's cost to its pack's row of `load_PA`, which begins as zeros."""
    for sample in range(cost_NA.shape[0]):
        for axis in range(cost_NA.shape[1]):
            load_PA[pack_N[sample], axis] += cost_NA[sample, axis]


@kernel
def relabel(pack_N: Int64s | Int32s, new_P: Int64s) -> None:
    """Replace each pack id p by `new_P[p]`, in place."""
    for sample in range(pack_N.shape[0]):
        pack_N[sample] = new_P[pack_N[sample]]


@kernel
def pack_by_pack(pack_N: Int64s, start_P: Int64s, sample_N: Int64s) -> None:
    """Write the samples of pack 0, then of pack 1, ..., ascending in each, by a counting sort.

    Args:
        pack_N: int64 [N].
        start_P: int64 [P + 1], zeros; receives where each pack begins, and N at the end.
        sample_N: int64 [N], the output.
    """
    num_packs = start_P.shape[0] - 1
    for sample in range(pack_N.shape[0]):
        start_P[pack_N[sample] + 1] += 1
    for pack in range(num_packs):
        start_P[pack + 1] += start_P[pack]
    for sample in range(pack_N.shape[0]):
        pack = pack_N[sample]
        sample_N[start_P[pack]] = sample
        start_P[pack] += 1
    for pack in range(num_packs, 0, -1):
        start_P[pack] = start_P[pack - 1]
    start_P[0] = 0
