"""Pixels -> a grid of tiles and the global tile, a few rows at a time, so that all of it stays in the cache.

    64 rows of pixels --across--> 64 wide rows --down--> the tiles' rows that they suffice for
                                                            |
                     64 rows of the global tile <--across, down--+

One step after the other for the whole picture gives the same levels in 1.3 times the time: it fetches 3 MB
of wide rows and 9 MB of tiles from memory once more.

Shapes: H rows, B bytes of a row (3 a pixel), N tiles, S side of a tile, C columns of the grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from vlmpack.kernels.resample import BLOCK_ROWS, resample_across, resample_down

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.kernels.taps import Taps

    Bytes = npt.NDArray[np.uint8]


@njit(nogil=True)
def _num_ready(taps: Taps, start: int, num_rows: int, length: int) -> int:
    """Return how many outputs `num_rows` of `length` input rows suffice for, at least `start`."""
    num, num_taps = taps.weight.shape
    if num_rows == length:
        return int(num)
    while start < num and taps.first[start] + num_taps <= num_rows:
        start += 1
    return start


@njit(nogil=True)
def fill_tiles(
    pixel_HB: Bytes,
    across: Taps,
    down: Taps,
    wide: Bytes,
    tile_NSB: Bytes,
    global_across: Taps,
    global_down: Taps,
    short: Bytes,
    global_MSB: Bytes,
) -> None:
    """Write the tiles of a picture, row by row, and the whole picture as one. O(outputs x taps).

    Args:
        pixel_HB: uint8 [H, B], C-contiguous.
        across: To C x S columns.
        down: To the grid's rows x S rows.
        wide: uint8 [BLOCK_ROWS + taps of `down`, 3 x C x S], C-contiguous, scratch.
        tile_NSB: uint8 [N, S, 3 x S], C-contiguous, the output.
        global_across: From C x S columns to S.
        global_down: From the grid's rows x S rows to S.
        short: uint8 [BLOCK_ROWS, 3 x C x S], C-contiguous, scratch.
        global_MSB: uint8 [1, S, 3 x S], C-contiguous, the output; [0, S, 3 x S] for no global tile.
    """
    height = pixel_HB.shape[0]
    side, line = tile_NSB.shape[1:]
    num_columns = wide.shape[1] // line
    segment = np.array([0, height, 0, line, num_columns * line, line])
    target = np.array([side * line, line, num_columns])
    base, filled, done, global_done = 0, 0, 0, 0
    while done < len(down.first):
        keep = min(down.first[done], filled)
        for row in range(keep, filled):
            wide[row - keep] = wide[row - base]
        base = keep
        count = min(BLOCK_ROWS, height - filled)
        start = filled - base
        resample_across(pixel_HB[filled : filled + count], across, wide[start : start + count])
        filled += count
        segment[0] = filled - base
        ready = _num_ready(down, done, filled, height)
        while done < ready:
            tile_row = done // side
            stop = min(ready, (tile_row + 1) * side)
            tiles = tile_NSB[tile_row * num_columns : (tile_row + 1) * num_columns].reshape(-1)
            out = tiles[(done - tile_row * side) * line :]
            resample_down(wide.reshape(-1), segment, down, done, stop, base, out, target)
            done = stop
        if len(global_MSB):
            ready = _num_ready(global_down, global_done, done, len(down.first))
            global_done = _fill_global_tile(
                tile_NSB, global_across, global_down, global_done, ready, short, global_MSB[0]
            )


@njit(nogil=True)
def _fill_global_tile(
    tile_NSB: Bytes, across: Taps, down: Taps, start: int, ready: int, short: Bytes, global_SB: Bytes
) -> int:
    """Write rows of the global tile, in blocks that are full or the last; return the first row left."""
    num_tiles, side, line = tile_NSB.shape
    num_columns, area = short.shape[1] // line, side * line
    source = np.array([num_tiles // num_columns * side, side, num_columns * area, area, line, line])
    target = np.array([line, num_columns * line, num_columns])
    while start < ready:
        stop = min(start + BLOCK_ROWS, ready)
        if stop - start < BLOCK_ROWS and stop < side:
            break
        resample_down(tile_NSB.reshape(-1), source, down, start, stop, 0, short.reshape(-1), target)
        resample_across(short[: stop - start], across, global_SB[start:stop])
        start = stop
    return start
