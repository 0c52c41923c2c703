"""Pixels -> tiles of the planned size, without the resized picture in between.

    pixels [H, W, 3] --across--> one row of tiles, not yet as tall --down--> its tiles
                                        (in warm memory)              (in the pack's buffer)

The grid's tiles are bit-equal to cutting Pillow's bicubic resize; the global tile is bilinear, as the
reference pipeline's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from vlmpack.images.scratch import SCRATCH
from vlmpack.kernels.resample import BLOCK_ROWS, resample_across, resample_down
from vlmpack.kernels.taps import CUBIC, TRIANGLE, Taps, join_taps, split_weights, weigh_taps

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.geometry import TileGrid

    Pixels = npt.NDArray[np.uint8]


_ROWS_AT_ONCE: Final = 2 * BLOCK_ROWS
"""As wide as a picture of four tiles 0.8 MB, which a second level of cache holds."""


def part(taps: Taps, start: int, stop: int, length: int) -> tuple[Taps, int, int]:
    """Return the taps of some outputs as of the first input pixel they need, that one and the end.

    Args:
        taps: Of all outputs.
        start: First output.
        stop: After the last output.
        length: Input pixels.
    """
    if taps.is_same:
        return taps, start, stop
    low = int(taps.first[start])
    high = min(int(taps.first[stop - 1]) + taps.weight.shape[1], length)
    return (
        Taps(taps.first[start:stop] - low, taps.weight[start:stop], taps.split[start:stop], False),
        low,
        high,
    )


@lru_cache(maxsize=128)
def _taps(length: int, extent: float, num: int, kind: int) -> Taps:
    """Return how `num` pixels are made of `extent` pixels, of which there are `length`. 35 us for 2,048."""
    first = np.empty(num, np.int64)
    num_taps = weigh_taps(length, extent, kind, first, np.empty((num, 0), np.int32))
    weight = np.empty((num, _round_up(num_taps)), np.int32)
    weigh_taps(length, extent, kind, first, weight)
    return Taps(first, weight, _split(weight, num_taps), length == extent == num)


@lru_cache(maxsize=128)
def _joined_taps(length: int, extent: float, between: int, num: int) -> Taps:
    """Return how `num` pixels are made by way of `between`: bicubic first, bilinear then."""
    inner, outer = _taps(length, extent, between, CUBIC), _taps(between, float(between), num, TRIANGLE)
    first = np.empty(num, np.int64)
    num_taps = join_taps(*inner[:2], *outer[:2], first, np.empty((num, 0), np.int32))
    weight = np.empty((num, _round_up(num_taps)), np.int32)
    join_taps(*inner[:2], *outer[:2], first, weight)
    return Taps(first, weight, _split(weight, num_taps), False)


def _split(weight: npt.NDArray[np.int32], num_taps: int) -> npt.NDArray[np.int32]:
    split = np.empty((len(weight), -(-num_taps // 2) * 2), np.int32)
    split_weights(weight, split)
    return split


def _round_up(num_taps: int) -> int:
    return -(-num_taps // 4) * 4


def resize(pixels: Pixels, size: tuple[int, int], height_first: bool) -> Pixels:
    """Return the picture in another size, bicubic.

    Args:
        pixels: uint8 [H, W, 3], C-contiguous.
        size: Height and width to make.
        height_first: Which axis comes first; it changes pixels.
    """
    for axis in (0, 1) if height_first else (1, 0):
        height, width = pixels.shape[:2]
        taps = _taps(pixels.shape[axis], float(pixels.shape[axis]), size[axis], CUBIC)
        if axis:
            made = np.empty((height, size[1], 3), np.uint8)
            resample_across(pixels.reshape(height, -1), taps, made.reshape(height, -1))
        else:
            made = np.empty((size[0], width, 3), np.uint8)
            _down(pixels, height, taps, made[None])
        pixels = made
    return pixels


def fill_grid_and_global_tile(
    pixels: Pixels, size: tuple[float, float], grid: TileGrid, tiles: Pixels, whole: Pixels
) -> bool:
    """Write what `fill_grid` and `shrink_grid` write, in one go; return False if that cannot be done.

    A few rows at a time go all the way, while they are in the cache. One step after the other for the whole
    picture takes 1.3 times as long: 3 MB of wide rows and 9 MB of tiles are fetched from memory once more.

    Args:
        pixels: uint8 [H, W, 3], C-contiguous.
        size: Height and width in pixels of what they show, not rounded up.
        grid: Tiles in each direction.
        tiles: uint8 [rows x columns, side, side, 3], C-contiguous, the output.
        whole: uint8 [1, side, side, 3], C-contiguous, the output; [0, side, side, 3] for no global tile.
    """
    side = tiles.shape[1]
    height, width = pixels.shape[:2]
    across = _taps(width, size[1], grid.columns * side, CUBIC)
    down = _taps(height, size[0], grid.rows * side, CUBIC)
    if across.is_same or down.is_same:
        return False
    line = 3 * side * grid.columns
    num_rows = _ROWS_AT_ONCE + down.weight.shape[1]
    wide = SCRATCH.take("wide", num_rows * line).reshape(num_rows, line)
    lines = pixels.reshape(height, 3 * width)
    base = filled = done = global_done = 0
    while done < len(down.first):
        keep = min(int(down.first[done]), filled)
        wide[: filled - keep] = wide[keep - base : filled - base].copy()
        base, stop = keep, min(filled + _ROWS_AT_ONCE, height)
        resample_across(lines[filled:stop], across, wide[filled - base : stop - base])
        filled = stop
        ready = _num_ready(down, filled, height)
        _fill_rows(wide, base, filled - base, down, done, ready, grid, tiles)
        done = ready
        if len(whole):
            global_done = _add_to_global_tile(tiles, grid, global_done, done, whole[0])
    return True


def _num_ready(taps: Taps, num_rows: int, length: int) -> int:
    """Return how many outputs the first `num_rows` of `length` input rows suffice for."""
    if num_rows == length:
        return len(taps.first)
    return int(np.searchsorted(taps.first, num_rows - taps.weight.shape[1], side="right"))


def _fill_rows(
    wide: Pixels, base: int, num_rows: int, down: Taps, start: int, stop: int, grid: TileGrid, tiles: Pixels
) -> None:
    """Write rows start..stop of the picture into the tiles, from wide rows of which the first is `base`."""
    side = tiles.shape[1]
    line = 3 * side
    source = np.array([num_rows, num_rows, 0, line, grid.columns * line, line])
    target = np.array([side * line, line, grid.columns])
    while start < stop:
        row = start // side
        end = min(stop, (row + 1) * side)
        out = tiles[row * grid.columns : (row + 1) * grid.columns].reshape(-1)[(start - row * side) * line :]
        resample_down(wide.reshape(-1), source, down, start, end, base, out, target)
        start = end


def _add_to_global_tile(tiles: Pixels, grid: TileGrid, start: int, num_rows: int, tile: Pixels) -> int:
    """Write the rows of the global tile that the picture's first rows suffice for; return their number."""
    side, line = len(tile), 3 * len(tile)
    height, width, area = grid.rows * side, grid.columns * side, side * line
    down = _taps(height, float(height), side, TRIANGLE)
    stop = _num_ready(down, num_rows, height)
    if stop > start:
        source = np.array([height, side, grid.columns * area, area, line, line])
        target = np.array([line, grid.columns * line, grid.columns])
        short = SCRATCH.take("short", (stop - start) * grid.columns * line).reshape(stop - start, -1)
        resample_down(tiles.reshape(-1), source, down, start, stop, 0, short.reshape(-1), target)
        across = _taps(width, float(width), side, TRIANGLE)
        resample_across(short, across, tile[start:stop].reshape(stop - start, line))
    return stop


def fill_grid(
    pixels: Pixels, size: tuple[float, float], grid: TileGrid, tiles: Pixels, *, height_first: bool = False
) -> None:
    """Write the tiles of a picture, row by row.

    Args:
        pixels: uint8 [H, W, 3], C-contiguous.
        size: Height and width in pixels of what they show, not rounded up.
        grid: Tiles in each direction.
        tiles: uint8 [rows x columns, side, side, 3], C-contiguous, the output.
        height_first: Which axis is resized first; it changes pixels.
    """
    side = tiles.shape[1]
    height, width = pixels.shape[:2]
    across = _taps(width, size[1], grid.columns * side, CUBIC)
    down = _taps(height, size[0], grid.rows * side, CUBIC)
    lines = pixels.reshape(height, 3 * width)
    for row in range(grid.rows):
        taps, low, high = part(down, row * side, (row + 1) * side, height)
        band = lines[low:high]
        if height_first and not taps.is_same:
            short = SCRATCH.take("short", side * 3 * width).reshape(side, 3 * width)
            _down(band, high - low, taps, short.reshape(1, side, width, 3))
            band = short
        if not across.is_same:
            wide = SCRATCH.take("wide", len(band) * 3 * side * grid.columns)
            wide = wide.reshape(len(band), 3 * side * grid.columns)
            resample_across(band, across, wide)
            band = wide
        in_row = tiles[row * grid.columns : (row + 1) * grid.columns]
        if height_first or taps.is_same:
            np.copyto(in_row.transpose(1, 0, 2, 3), band.reshape(side, grid.columns, side, 3))
        else:
            _down(band, high - low, taps, in_row)


def shrink(
    pixels: Pixels, size: tuple[float, float], tile: Pixels, *, by_way_of: tuple[int, int] | None = None
) -> None:
    """Write a whole picture as one tile, bilinear and antialiased; within 1 of 255 levels of float.

    Down first, so that only as many rows as a tile has are turned on their side.

    Args:
        pixels: uint8 [H, W, 3], C-contiguous.
        size: Height and width in pixels of what they show, not rounded up.
        tile: uint8 [side, side, 3], C-contiguous, the output.
        by_way_of: Height and width of a bicubic resize that comes before, for which both are joined in one
            step. Only what that resize would have clipped or rounded comes out otherwise.
    """
    side = len(tile)
    height, width = pixels.shape[:2]
    if by_way_of is None:
        down, across = _taps(height, size[0], side, TRIANGLE), _taps(width, size[1], side, TRIANGLE)
    else:
        down = _joined_taps(height, size[0], by_way_of[0], side)
        across = _joined_taps(width, size[1], by_way_of[1], side)
    short = SCRATCH.take("short", side * 3 * width).reshape(side, 3 * width)
    _down(pixels, height, down, short.reshape(1, side, width, 3))
    resample_across(short, across, tile.reshape(side, 3 * side))


def shrink_grid(tiles: Pixels, grid: TileGrid, tile: Pixels) -> None:
    """Write the picture that a grid of tiles shows as one tile; the same levels as `shrink` of the picture.

    Args:
        tiles: uint8 [rows x columns, side, side, 3], C-contiguous.
        grid: Tiles in each direction.
        tile: uint8 [side, side, 3], C-contiguous, the output.
    """
    _add_to_global_tile(tiles, grid, 0, grid.rows * len(tile), tile)


def _down(pixels: Pixels, height: int, taps: Taps, tiles: Pixels) -> None:
    """Write a row of tiles [n, O, W, 3] from pixels of n x W columns."""
    num, rows, width = tiles.shape[:3]
    line = 3 * width
    source = np.array([height, height, 0, line, num * line, line])
    target = np.array([rows * line, line, num])
    resample_down(pixels.reshape(-1), source, taps, 0, rows, 0, tiles.reshape(-1), target)
