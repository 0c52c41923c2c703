"""Pillow's resampling, bit for bit, at ten to twenty times its speed.

Weights are whole numbers of 22 fractional bits, sums are int32 and rounded once, and the picture is
stretched across first and down second, with 8 bits in between: integers give the same pixels on every
machine and in every order of addition, so the compiler may use vectors as wide as it likes.

    across  [rows, columns x 3] -> [rows, new columns x 3]    neighbours lie 3 bytes apart, which vectors
            cannot load; so blocks of 64 rows are turned on their side, weighed, and turned back
    down    -> tiles [new rows, side x 3]                     neighbours lie a row apart: 16 or more bytes
            at once, written where the tile ends up, so that no resized picture is ever made

`vlmpack.kernels.vectors` has the instructions for both. Tried and lost: 32-bit multiplications, which is what
the compiler makes of a plain loop (half as fast on Intel's processors); all columns of a block at once (falls
out of the second cache level: 17 instead of 10 ms for 12 megapixels); turning back 32 rows at a time instead
of 16 (their lines compete for the same places of the first cache: 0.30 instead of 0.20 ns a byte).

Source: J. Turkowski, "Filters for common resampling tasks" (Graphics Gems I, 1990); R. Keys, "Cubic
convolution interpolation for digital image processing" (IEEE TASSP 29, 1981) with a = -1/2; the rounding is
that of Pillow's `Image.resize`.

Shapes: H rows, B bytes of a row (3 a pixel), O outputs on the resized axis, K taps, a multiple of 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numba import njit

from vlmpack.kernels.taps import BITS, Taps
from vlmpack.kernels.vectors import (
    CAN_TURN,
    MAX_TAPS,
    TURN_BYTES,
    VECTOR_BYTES,
    turn_block,
    turn_block_back,
    weigh_block,
    weigh_block_coarse,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Int32s = npt.NDArray[np.int32]
    Int64s = npt.NDArray[np.int64]

BLOCK_ROWS: Final = 64
"""Rows that are turned on their side at a time."""
BLOCK_COLUMNS: Final = 128
"""Output columns that are made at a time."""


@njit(nogil=True, inline="always")
def _add_four(total: int, w0: int, w1: int, w2: int, w3: int, p0: int, p1: int, p2: int, p3: int) -> np.int32:
    # Every step in int32: numba would widen to 64 bits, which halves the pixels of a vector.
    low = np.int32(np.int32(w0 * np.int32(p0)) + np.int32(w1 * np.int32(p1)))
    high = np.int32(np.int32(w2 * np.int32(p2)) + np.int32(w3 * np.int32(p3)))
    return np.int32(total + np.int32(low + high))


@njit(nogil=True, inline="always")
def _level(total: int) -> np.uint8:
    return np.uint8(min(max(np.int32(total >> np.int32(BITS)), np.int32(0)), np.int32(255)))


@njit(nogil=True)
def _weigh_lines_by_loops(
    source: Bytes, at_NK: Int64s, weight_NK: Int32s, out: Bytes, to_N: Int64s, sums: Int32s
) -> None:
    """Write lines of levels, each weighed from K lines; all have the length of `sums`."""
    length = sums.shape[0]
    half = np.int32(1 << (BITS - 1))
    num_groups = weight_NK.shape[1] // 4
    for n in range(to_N.shape[0]):
        line = out[to_N[n] : to_N[n] + length]
        for g in range(num_groups):
            k = 4 * g
            w0, w1, w2, w3 = weight_NK[n, k], weight_NK[n, k + 1], weight_NK[n, k + 2], weight_NK[n, k + 3]
            a = source[at_NK[n, k] : at_NK[n, k] + length]
            b = source[at_NK[n, k + 1] : at_NK[n, k + 1] + length]
            c = source[at_NK[n, k + 2] : at_NK[n, k + 2] + length]
            d = source[at_NK[n, k + 3] : at_NK[n, k + 3] + length]
            if num_groups == 1:
                for i in range(length):
                    line[i] = _level(_add_four(half, w0, w1, w2, w3, a[i], b[i], c[i], d[i]))
            elif g == 0:
                for i in range(length):
                    sums[i] = _add_four(half, w0, w1, w2, w3, a[i], b[i], c[i], d[i])
            elif g < num_groups - 1:
                for i in range(length):
                    sums[i] = _add_four(sums[i], w0, w1, w2, w3, a[i], b[i], c[i], d[i])
            else:
                for i in range(length):
                    line[i] = _level(_add_four(sums[i], w0, w1, w2, w3, a[i], b[i], c[i], d[i]))


@njit(nogil=True)
def _weigh_lines(
    source: Bytes, at_NK: Int64s, weight_NK: Int32s, split_NE: Int32s, out: Bytes, to_N: Int64s, sums: Int32s
) -> None:
    """Write lines of levels, each weighed from K lines; all have the length of `sums`.

    Not in place: the last block of a line overlaps the one before.
    """
    length = sums.shape[0]
    if VECTOR_BYTES == 0 or length < VECTOR_BYTES or weight_NK.shape[1] > MAX_TAPS:
        _weigh_lines_by_loops(source, at_NK, weight_NK, out, to_N, sums)
        return
    for n in range(to_N.shape[0]):
        lows = np.int32(0)
        for k in range(1, split_NE.shape[1], 2):
            lows |= split_NE[n, k]
        if lows:
            for shift in range(0, length - VECTOR_BYTES, VECTOR_BYTES):
                weigh_block(source, at_NK, split_NE, n, shift, out, to_N[n])
            weigh_block(source, at_NK, split_NE, n, length - VECTOR_BYTES, out, to_N[n])
        else:
            for shift in range(0, length - VECTOR_BYTES, VECTOR_BYTES):
                weigh_block_coarse(source, at_NK, split_NE, n, shift, out, to_N[n])
            weigh_block_coarse(source, at_NK, split_NE, n, length - VECTOR_BYTES, out, to_N[n])


@njit(nogil=True)
def _turn(source: Bytes, row_R: Int64s, low: int, high: int, num: int, side: Bytes) -> None:
    """Write bytes low..high of `num` rows, at most `BLOCK_ROWS`, on their side: [byte, row].

    Args:
        source: uint8, flat.
        row_R: int64 [BLOCK_ROWS], where the rows begin in `source`.
        low: First byte.
        high: After the last one.
        num: Rows, a multiple of 16.
        side: uint8, flat, [high - low, BLOCK_ROWS], the output.
    """
    if not CAN_TURN or high - low < TURN_BYTES:
        for c in range(high - low):
            for k in range(num):
                side[c * BLOCK_ROWS + k] = source[row_R[k] + low + c]
        return
    column_T = np.arange(TURN_BYTES) * BLOCK_ROWS
    for k in range(0, num, 16):
        for at in range(low, high - TURN_BYTES, TURN_BYTES):
            turn_block(source, row_R[k : k + 16], at, side, column_T, (at - low) * BLOCK_ROWS + k)
        at = high - TURN_BYTES
        turn_block(source, row_R[k : k + 16], at, side, column_T, (at - low) * BLOCK_ROWS + k)


@njit(nogil=True)
def _turn_back(side: Bytes, num: int, out: Bytes, row_R: Int64s, low: int, high: int) -> None:
    """The opposite of `_turn`.

    Args:
        side: uint8, flat, [high - low, BLOCK_ROWS].
        num: Rows, a multiple of 16.
        out: uint8, flat, the output.
        row_R: int64 [BLOCK_ROWS], where the rows begin in `out`.
        low: First byte.
        high: After the last one.
    """
    if not CAN_TURN or high - low < 16:
        for k in range(num):
            for c in range(high - low):
                out[row_R[k] + low + c] = side[c * BLOCK_ROWS + k]
        return
    column_16 = np.arange(16) * BLOCK_ROWS
    for k in range(0, num, 16):
        for at in range(low, high - 16, 16):
            turn_block_back(side, column_16, (at - low) * BLOCK_ROWS + k, out, row_R[k : k + 16], at)
        at = high - 16
        turn_block_back(side, column_16, (at - low) * BLOCK_ROWS + k, out, row_R[k : k + 16], at)


@njit(nogil=True)
def resample_across(pixel_HB: Bytes, taps: Taps, out_HB: Bytes) -> None:
    """Write the rows with O columns instead of their own. O(rows x (B + 3 O K)).

    Args:
        pixel_HB: uint8 [H, B], C-contiguous, at least one row.
        taps: Of O outputs.
        out_HB: uint8 [H, 3 x O], C-contiguous, the output.
    """
    num_rows, num_bytes = pixel_HB.shape
    num, num_taps = taps.weight.shape
    # As many outputs at a time as are made of about BLOCK_COLUMNS inputs: both stay in the first cache.
    columns = min(max(BLOCK_COLUMNS * 3 * num // num_bytes, 16), BLOCK_COLUMNS)
    widest = 0
    for x0 in range(0, num, columns):
        widest = max(widest, taps.first[min(x0 + columns, num) - 1] + num_taps - taps.first[x0])
    # On its side: [column, colour x block row]. What lies behind the last column is weighed with 0.
    line = 3 * BLOCK_ROWS
    side, made = np.zeros(line * widest, np.uint8), np.empty(line * columns, np.uint8)
    sums = np.empty(line, np.int32)
    at_NK = np.empty((columns, num_taps), np.int64)
    to_N = np.arange(columns) * line
    from_R, to_R = np.empty(BLOCK_ROWS, np.int64), np.empty(BLOCK_ROWS, np.int64)
    pixels, out = pixel_HB.reshape(-1), out_HB.reshape(-1)
    for y0 in range(0, num_rows, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, num_rows - y0)
        rows = (rows + 15) // 16 * 16  # what is behind the last is the last again
        for k in range(BLOCK_ROWS):
            from_R[k] = min(y0 + k, num_rows - 1) * num_bytes
            to_R[k] = min(y0 + k, num_rows - 1) * 3 * num
        for x0 in range(0, num, columns):
            x1 = min(x0 + columns, num)
            left = taps.first[x0]
            high = min(3 * (taps.first[x1 - 1] + num_taps), num_bytes)
            _turn(pixels, from_R, 3 * left, high, rows, side)
            for x in range(x0, x1):
                for k in range(num_taps):
                    at_NK[x - x0, k] = (taps.first[x] - left + k) * line
            part, to = taps.split[x0:x1], to_N[: x1 - x0]
            _weigh_lines(side, at_NK, taps.weight[x0:x1], part, made, to, sums)
            _turn_back(made, rows, out, to_R, 3 * x0, 3 * x1)


@njit(nogil=True)
def resample_down(
    source: Bytes, from_S: Int64s, taps: Taps, start: int, stop: int, offset: int, out: Bytes, to_S: Int64s
) -> None:
    """Write columns with other rows instead of their own, a segment of each row at a time. O(B x O x K).

    Both sides are flat, with the places of their rows in numbers, because either may be one picture or
    a grid of tiles, in which a row of the picture lies in as many places as there are tiles.

    Args:
        source: uint8, C-contiguous.
        from_S: int64 [6]: rows that there are; rows of a tile (or no fewer than there are); bytes from one
            row of tiles to the next, from one tile to the next, from one row to the next; bytes of a segment.
        taps: Of all outputs. What they ask for past the last row is taken from the last one.
        start: First output to write.
        stop: After the last one.
        offset: Input rows before those of `source`.
        out: uint8, C-contiguous, the output; begins at the first output.
        to_S: int64 [3]: bytes from one tile to the next; bytes from one row to the next; tiles in a row.
    """
    last, tile_rows, band, tile, row, length = (
        from_S[0] - 1,
        from_S[1],
        from_S[2],
        from_S[3],
        from_S[4],
        from_S[5],
    )
    num, num_taps = stop - start, taps.weight.shape[1]
    sums = np.empty(length, np.int32)
    at_OK = np.empty((num, num_taps), np.int64)
    to_O = np.empty(num, np.int64)
    for y in range(num):
        from_row = min(taps.first[start + y] - offset, last)
        tile_row, rest = from_row // tile_rows, from_row % tile_rows
        for k in range(num_taps):
            at_OK[y, k] = tile_row * band + rest * row
            if from_row + k < last:
                rest += 1
                if rest == tile_rows:
                    tile_row, rest = tile_row + 1, 0
        to_O[y] = y * to_S[1]
    for _ in range(to_S[2]):
        _weigh_lines(source, at_OK, taps.weight[start:stop], taps.split[start:stop], out, to_O, sums)
        at_OK += tile
        to_O += to_S[0]
