"""Lower bounds on the number of packs: passes over samples, histograms and a grid. See `packing.bounds`.

Shapes: N samples, A axes, V = limit + 1 sizes, K kinds of samples, G x H cells of a grid over two axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmpack.kernels.compiled import kernel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Int32s = npt.NDArray[np.int32]
    Int64s = npt.NDArray[np.int64]


@kernel
def count_sizes(cost_NA: Int64s, axis: int, shift: int, count_V: Int64s) -> None:
    """Add the histogram of an axis, divided by 2^shift and rounded down, to `count_V`. O(n)."""
    for sample in range(cost_NA.shape[0]):
        count_V[cost_NA[sample, axis] >> shift] += 1


@kernel
def martello_toth(count_V: Int64s) -> int:
    """Return the bound L2 of a histogram of sizes 0 to limit. O(limit).

    Samples above half the limit need a bin each. For each `least` up to half, those from `least` to half must
    fit into what the bins of the samples above half leave, except the bins in which less than `least` is
    left; what does not fit opens more bins.

    Args:
        count_V: int64 [limit + 1].
    """
    limit = count_V.shape[0] - 1
    num_large, most = 0, 0
    for size in range(limit // 2 + 1, limit + 1):
        num_large += count_V[size]
    excess = 0  # what is in the small samples, less what the bins of the large ones leave for them
    for least in range(limit // 2, -1, -1):
        excess += count_V[least] * least
        if limit - least > limit // 2:
            excess -= count_V[limit - least] * least
        most = max(most, excess)
    return int(num_large - (-most // max(limit, 1)))


@kernel
def densest(cost_NA: Int64s, base: int, other: int) -> float:
    """Return the largest ratio of `other` to `base`; infinity where `base` alone is 0. O(n)."""
    most = 0.0
    for sample in range(cost_NA.shape[0]):
        if cost_NA[sample, base] > 0:
            most = max(most, cost_NA[sample, other] / cost_NA[sample, base])
        elif cost_NA[sample, other] > 0:
            return 1e300
    return most


@kernel
def crossed(
    cost_NA: Int64s, base: int, other: int, limit_base: int, limit_other: int, density: float
) -> float:
    """Return the crossed bound: a sample counts at least 1 less what fits beside it. O(n).

    A sample that takes t of `base` leaves room for at most density x (limit - t) of `other`, so it is worth
    the rest of that axis' limit. See `packing.bounds.crossed_bound` for the proof; samples above the density
    are left out.

    Args:
        cost_NA: int64 [N, A].
        base: The axis by which samples are large.
        other: The axis that is counted.
        limit_base: Budget of `base`.
        limit_other: Budget of `other`.
        density: At least limit_other / limit_base.
    """
    total = 0.0
    for sample in range(cost_NA.shape[0]):
        taken, used = cost_NA[sample, base], cost_NA[sample, other]
        if used <= density * taken:
            total += max(float(used), limit_other - density * (limit_base - taken))
    return total / limit_other


@kernel
def best_patterns(size_K2: Int64s, value_K: Floats, best_GH: Floats, last_GH: Int32s) -> None:
    """Fill the table of the unbounded knapsack problem in two dimensions. O(kinds x cells).

    Args:
        size_K2: int64 [K, 2], the size of each kind on the two axes, not both 0.
        value_K: float64 [K]; kinds without value are skipped.
        best_GH: float64 [G, H], the output: the most value that fits into g x h.
        last_GH: int32 [G, H], the output: a kind in a best pattern of g x h, or -1.
    """
    rows, columns = best_GH.shape
    for row in range(rows):
        for column in range(columns):
            best_GH[row, column], last_GH[row, column] = 0.0, -1
    for kind in range(size_K2.shape[0]):
        if value_K[kind] <= 1e-12:
            continue
        for row in range(size_K2[kind, 0], rows):
            for column in range(size_K2[kind, 1], columns):
                value = best_GH[row - size_K2[kind, 0], column - size_K2[kind, 1]] + value_K[kind]
                if value > best_GH[row, column] + 1e-12:
                    best_GH[row, column], last_GH[row, column] = value, kind
