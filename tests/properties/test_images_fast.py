"""Kernels and optional decoders against Pillow: the same pixels, and the same refusals, on random files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.properties.test_images import damaged_files, files
from tests.unit.images.pictures import encode
from tests.unit.images.without import EXTRAS, hide
from vlmpack.errors import SampleError
from vlmpack.geometry import TileGrid, Tiling
from vlmpack.images import decode, read_header, tile_image
from vlmpack.images.pillow_order import height_first
from vlmpack.images.pixels import read_picture
from vlmpack.images.resample import fill_grid, resize

SIDES = st.integers(1, 40) | st.integers(1, 300)


@st.composite
def pixels(draw):
    """Noise, flat areas or steps: what overshoots, what must stay as it is, what clips."""
    height, width = draw(SIDES), draw(SIDES)
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    coarse = rng.integers(0, 256, (-(-height // 7), -(-width // 7), 3), dtype=np.uint8)
    kind = draw(st.sampled_from(["noise", "blocks", "black and white"]))
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    whole = coarse.repeat(7, axis=0).repeat(7, axis=1)[:height, :width]
    return np.ascontiguousarray(whole if kind == "blocks" else (whole > 127) * np.uint8(255))


@given(pixels(), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 8, 32]))
def test_tiles_are_pillows_bit_for_bit(source, rows, columns, side):
    grid = TileGrid(rows=rows, columns=columns)
    size, target = source.shape[:2], (rows * side, columns * side)
    tiles = np.empty((grid.num_tiles, side, side, 3), np.uint8)
    fill_grid(
        source, (float(size[0]), float(size[1])), grid, tiles, height_first=height_first(resize)(size, target)
    )
    whole = tiles.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(*target, 3)
    expected = Image.fromarray(source).resize(target[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(whole, np.asarray(expected))


def outcome(source):
    """The pixels, or the reason of the refusal."""
    try:
        return read_picture(source, max_pixels=1_000_000).pixels.copy()
    except SampleError as error:
        return error.reason


@given(files())
def test_extras_change_no_pixel(data):
    np.testing.assert_array_equal(outcome(data), np.asarray(decode(data)))


@given(damaged_files())
def test_extras_change_no_pixel_and_no_refusal_of_damaged_files(data):
    found = outcome(data)
    with pytest.MonkeyPatch.context() as patch:
        hide(patch, *EXTRAS)
        expected = outcome(data)
    if isinstance(expected, str):
        assert found == expected
    else:
        np.testing.assert_array_equal(found, expected)


def tiled(data, tiling, mode):
    try:
        header = read_header(data, max_pixels=1_000_000)
        geometry = tiling.image(header.height, header.width)
        return tile_image(data, geometry, tile_size=tiling.tile_size, mode=mode, max_pixels=1_000_000)
    except SampleError as error:
        return error.reason


TILINGS = [
    Tiling(tile_size=16, max_side=64, patch_size=8),
    Tiling(tile_size=16, max_side=64, patch_size=8, resize_to_max_side=True),
    Tiling(tile_size=2, max_side=4, patch_size=1),
]


@given(damaged_files() | files(), st.sampled_from(TILINGS))
def test_fast_and_exact_refuse_the_same_files_for_the_same_reason(data, tiling):
    exact, fast = tiled(data, tiling, "exact"), tiled(data, tiling, "fast")
    assert isinstance(exact, str) == isinstance(fast, str)
    if isinstance(exact, str):
        assert fast == exact
    else:
        assert fast.shape == exact.shape


@given(pixels(), st.booleans(), st.sampled_from(["JPEG", "PNG"]))
def test_fast_differs_in_the_global_tile_only(source, enlarge, file_format):
    height, width = source.shape[:2]
    data = encode(Image.fromarray(source), file_format)
    tiling = Tiling(tile_size=32, max_side=64, patch_size=16, resize_to_max_side=enlarge)
    geometry = tiling.image(height, width)
    exact, fast = (tile_image(data, geometry, tile_size=32, mode=mode) for mode in ("exact", "fast"))
    own = int(geometry.has_global_tile)
    if min(height / geometry.height, width / geometry.width) < 10:  # else JPEG is decoded at a fraction
        assert torch.equal(exact[own:], fast[own:])
    if own and 2 * height * width > geometry.height * geometry.width:
        assert torch.equal(exact[0], fast[0])
