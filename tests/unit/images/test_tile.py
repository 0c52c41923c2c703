from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.images.pictures import encode, picture
from tests.unit.images.without import hide
from vlmpack.errors import ConfigError, SampleError
from vlmpack.geometry import Tiling
from vlmpack.images import (
    DynamicResize,
    GlobalAndSplitImages,
    SplitImage,
    decode,
    empty_tiles,
    tile,
    tile_image,
    to_float,
    warm_kernels,
)

TILING = Tiling(tile_size=32, max_side=128, patch_size=16)


def chw(image):
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def numbered(rows, columns, side, dtype=torch.uint8):
    """[1, rows x side, columns x side]: every tile is filled with its number, row by row."""
    image = torch.zeros(1, rows * side, columns * side)
    for number in range(rows * columns):
        row, column = divmod(number, columns)
        image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = number
    return image.to(dtype)


class TestSplitImage:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_tiles_come_row_by_row(self, dtype):
        tiles, grid = SplitImage(4)(numbered(2, 3, 4, dtype))
        assert grid == (2, 3)
        assert tiles.dtype == dtype
        assert tiles.shape == (6, 1, 4, 4)
        assert tiles.is_contiguous()
        assert [tile.unique().tolist() for tile in tiles] == [[0], [1], [2], [3], [4], [5]]

    def test_pixels_inside_a_tile_keep_their_places(self):
        image = torch.arange(2 * 4 * 6, dtype=torch.uint8).reshape(2, 4, 6)
        tiles, _ = SplitImage(2)(image)
        # The tile in row 1, column 2 of channel 1: 24 + rows 2, 3 x columns 4, 5
        assert tiles[5, 1].tolist() == [[24 + 16, 24 + 17], [24 + 22, 24 + 23]]

    def test_a_leading_one_and_pillow_images_are_taken(self):
        image = picture(64, 32)
        expected, grid = SplitImage(32)(chw(image))
        for other in (chw(image)[None], image, image.convert("RGBA")):
            tiles, same_grid = SplitImage(32)(other)
            assert torch.equal(tiles, expected)
            assert same_grid == grid == (2, 1)

    @pytest.mark.parametrize("shape", [(3, 33, 32), (3, 32, 31), (3, 16, 32), (3, 0, 32)])
    def test_sides_that_are_no_multiples_are_refused(self, shape):
        with pytest.raises(ValueError, match=f"{shape[1]} x {shape[2]} pixels.*tiles of 32"):
            SplitImage(32)(torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(32, 32), (2, 3, 32, 32), (1, 1, 3, 32, 32)])
    def test_several_pictures_at_once_are_refused(self, shape):
        with pytest.raises(ConfigError, match="one picture"):
            SplitImage(32)(torch.zeros(shape))

    @pytest.mark.parametrize("side", [0, -1, 2.0, True, None])
    def test_tile_sizes_are_positive_integers(self, side):
        with pytest.raises(ConfigError, match="patch_size must be a positive integer"):
            SplitImage(side)


class TestGlobalAndSplitImages:
    def test_one_tile_gets_no_global_one(self):
        image = chw(picture(32, 32))
        tiles, grid = GlobalAndSplitImages(32)(image)
        assert grid == (1, 1)
        assert torch.equal(tiles, image[None])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_the_global_tile_comes_first(self, dtype):
        tiles, grid = GlobalAndSplitImages(4)(numbered(2, 3, 4, dtype))
        assert grid == (2, 3)
        assert tiles.dtype == dtype
        assert tiles.shape == (7, 1, 4, 4)
        assert [tile.unique().tolist() for tile in tiles[1:]] == [[0], [1], [2], [3], [4], [5]]
        # The picture in small: dark at the top left, bright at the bottom right.
        assert tiles[0, 0, 0, 0] <= 1 < 4 <= tiles[0, 0, 3, 3]
        assert tiles[0, 0, 0, 0] < tiles[0, 0, 0, 3] < tiles[0, 0, 3, 3]

    def test_the_global_tile_is_antialiased(self):
        # Columns of black and white, shrunk fourfold: gray inside, not stripes.
        stripes = torch.zeros(1, 16, 16)
        stripes[:, :, ::2] = 1.0
        tiles, _ = GlobalAndSplitImages(4)(stripes)
        assert (tiles[0, 0, :, 1:3] - 0.5).abs().max() < 0.06

    def test_uint8_and_float_agree_within_a_level(self):
        image = chw(picture(64, 96))
        small, _ = GlobalAndSplitImages(32)(image)
        exact, _ = GlobalAndSplitImages(32)(to_float(image))
        assert ((exact[0] * 255).round() - small[0]).abs().max() <= 1
        assert torch.equal(to_float(small[1:]), exact[1:])

    def test_it_travels_to_workers_and_says_what_it_is(self):
        for kind in (SplitImage, GlobalAndSplitImages):
            split = pickle.loads(pickle.dumps(kind(32)))  # noqa: S301
            assert repr(split) == f"{kind.__name__}(patch_size=32)"
            assert torch.equal(split(picture(64, 64))[0], kind(32)(picture(64, 64))[0])


class TestTileImage:
    @pytest.mark.parametrize(
        ("size", "grid"),
        [((20, 30), (1, 1)), ((100, 90), (4, 4)), ((40, 120), (2, 4)), ((300, 10), (4, 1))],
    )
    def test_it_does_what_the_callables_do(self, size, grid):
        data = encode(picture(*size), "JPEG")
        expected, same_grid = GlobalAndSplitImages(32)(DynamicResize(32, 128)(decode(data)))
        found = tile_image(data, TILING.image(*size), tile_size=32)
        assert same_grid == grid
        assert found.dtype == torch.uint8
        assert torch.equal(found, expected)

    def test_without_a_global_tile(self):
        tiling = Tiling(tile_size=32, max_side=128, global_tile=False)
        data = encode(picture(64, 64), "PNG")
        found = tile_image(data, tiling.image(64, 64), tile_size=32)
        expected, _ = SplitImage(32)(picture(64, 64))
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_it_writes_into_a_slice_of_a_larger_buffer_and_nowhere_else(self, layout):
        data = encode(picture(40, 120), "PNG")
        geometry = TILING.image(40, 120)
        assert geometry.num_tiles == 9
        buffer = torch.full((20, 3, 32, 32), 7, dtype=torch.uint8).contiguous(memory_format=layout)
        found = tile_image(data, geometry, tile_size=32, out=buffer[5:14])
        assert found.data_ptr() == buffer[5:].data_ptr()
        assert torch.equal(buffer[5:14], tile_image(data, geometry, tile_size=32))
        assert (buffer[:5] == 7).all()
        assert (buffer[14:] == 7).all()

    def test_rotated_files_are_tiled_upright(self):
        tags = Image.Exif()
        tags[0x0112] = 6
        data = encode(picture(20, 120), "PNG", exif=tags)
        geometry = TILING.image(120, 20)
        found = tile_image(data, geometry, tile_size=32, expected_size=(120, 20))
        expected, grid = GlobalAndSplitImages(32)(
            DynamicResize(32, 128)(picture(20, 120).transpose(Image.Transpose.ROTATE_270))
        )
        assert grid == (4, 1)
        assert torch.equal(found, expected)

    def test_a_file_that_changed_after_planning_is_refused(self, tmp_path):
        path = tmp_path / "picture.png"
        path.write_bytes(encode(picture(20, 30), "PNG"))
        geometry = TILING.image(20, 30)
        assert tile_image(path, geometry, tile_size=32, expected_size=(20, 30)).shape == (1, 3, 32, 32)
        path.write_bytes(encode(picture(21, 30), "PNG"))
        with pytest.raises(SampleError, match=r"20 x 30 pixels.*21 x 30") as caught:
            tile_image(path, geometry, tile_size=32, expected_size=(20, 30))
        assert caught.value.reason == "image_unreadable"
        assert caught.value.numbers == {
            "promised_height": 20,
            "promised_width": 30,
            "height": 21,
            "width": 30,
        }

    def test_damaged_files_leave_as_sample_errors(self):
        data = encode(picture(90, 60), "JPEG")
        with pytest.raises(SampleError) as caught:
            tile_image(data[: len(data) // 2], TILING.image(90, 60), tile_size=32)
        assert caught.value.reason == "image_truncated"
        with pytest.raises(SampleError) as caught:
            tile_image(data, TILING.image(90, 60), tile_size=32, max_pixels=5399)
        assert caught.value.reason == "image_too_large"

    def test_the_tile_size_must_be_that_of_the_plan(self):
        with pytest.raises(ConfigError, match="tiles of 64 does not cover the planned 64 x 128"):
            tile_image(encode(picture(40, 120), "PNG"), TILING.image(40, 120), tile_size=64)

    @pytest.mark.parametrize(
        "out",
        [
            torch.zeros(8, 3, 32, 32, dtype=torch.uint8),
            torch.zeros(9, 32, 32, 3, dtype=torch.uint8),
            torch.zeros(9, 3, 32, 32),
        ],
    )
    def test_a_buffer_of_another_shape_or_type_is_refused(self, out):
        with pytest.raises(ConfigError, match=r"out must be uint8 \[9, 3, 32, 32\]"):
            tile_image(encode(picture(40, 120), "PNG"), TILING.image(40, 120), tile_size=32, out=out)

    def test_many_threads_fill_one_buffer(self):
        files = [encode(picture(100, 90, seed=seed), "JPEG") for seed in range(12)]
        geometry = TILING.image(100, 90)
        num = geometry.num_tiles
        buffer = torch.zeros(12 * num, 3, 32, 32, dtype=torch.uint8)

        def work(index):
            tile_image(files[index], geometry, tile_size=32, out=buffer[index * num : (index + 1) * num])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(12)))
        for index, file in enumerate(files):
            alone = tile_image(file, geometry, tile_size=32)
            assert torch.equal(buffer[index * num : (index + 1) * num], alone)


class TestWithoutKernels:
    """Interpreted kernels, or a Pillow of another kind: Pillow and torch do it all."""

    @pytest.fixture(params=["numba", "order"])
    def take_away(self, request, monkeypatch):
        def act():
            if request.param == "numba":
                hide(monkeypatch, "numba")
            else:
                monkeypatch.setattr(tile, "height_first", lambda resize: None)

        return act

    @pytest.mark.parametrize("size", [(20, 30), (100, 90), (40, 120), (300, 10)])
    @pytest.mark.parametrize("mode", ["exact", "fast"])
    def test_the_grid_is_the_same_and_the_global_tile_within_a_level(self, size, mode, take_away):
        data, geometry = encode(picture(*size), "JPEG"), TILING.image(*size)
        expected = tile_image(data, geometry, tile_size=32)
        take_away()
        found = tile_image(data, geometry, tile_size=32, mode=mode)
        own = int(geometry.has_global_tile)
        assert torch.equal(found[own:], expected[own:])
        assert (found.int() - expected.int()).abs().max() <= 1

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_it_writes_into_any_buffer(self, layout, take_away):
        take_away()
        data, geometry = encode(picture(40, 120), "PNG"), TILING.image(40, 120)
        buffer = torch.full((12, 3, 32, 32), 7, dtype=torch.uint8).contiguous(memory_format=layout)
        tile_image(data, geometry, tile_size=32, out=buffer[2:11])
        assert torch.equal(buffer[2:11], tile_image(data, geometry, tile_size=32))
        assert (buffer[:2] == 7).all()
        assert (buffer[11:] == 7).all()

    def test_a_jpeg_at_a_fraction_of_its_size_shows_the_same(self, take_away):
        take_away()
        # 10.4 times as tall as its one tile: decoded at a half.
        data, geometry = (
            encode(picture(333, 90), "JPEG"),
            Tiling(tile_size=8, max_side=32, patch_size=8).image(333, 90),
        )
        fast = tile_image(data, geometry, tile_size=8, mode="fast")
        exact = tile_image(data, geometry, tile_size=8)
        assert (fast.int() - exact.int()).abs().max() <= 7

    def test_there_is_nothing_to_warm(self, monkeypatch):
        hide(monkeypatch, "numba")
        warm_kernels()


class TestFast:
    @pytest.mark.parametrize("size", [(20, 30), (100, 90), (40, 120), (300, 10), (96, 128)])
    def test_only_the_global_tile_differs(self, size):
        data, geometry = encode(picture(*size), "JPEG"), TILING.image(*size)
        exact = tile_image(data, geometry, tile_size=32)
        fast = tile_image(data, geometry, tile_size=32, mode="fast")
        own = int(geometry.has_global_tile)
        assert torch.equal(fast[own:], exact[own:])

    def test_the_global_tile_of_a_small_picture_is_made_of_the_picture(self):
        tiling = Tiling(tile_size=32, max_side=128, patch_size=16, resize_to_max_side=True)
        data, geometry = encode(picture(30, 40), "PNG"), tiling.image(30, 40)
        assert geometry.num_tiles == 13
        exact = tile_image(data, geometry, tile_size=32)
        fast = tile_image(data, geometry, tile_size=32, mode="fast")
        apart = (exact[0].int() - fast[0].int()).abs()
        # Not the same arithmetic; most of the picture is smooth, its bright corner overshoots 255.
        assert 0 < apart.max() <= 12
        assert apart.float().mean() < 1

    def test_a_jpeg_much_larger_than_its_tile_is_decoded_at_a_fraction(self):
        tiling = Tiling(tile_size=16, max_side=16, patch_size=16)
        data, geometry = encode(picture(200, 180), "JPEG"), tiling.image(200, 180)
        exact = tile_image(data, geometry, tile_size=16)
        fast = tile_image(data, geometry, tile_size=16, mode="fast", expected_size=(200, 180))
        apart = (exact.int() - fast.int()).abs()
        assert 0 < apart.max() <= 7

    def test_a_file_that_changed_after_planning_is_refused(self):
        data, geometry = encode(picture(200, 180), "JPEG"), TILING.image(199, 180)
        with pytest.raises(SampleError, match=r"199 x 180 pixels.*200 x 180"):
            tile_image(data, geometry, tile_size=32, mode="fast", expected_size=(199, 180))

    @pytest.mark.parametrize("mode", ["quick", "", None, True])
    def test_other_modes_are_refused(self, mode):
        with pytest.raises(ConfigError, match="mode must be one of exact, fast"):
            tile_image(encode(picture(), "PNG"), TILING.image(20, 30), tile_size=32, mode=mode)


class TestEmptyTiles:
    def test_pixels_lie_together(self):
        tiles = empty_tiles(5, 32)
        assert tiles.shape == (5, 3, 32, 32)
        assert tiles.dtype == torch.uint8
        assert tiles.is_contiguous(memory_format=torch.channels_last)
        assert tiles[1:3].permute(0, 2, 3, 1).is_contiguous()

    def test_there_may_be_none(self):
        assert empty_tiles(0, 32).shape == (0, 3, 32, 32)


class TestToFloat:
    def test_it_is_a_true_division_by_255(self):
        levels = torch.arange(256, dtype=torch.uint8)
        found = to_float(levels)
        assert found.dtype == torch.float32
        # Rounded once from the exact quotient, which a multiplication by 1/255 is not.
        expected = np.array([level / 255 for level in range(256)], np.float32)
        np.testing.assert_array_equal(found.numpy(), expected)
        assert levels.tolist() == list(range(256))

    def test_tiles_that_are_scaled_already_are_refused(self):
        with pytest.raises(ConfigError, match="uint8"):
            to_float(torch.zeros(1, 3, 4, 4))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_the_result_is_contiguous_whatever_the_tiles_were(self, layout):
        tiles = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8).contiguous(memory_format=layout)
        found = to_float(tiles[1:4])
        assert found.is_contiguous()
        assert torch.equal(found, tiles[1:4].float().div(255))

    @pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 8, 8), (2, 1, 8, 8), (7,)])
    def test_any_shape_is_taken(self, shape):
        levels = torch.randint(0, 256, shape, dtype=torch.uint8)
        assert torch.equal(to_float(levels), levels.float().div(255))
