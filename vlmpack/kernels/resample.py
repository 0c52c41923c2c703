"""Pillow's resampling, bit for bit, at eight to fourteen times its speed.

Weights are whole numbers of 22 fractional bits, sums are int32 and rounded once, and the picture is
stretched across first and down second, with 8 bits in between: integers give the same pixels on every
machine and in every order of addition, so the compiler may use vectors as wide as it likes.

    across  [rows, columns x 3] -> [rows, new columns x 3]    neighbours lie 3 bytes apart, which vectors
            cannot load; so blocks of 64 rows are turned on their side, weighed, and turned back
    down    -> tiles [new rows, side x 3]                     neighbours lie a row apart: 16 or more bytes
            at once, written where the tile ends up, so that no resized picture is ever made

640 x 480 to 2048 x 1536: 1.5 ms (Pillow 20.7, torch's uint8 kernel 1.9 and not bit-equal); 4000 x 3000 to the
same: 12.5 ms (Pillow 88, torch 12.6). Tried and lost: turning blocks byte by byte (2.4 instead of 0.3 cycles
a byte); all columns of a block at once (falls out of the second cache level: 17 instead of 10 ms).

Source: J. Turkowski, "Filters for common resampling tasks" (Graphics Gems I, 1990); R. Keys, "Cubic
convolution interpolation for digital image processing" (IEEE TASSP 29, 1981) with a = -1/2; the rounding is
that of Pillow's `Image.resize`.

Shapes: H rows, B bytes of a row (3 a pixel), O outputs on the resized axis, K taps, a multiple of 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numba import njit

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Int32s = npt.NDArray[np.int32]
    Int64s = npt.NDArray[np.int64]
    Words = npt.NDArray[np.uint64]

TRIANGLE: Final = 0
"""Bilinear: reaches 1 pixel, or 1 output pixel where it shrinks."""
CUBIC: Final = 1
"""Bicubic: reaches 2."""
BITS: Final = 22
"""Fractional bits of a weight."""
BLOCK_ROWS: Final = 64
"""Rows that are turned on their side at a time."""
BLOCK_COLUMNS: Final = 128
"""Output columns that are made at a time."""


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
def _weigh_lines(
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
def _join_eight(
    a: Bytes, b: Bytes, c: Bytes, d: Bytes, e: Bytes, f: Bytes, g: Bytes, h: Bytes, words: Words
) -> None:
    """Write the bytes of eight rows as words, one a column."""
    for i in range(a.shape[0]):
        words[i] = (
            np.uint64(a[i])
            | (np.uint64(b[i]) << np.uint64(8))
            | (np.uint64(c[i]) << np.uint64(16))
            | (np.uint64(d[i]) << np.uint64(24))
            | (np.uint64(e[i]) << np.uint64(32))
            | (np.uint64(f[i]) << np.uint64(40))
            | (np.uint64(g[i]) << np.uint64(48))
            | (np.uint64(h[i]) << np.uint64(56))
        )


@njit(nogil=True)
def _part_byte(words: Words, shift: int, row: Bytes) -> None:
    """Write one byte of each word: the opposite of `_join_eight`, for one row."""
    for i in range(row.shape[0]):
        row[i] = np.uint8((words[i] >> np.uint64(shift)) & np.uint64(255))


@njit(nogil=True)
def resample_across(pixel_HB: Bytes, first_O: Int64s, weight_OK: Int32s, out_HB: Bytes) -> None:
    """Write the rows with O columns instead of their own. O(rows x (B + 3 O K)).

    Args:
        pixel_HB: uint8 [H, B], C-contiguous, at least one row.
        first_O: int64 [O], from `weigh_taps`.
        weight_OK: int32 [O, K], likewise.
        out_HB: uint8 [H, 3 x O], C-contiguous, the output.
    """
    num_rows, num_bytes = pixel_HB.shape
    num, num_taps = weight_OK.shape
    widest = 0
    for x0 in range(0, num, BLOCK_COLUMNS):
        widest = max(widest, first_O[min(x0 + BLOCK_COLUMNS, num) - 1] + num_taps - first_O[x0])
    eighth = BLOCK_ROWS // 8
    # On its side: [column, colour x block row], 8 rows a word. Behind the last column it stays 0.
    side_words = np.zeros(3 * eighth * widest, np.uint64)
    made_words = np.empty(3 * eighth * BLOCK_COLUMNS, np.uint64)
    side_bytes, made_bytes = side_words.view(np.uint8), made_words.view(np.uint8)
    words = np.empty(3 * max(widest, BLOCK_COLUMNS), np.uint64)
    line = 3 * BLOCK_ROWS
    sums = np.empty(line, np.int32)
    at_NK = np.empty((BLOCK_COLUMNS, num_taps), np.int64)
    to_N = np.empty(BLOCK_COLUMNS, np.int64)
    end = num_rows - 1
    for y0 in range(0, num_rows, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, num_rows - y0)
        for x0 in range(0, num, BLOCK_COLUMNS):
            x1 = min(x0 + BLOCK_COLUMNS, num)
            left = first_O[x0]
            low, high = 3 * left, min(3 * (first_O[x1 - 1] + num_taps), num_bytes)
            for g in range((rows + 7) // 8):
                y = y0 + 8 * g
                _join_eight(
                    pixel_HB[y, low:high],
                    pixel_HB[min(y + 1, end), low:high],
                    pixel_HB[min(y + 2, end), low:high],
                    pixel_HB[min(y + 3, end), low:high],
                    pixel_HB[min(y + 4, end), low:high],
                    pixel_HB[min(y + 5, end), low:high],
                    pixel_HB[min(y + 6, end), low:high],
                    pixel_HB[min(y + 7, end), low:high],
                    words,
                )
                for i in range(high - low):
                    side_words[i * eighth + g] = words[i]
            for x in range(x0, x1):
                to_N[x - x0] = (x - x0) * line
                for k in range(num_taps):
                    at_NK[x - x0, k] = (first_O[x] - left + k) * line
            _weigh_lines(side_bytes, at_NK[: x1 - x0], weight_OK[x0:x1], made_bytes, to_N[: x1 - x0], sums)
            for g in range((rows + 7) // 8):
                for i in range(3 * (x1 - x0)):
                    words[i] = made_words[i * eighth + g]
                for k in range(min(8, rows - 8 * g)):
                    _part_byte(words, 8 * k, out_HB[y0 + 8 * g + k, 3 * x0 : 3 * x1])


@njit(nogil=True)
def resample_down(
    source: Bytes, from_S: Int64s, first_O: Int64s, weight_OK: Int32s, out: Bytes, to_S: Int64s
) -> None:
    """Write columns with O rows instead of their own, a segment of each row at a time. O(B x O x K).

    Both sides are flat, with the places of their rows in numbers, because either may be one picture or
    a grid of tiles, in which a row of the picture lies in as many places as there are tiles.

    Args:
        source: uint8, C-contiguous.
        from_S: int64 [6]: rows in all; rows of a tile (or in all); bytes from one row of tiles to the
            next, from one tile to the next, from one row to the next; bytes of a segment.
        first_O: int64 [O], from `weigh_taps`; may be less than 0 or past the last row, which is then taken.
        weight_OK: int32 [O, K], likewise.
        out: uint8, C-contiguous, the output.
        to_S: int64 [3]: bytes from one tile to the next; bytes from one row to the next; tiles in a row.
    """
    num, num_taps = weight_OK.shape
    last, tile_rows, band, tile, row, length = (
        from_S[0] - 1,
        from_S[1],
        from_S[2],
        from_S[3],
        from_S[4],
        from_S[5],
    )
    sums = np.empty(length, np.int32)
    at_OK = np.empty((num, num_taps), np.int64)
    to_O = np.empty(num, np.int64)
    for y in range(num):
        for k in range(num_taps):
            from_row = min(first_O[y] + k, last)
            at_OK[y, k] = (from_row // tile_rows) * band + (from_row % tile_rows) * row
        to_O[y] = y * to_S[1]
    for _ in range(to_S[2]):
        _weigh_lines(source, at_OK, weight_OK, out, to_O, sums)
        at_OK += tile
        to_O += to_S[0]
