"""How each pixel of a resized axis is made of the old ones: from where, and by what weights.

Weights are whole numbers of 22 fractional bits, as Pillow has them.

Shapes: M, O outputs; J, K, L taps, multiples of 4; E taps, even.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numba import njit

from vlmpack.kernels.vectors import LOW_BITS, WEIGHT_BITS

if TYPE_CHECKING:
    import numpy.typing as npt

    Int32s = npt.NDArray[np.int32]
    Int64s = npt.NDArray[np.int64]

TRIANGLE: Final = 0
"""Bilinear: reaches 1 pixel, or 1 output pixel where it shrinks."""
CUBIC: Final = 1
"""Bicubic: reaches 2."""
BITS: Final = WEIGHT_BITS
"""Fractional bits of a weight."""


class Taps(NamedTuple):
    """How each output pixel of one axis is made of input pixels."""

    first: Int64s
    """int64 [O], the first input pixel."""
    weight: Int32s
    """int32 [O, K], 0 behind the last tap."""
    split: Int32s
    """int32 [O, K or less], the same from `split_weights`."""
    is_same: bool
    """Whether there is nothing to do."""


@njit(nogil=True)
def _height(kind: int, at: float) -> float:
    """Return the filter's value at a distance, in units of its own pixels."""
    if at < 0.0:
        at = -at
    if kind == TRIANGLE:
        return 1.0 - at if at < 1.0 else 0.0
    if at < 1.0:
        return ((-0.5 + 2.0) * at - (-0.5 + 3.0)) * at * at + 1
    if at < 2.0:
        return (((at - 5) * at + 8) * at - 4) * -0.5
    return 0.0


@njit(nogil=True)
def weigh_taps(length: int, extent: float, kind: int, first_O: Int64s, weight_OK: Int32s) -> int:
    """Write where the taps of each output pixel begin and what they weigh; return the taps needed.

    Args:
        length: Input pixels.
        extent: How many of them the outputs cover, at most `length`; other than `length` only for a
            picture that was rounded up to whole pixels.
        kind: `TRIANGLE` or `CUBIC`.
        first_O: int64 [O], the output: index of the first tap.
        weight_OK: int32 [O, K], the output: weights, 0 behind the last tap. With K = 0 nothing is written.
    """
    num = first_O.shape[0]
    num_taps = weight_OK.shape[1]
    scale = extent / num
    widened = scale if scale > 1.0 else 1.0
    support = (1.0 if kind == TRIANGLE else 2.0) * widened
    narrow = 1.0 / widened
    most = 0
    height_K = np.empty(num_taps, np.float64)
    for x in range(num):
        center = (x + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        taps = min(int(center + support + 0.5), length) - low
        most = max(most, taps)
        if num_taps == 0:
            continue
        total = 0.0
        for k in range(taps):
            height = _height(kind, (k + low - center + 0.5) * narrow)
            height_K[k] = height
            total += height
        first_O[x] = low
        for k in range(num_taps):
            weight = height_K[k] / total if k < taps else 0.0
            weight_OK[x, k] = int(weight * (1 << BITS) + (-0.5 if weight < 0 else 0.5))
    return most


@njit(nogil=True)
def join_taps(
    inner_first_M: Int64s,
    inner_MJ: Int32s,
    outer_first_O: Int64s,
    outer_OL: Int32s,
    first_O: Int64s,
    weight_OK: Int32s,
) -> int:
    """Write the taps of two resizes in a row as those of one; return the taps needed.

    What the picture in between would have clipped or rounded, the joined taps do not.

    Args:
        inner_first_M: int64 [M], the first resize, to M pixels.
        inner_MJ: int32 [M, J], likewise.
        outer_first_O: int64 [O], the second one, from M to O pixels.
        outer_OL: int32 [O, L], likewise.
        first_O: int64 [O], the output: index of the first tap.
        weight_OK: int32 [O, K], the output: weights, 0 behind the last tap. With K = 0 nothing is written.
    """
    num, num_taps = weight_OK.shape
    most = 0
    for o in range(num):
        low, high = 1 << 62, 0
        for j in range(outer_OL.shape[1]):
            if outer_OL[o, j] != 0:
                at = outer_first_O[o] + j
                low = min(low, int(inner_first_M[at]))
                for k in range(inner_MJ.shape[1]):
                    if inner_MJ[at, k] != 0:
                        high = max(high, int(inner_first_M[at]) + k + 1)
        most = max(most, high - low)
        if num_taps == 0:
            continue
        first_O[o] = low
        for k in range(num_taps):
            total = np.int64(1) << (BITS - 1)
            for j in range(outer_OL.shape[1]):
                if outer_OL[o, j] != 0:
                    at = outer_first_O[o] + j
                    inner = low + k - inner_first_M[at]
                    if 0 <= inner < inner_MJ.shape[1]:
                        total += np.int64(outer_OL[o, j]) * np.int64(inner_MJ[at, inner])
            weight_OK[o, k] = total >> BITS
    return most


@njit(nogil=True)
def split_weights(weight_OK: Int32s, split_OE: Int32s) -> None:
    """Write the high parts of two weights as one number, 16 bits each, and their low parts as the next.

    Args:
        weight_OK: int32 [O, K].
        split_OE: int32 [O, E], the output, for `weigh_block`; E is even, and weights behind it are 0.
    """
    low, half = np.int32((1 << LOW_BITS) - 1), np.int32(0xFFFF)
    for n in range(split_OE.shape[0]):
        for k in range(0, split_OE.shape[1], 2):
            one, other = weight_OK[n, k], weight_OK[n, k + 1]
            split_OE[n, k] = ((other >> LOW_BITS) << 16) | ((one >> LOW_BITS) & half)
            split_OE[n, k + 1] = ((other & low) << 16) | (one & low)
