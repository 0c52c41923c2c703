"""Pixels from running nanoVLM's DynamicResize, ToTensor and GlobalAndSplitImages on seeded pictures.

data/tiles.json names the settings; each npz holds the picture and the resized picture, uint8 [H, W, 3],
and all tiles with the global one first, uint8 [n, 3, p, p], rounded from float.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmpack.geometry import Tiling
from vlmpack.images import DynamicResize, GlobalAndSplitImages, SplitImage, tile_image, to_float

DATA = Path(__file__).parent / "data"
VECTORS = json.loads((DATA / "tiles.json").read_text(encoding="utf-8"))


@pytest.fixture(params=VECTORS, ids=lambda v: f"{v['width']}x{v['height']}")
def case(request):
    vector = request.param
    with np.load(DATA / vector["file"]) as arrays:
        return vector, {name: arrays[name] for name in arrays.files}


def resizer(vector):
    return DynamicResize(vector["patch_size"], vector["max_side_len"], vector["resize_to_max_side_len"])


def chw(array):
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def levels_apart(a, b):
    return (a.int() - b.int()).abs().max().item()


def test_vectors_hold_one_tile_one_row_portrait_and_enlargement():
    assert {tuple(v["grid"]) for v in VECTORS} == {(1, 1), (1, 4), (4, 2), (2, 4)}


def test_resized_picture_is_bit_equal(case):
    vector, arrays = case
    resized = resizer(vector)(Image.fromarray(arrays["source"]))
    np.testing.assert_array_equal(np.asarray(resized), arrays["resized"])


def test_resized_tensor_is_within_two_levels_of_the_picture(case):
    vector, arrays = case
    assert levels_apart(resizer(vector)(chw(arrays["source"])), chw(arrays["resized"])) <= 2


def test_tiles_are_bit_equal_and_in_order(case):
    vector, arrays = case
    tiles, grid = SplitImage(vector["patch_size"])(chw(arrays["resized"]))
    assert list(grid) == vector["grid"]
    has_global = vector["tiles"] > grid[0] * grid[1]
    assert torch.equal(tiles, torch.from_numpy(arrays["tiles_chw_uint8"])[has_global:])


def test_float_tiles_are_equal_after_rounding_the_global_one_too(case):
    vector, arrays = case
    tiles, grid = GlobalAndSplitImages(vector["patch_size"])(to_float(chw(arrays["resized"])))
    assert list(grid) == vector["grid"]
    expected = torch.from_numpy(arrays["tiles_chw_uint8"])
    assert len(tiles) == vector["tiles"]
    assert torch.equal((tiles * 255).round().to(torch.uint8), expected)


@pytest.mark.parametrize("way", ["callables", "tile_image"])
def test_uint8_tiles_are_equal_and_their_global_one_within_a_level(case, way):
    vector, arrays = case
    expected = torch.from_numpy(arrays["tiles_chw_uint8"])
    picture = Image.fromarray(arrays["source"])
    if way == "callables":
        tiles, _ = GlobalAndSplitImages(vector["patch_size"])(resizer(vector)(picture))
    else:
        file = io.BytesIO()
        picture.save(file, "PNG")
        geometry = Tiling(
            tile_size=vector["patch_size"],
            max_side=vector["max_side_len"],
            resize_to_max_side=vector["resize_to_max_side_len"],
        ).image(vector["height"], vector["width"])
        tiles = tile_image(file.getvalue(), geometry, tile_size=vector["patch_size"])
    assert tiles.dtype == torch.uint8
    assert levels_apart(tiles, expected) <= 1
    has_global = vector["tiles"] > vector["grid"][0] * vector["grid"][1]
    assert torch.equal(tiles[has_global:], expected[has_global:])
