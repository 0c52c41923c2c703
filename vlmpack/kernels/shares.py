"""What a search tree keeps of the bins below a node, so that a sample which fits none of them is turned away.

Maxima of the room on each axis, as shares of the budget, are not enough: they may belong to different bins.
So a node also holds, for each axis beyond the first and at three slants, the largest "smaller of the shares
on axis 0 and on it". Without these pairs a bin with tokens but no tiles left lures every sample, and first
fit took 41 seconds for a million samples instead of 0.6.

                      room: 0.9 of the tokens, 0.2 of the tiles    and    0.4 of the tokens, 0.7 of the tiles
    maxima of both:   0.9 and 0.7: a sample of 0.5 and 0.5 seems to fit
    smaller shares:   0.2             0.4                  it does not: 0.5 is more than 0.4

Shapes: A axes, E = 4 A - 3 entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from vlmpack.kernels.compiled import kernel

if TYPE_CHECKING:
    import numpy.typing as npt

    Int32s = npt.NDArray[np.int32]
    Int64s = npt.NDArray[np.int64]

SCALE: Final = float(1 << 26)
"""A share is held as an integer in 2^-26; floors on both sides keep every comparison safe."""
SLANTS: Final = np.array([0.25, 1.0, 4.0])
"""Axis 0 counts this much in a pair: samples rich and poor in tokens each meet a pair that is sharp."""


def num_entries(num_axes: int) -> int:
    """Return E, the entries that `measure` writes for a cost with so many axes."""
    return num_axes + (num_axes - 1) * int(SLANTS.shape[0])


@kernel
def measure(value_NA: Int64s, row: int, budget_A: Int64s, share_NE: Int32s, node: int) -> None:
    """Write a row of rooms or costs into a row of shares. O(axes)."""
    entry = budget_A.shape[0]
    first = value_NA[row, 0] * (SCALE / budget_A[0])
    share_NE[node, 0] = int(first)
    for axis in range(1, budget_A.shape[0]):
        share = value_NA[row, axis] * (SCALE / budget_A[axis]) if budget_A[axis] > 0 else 0.0
        share_NE[node, axis] = int(share)
        for slant in SLANTS:
            share_NE[node, entry] = int(min(first * slant, share))
            entry += 1


@kernel
def may_fit(share_NE: Int32s, node: int, need_KE: Int32s) -> bool:
    """Return whether a sample, measured into row 0 of `need_KE`, may fit some bin below a node. O(axes)."""
    may = True
    for entry in range(need_KE.shape[1]):
        may &= need_KE[0, entry] <= share_NE[node, entry]
    return may


@kernel
def fits_bin(room_BA: Int64s, bin_id: int, cost_NA: Int64s, sample: int) -> bool:
    """Return whether a sample fits a bin on every axis, exactly. O(axes)."""
    fits = True
    for axis in range(room_BA.shape[1]):
        fits &= cost_NA[sample, axis] <= room_BA[bin_id, axis]
    return fits
