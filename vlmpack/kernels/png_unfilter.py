"""A PNG's filtered rows -> RGB. Pillow takes five times as long over a scanned page, and not to inflate it.

Each row says how its bytes were predicted, from the pixel on the left (A), above (B) and above left (C):

    0 none   1 left A   2 above B   3 their average, rounded down   4 whichever is nearest to A + B - C

Only "above" is free of chains from pixel to pixel, so the others keep the left pixel in registers, and choose
by value and not by branches: 5 ns a pixel of Paeth's predictor instead of 14.

Source: W3C PNG (third edition) sections 9.2 to 9.4. Transparency is laid over white as Pillow's `paste` does
it: p = mask * colour + (255 - mask) * 255, divided by 255 as (p + 128 + (p + 128) / 256) / 256.

Shapes: H rows, B bytes of a row, C bytes of an RGB row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numba import njit

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

ONE: Final = np.uint64(1)
TWO: Final = np.uint64(2)
THREE: Final = np.uint64(3)
"""Offsets inside a pixel. Unsigned, or numba would ask of each if it counts from the end: 9 ns a pixel."""


@njit(nogil=True)
def _nearest(left: int, above: int, corner: int) -> int:
    across, down = above - corner, left - corner
    by_left, by_above = max(across, -across), max(down, -down)
    by_corner = max(across + down, -across - down)
    other = above if by_above <= by_corner else corner
    return left if min(by_above, by_corner) >= by_left else other


@njit(nogil=True)
def _add_left(source_B: Bytes, depth: int, row_B: Bytes) -> None:
    a = b = c = d = np.int32(0)
    i = np.uint64(0)
    for _ in range(row_B.shape[0] // depth):
        a = np.int32((a + source_B[i]) & 255)
        b = np.int32((b + source_B[i + ONE]) & 255)
        c = np.int32((c + source_B[i + TWO]) & 255)
        row_B[i], row_B[i + ONE], row_B[i + TWO] = a, b, c
        if depth == 4:
            d = np.int32((d + source_B[i + THREE]) & 255)
            row_B[i + THREE] = d
        i += np.uint64(depth)


@njit(nogil=True)
def _add_average(source_B: Bytes, above_B: Bytes, depth: int, row_B: Bytes) -> None:
    a = b = c = d = np.int32(0)
    i = np.uint64(0)
    for _ in range(row_B.shape[0] // depth):
        a = np.int32((source_B[i] + ((a + above_B[i]) >> 1)) & 255)
        b = np.int32((source_B[i + ONE] + ((b + above_B[i + ONE]) >> 1)) & 255)
        c = np.int32((source_B[i + TWO] + ((c + above_B[i + TWO]) >> 1)) & 255)
        row_B[i], row_B[i + ONE], row_B[i + TWO] = a, b, c
        if depth == 4:
            d = np.int32((source_B[i + THREE] + ((d + above_B[i + THREE]) >> 1)) & 255)
            row_B[i + THREE] = d
        i += np.uint64(depth)


@njit(nogil=True)
def _add_nearest(source_B: Bytes, above_B: Bytes, depth: int, row_B: Bytes) -> None:
    a = b = c = d = np.int32(0)
    corner_a = corner_b = corner_c = corner_d = np.int32(0)
    i = np.uint64(0)
    for _ in range(row_B.shape[0] // depth):
        above_a, above_b, above_c = (
            np.int32(above_B[i]), np.int32(above_B[i + ONE]), np.int32(above_B[i + TWO])
        )  # fmt: skip
        a = np.int32((source_B[i] + _nearest(a, above_a, corner_a)) & 255)
        b = np.int32((source_B[i + ONE] + _nearest(b, above_b, corner_b)) & 255)
        c = np.int32((source_B[i + TWO] + _nearest(c, above_c, corner_c)) & 255)
        row_B[i], row_B[i + ONE], row_B[i + TWO] = a, b, c
        corner_a, corner_b, corner_c = above_a, above_b, above_c
        if depth == 4:
            above_d = np.int32(above_B[i + THREE])
            d = np.int32((source_B[i + THREE] + _nearest(d, above_d, corner_d)) & 255)
            row_B[i + THREE] = d
            corner_d = above_d
        i += np.uint64(depth)


@njit(nogil=True)
def _add_above(source_B: Bytes, above_B: Bytes, row_B: Bytes) -> None:
    for i in range(row_B.shape[0]):
        row_B[i] = (np.int32(source_B[i]) + np.int32(above_B[i])) & 255


@njit(nogil=True)
def _lay_over_white(row_B: Bytes, out_C: Bytes) -> None:
    for x in range(row_B.shape[0] // 4):
        mask = np.int32(row_B[4 * x + 3])
        for colour in range(3):
            mixed = mask * np.int32(row_B[4 * x + colour]) + (255 - mask) * 255 + 128
            out_C[3 * x + colour] = ((mixed >> 8) + mixed) >> 8


@njit(nogil=True)
def unfilter_png(filtered_HB: Bytes, depth: int, line_2B: Bytes, out_HC: Bytes) -> bool:
    """Write the picture, transparency laid over white; return False if a row has no known filter. O(H x B).

    Args:
        filtered_HB: uint8 [H, 1 + B], C-contiguous: the number of the row's filter, then its bytes.
        depth: Bytes of a pixel: 3, or 4 where the last is opacity.
        line_2B: uint8 [2, B], scratch.
        out_HC: uint8 [H, C], C-contiguous, the output; C = B for 3 bytes a pixel.
    """
    line_2B[1] = 0  # above the first row
    above = line_2B[1]
    for y in range(out_HC.shape[0]):
        kind = filtered_HB[y, 0]
        source = filtered_HB[y, 1:]
        row = line_2B[y & 1] if depth == 4 else out_HC[y]
        if kind == 0:
            row[:] = source
        elif kind == 1:
            _add_left(source, depth, row)
        elif kind == 2:
            _add_above(source, above, row)
        elif kind == 3:
            _add_average(source, above, depth, row)
        elif kind == 4:
            _add_nearest(source, above, depth, row)
        else:
            return False
        if depth == 4:
            _lay_over_white(row, out_HC[y])
        above = row
    return True
