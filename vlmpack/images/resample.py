"""Pixels -> tiles of the planned size, without the resized picture in between.

    pixels [H, W, 3] --across--> one row of tiles, not yet as tall --down--> its tiles
                                        (in warm memory)              (in the pack's buffer)

The grid's tiles are bit-equal to cutting Pillow's bicubic resize; the global tile is bilinear, as the
reference pipeline's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from vlmpack.images.scratch import SCRATCH
from vlmpack.kernels.resample import BLOCK_ROWS, resample_across, resample_down
from vlmpack.kernels.taps import CUBIC, TRIANGLE, Taps, join_taps, split_weights, weigh_taps
from vlmpack.kernels.tiles import fill_tiles

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.geometry import TileGrid

    Pixels = npt.NDArray[np.uint8]


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

    Args:
        pixels: uint8 [H, W, 3], C-contiguous.
        size: Height and width in pixels of what they show, not rounded up.
        grid: Tiles in each direction.
        tiles: uint8 [rows x columns, side, side, 3], C-contiguous, the output.
        whole: uint8 [1, side, side, 3], C-contiguous, the output; [0, side, side, 3] for no global tile.
    """
    side = tiles.shape[1]
    (height, width), line = pixels.shape[:2], 3 * side * grid.columns
    across = _taps(width, size[1], grid.columns * side, CUBIC)
    down = _taps(height, size[0], grid.rows * side, CUBIC)
    if across.is_same or down.is_same:
        return False
    num_rows = BLOCK_ROWS + down.weight.shape[1]
    fill_tiles(
        pixels.reshape(height, -1),
        across,
        down,
        SCRATCH.take("wide", num_rows * line).reshape(num_rows, line),
        tiles.reshape(-1, side, 3 * side),
        _taps(grid.columns * side, float(grid.columns * side), side, TRIANGLE),
        _taps(grid.rows * side, float(grid.rows * side), side, TRIANGLE),
        SCRATCH.take("short", BLOCK_ROWS * line).reshape(BLOCK_ROWS, line),
        whole.reshape(-1, side, 3 * side),
    )
    return True


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
    side, columns = len(tile), grid.columns
    line, area, height = 3 * side, 3 * side * side, grid.rows * side
    short = SCRATCH.take("short", side * columns * line).reshape(side, columns * line)
    taps = _taps(height, float(height), side, TRIANGLE)
    source = np.array([height, side, columns * area, area, line, line])
    target = np.array([line, columns * line, columns])
    resample_down(tiles.reshape(-1), source, taps, 0, side, 0, short.reshape(-1), target)
    taps = _taps(columns * side, float(columns * side), side, TRIANGLE)
    resample_across(short, taps, tile.reshape(side, line))


def _down(pixels: Pixels, height: int, taps: Taps, tiles: Pixels) -> None:
    """Write a row of tiles [n, O, W, 3] from pixels of n x W columns."""
    num, rows, width = tiles.shape[:3]
    line = 3 * width
    source = np.array([height, height, 0, line, num * line, line])
    target = np.array([rows * line, line, num])
    resample_down(pixels.reshape(-1), source, taps, 0, rows, 0, tiles.reshape(-1), target)
