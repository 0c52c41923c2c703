from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vlmpack.geometry import TileGrid
from vlmpack.images.resample import fill_grid, resize, shrink, shrink_grid


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height, width):
    return np.asarray(Image.fromarray(noise(9, 9)).resize((width, height), Image.Resampling.BICUBIC)).copy()


def by_axes(pixels, size, height_first):
    """Pillow's bicubic, one axis after the other."""
    between = (pixels.shape[1], size[0]) if height_first else (size[1], pixels.shape[0])
    image = Image.fromarray(pixels).resize(between, Image.Resampling.BICUBIC)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))


def tiles_of(picture, grid, side):
    parts = picture.reshape(grid.rows, side, grid.columns, side, 3).transpose(0, 2, 1, 3, 4)
    return parts.reshape(-1, side, side, 3)


def levels_apart(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


def in_float(picture, side):
    """The whole picture as one tile, as the reference pipeline does it."""
    batch = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    tile = F.interpolate(batch, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return tile[0].permute(1, 2, 0).round().numpy().astype(np.uint8)


SIZES = [(48, 64), (32, 64), (48, 16), (7, 5), (300, 20), (20, 300), (200, 130), (1, 1)]


class TestResize:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("height_first", [False, True])
    def test_it_is_pillows_axis_by_axis(self, size, height_first):
        found = resize(noise(*size), (48, 64), height_first=height_first)
        np.testing.assert_array_equal(found, by_axes(noise(*size), (48, 64), height_first))


class TestFillGrid:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("height_first", [False, True])
    def test_tiles_are_cut_from_the_resized_picture(self, size, height_first):
        grid, side = TileGrid(rows=3, columns=4), 16
        tiles = np.full((12, side, side, 3), 7, np.uint8)
        fill_grid(noise(*size), (float(size[0]), float(size[1])), grid, tiles, height_first=height_first)
        expected = by_axes(noise(*size), (48, 64), height_first)
        np.testing.assert_array_equal(tiles, tiles_of(expected, grid, side))

    @pytest.mark.parametrize("height_first", [False, True])
    def test_a_picture_rounded_up_to_whole_pixels(self, height_first):
        grid, side = TileGrid(rows=2, columns=1), 16
        tiles = np.empty((2, side, side, 3), np.uint8)
        pixels = noise(21, 11)
        fill_grid(pixels, (20.5, 10.5), grid, tiles, height_first=height_first)
        image = Image.fromarray(pixels)
        if height_first:
            image = image.resize((11, 32), Image.Resampling.BICUBIC, box=(0, 0, 11, 20.5))
            image = image.resize((16, 32), Image.Resampling.BICUBIC, box=(0, 0, 10.5, 32))
        else:
            image = image.resize((16, 21), Image.Resampling.BICUBIC, box=(0, 0, 10.5, 21))
            image = image.resize((16, 32), Image.Resampling.BICUBIC, box=(0, 0, 16, 20.5))
        np.testing.assert_array_equal(tiles, tiles_of(np.asarray(image), grid, side))


GRIDS = [(1, 2), (2, 1), (3, 4), (4, 4), (5, 1), (2, 9)]


class TestShrink:
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("make", [noise, smooth])
    def test_the_global_tile_is_within_a_level_of_floats(self, grid, make):
        side = 16
        picture = make(grid[0] * side, grid[1] * side)
        tile = np.empty((side, side, 3), np.uint8)
        shrink(picture, picture.shape[:2], tile)
        assert levels_apart(tile, in_float(picture, side)) <= 1

    @pytest.mark.parametrize("grid", GRIDS)
    def test_tiles_give_the_same_levels_as_the_picture(self, grid):
        side, grid = 16, TileGrid(rows=grid[0], columns=grid[1])
        picture = noise(grid.rows * side, grid.columns * side)
        whole, joined = np.empty((2, side, side, 3), np.uint8)
        shrink(picture, picture.shape[:2], whole)
        shrink_grid(np.ascontiguousarray(tiles_of(picture, grid, side)), grid, joined)
        np.testing.assert_array_equal(whole, joined)

    @pytest.mark.parametrize("size", [(48, 64), (40, 30), (9, 70), (3, 3)])
    def test_by_way_of_a_larger_picture_is_within_two_levels_where_nothing_clips(self, size):
        pixels = (smooth(*size) // 2 + 64).astype(np.uint8)  # 64 to 191: no overshoot reaches an end
        large = resize(pixels, (96, 128), height_first=False)
        two_steps, one_step = np.empty((2, 32, 32, 3), np.uint8)
        shrink(large, large.shape[:2], two_steps)
        shrink(pixels, size, one_step, by_way_of=(96, 128))
        # Each of the two roundings in between is worth up to a level.
        assert levels_apart(two_steps, one_step) <= 2
        bilinear = np.empty((32, 32, 3), np.uint8)
        shrink(pixels, size, bilinear)
        assert levels_apart(two_steps, bilinear) >= levels_apart(two_steps, one_step)
