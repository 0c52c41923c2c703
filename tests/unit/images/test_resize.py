from __future__ import annotations

import pickle
from enum import Enum

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.images.pictures import picture
from vlmpack.errors import ConfigError
from vlmpack.images import DynamicResize


class InterpolationMode(Enum):
    """As torchvision spells it."""

    BICUBIC = "bicubic"
    NEAREST = "nearest"


def chw(image):
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


@pytest.mark.parametrize(
    ("size", "enlarge", "resized"),
    [
        # Tiles of 32, at most 128.
        ((20, 50), False, (32, 64)),  # 50 -> 64, x 1.28; 20 -> 25.6 -> 32
        ((20, 50), True, (64, 128)),  # 50 -> 128, x 2.56; 20 -> 51.2 -> 64
        ((300, 100), False, (128, 64)),  # 300 -> 128, x 0.427; 100 -> 42.7 -> 64
        ((32, 32), False, (32, 32)),
        ((1, 1), False, (32, 32)),
        ((1, 500), True, (32, 128)),
    ],
)
def test_pictures_and_tensors_get_the_same_size(size, enlarge, resized):
    resize = DynamicResize(32, 128, enlarge)
    image = picture(*size)
    assert resize.target(*size) == resized
    assert resize(image).size == (resized[1], resized[0])
    assert resize(chw(image)).shape == (3, *resized)
    assert resize(chw(image)[None].repeat(2, 1, 1, 1)).shape == (2, 3, *resized)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_pictures_go_through_pillows_bicubic(mode):
    image = picture(90, 70, mode)
    expected = image.resize((64, 64), Image.Resampling.BICUBIC)  # 90 -> 64, x 0.71; 70 -> 49.8 -> 64
    found = DynamicResize(32, 64)(image)
    assert found.mode == mode
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["1", "P"])
def test_palettes_become_colours_instead_of_mixing_their_numbers(mode):
    image = picture(40, 40, mode)
    found = DynamicResize(32, 64)(image)
    np.testing.assert_array_equal(found, image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))


def test_uint8_tensors_stay_uint8_and_close_to_pillow():
    image = picture(200, 300)
    for resize in (DynamicResize(32, 128), DynamicResize(128, 512, True)):
        found = resize(chw(image))
        assert found.dtype == torch.uint8
        assert (found.int() - chw(resize(image)).int()).abs().max() <= 2


def test_float_tensors_stay_float_and_close_to_pillow():
    image = picture(200, 300)
    resize = DynamicResize(32, 128)
    found = resize(chw(image).float().div(255))
    assert found.dtype == torch.float32
    assert (found * 255 - chw(resize(image)).float()).abs().mean() < 0.5
    torch.testing.assert_close(resize(chw(image)[None].double())[0], resize(chw(image).double()))


@pytest.mark.parametrize("given", ["bilinear", Image.Resampling.BILINEAR])
def test_bilinear_can_be_asked_for(given):
    image = picture(90, 70)
    resize = DynamicResize(32, 64, interpolation=given)
    np.testing.assert_array_equal(resize(image), image.resize((64, 64), Image.Resampling.BILINEAR))
    assert (resize(chw(image)).int() - chw(resize(image)).int()).abs().max() <= 2


def test_an_enum_member_is_taken_by_its_value():
    assert DynamicResize(32, 64, interpolation=InterpolationMode.BICUBIC).interpolation == "bicubic"
    assert DynamicResize(32, 64, interpolation=Image.Resampling.BICUBIC).interpolation == "bicubic"


@pytest.mark.parametrize(
    "given", ["nearest", "cubic", InterpolationMode.NEAREST, Image.Resampling.LANCZOS, 3]
)
def test_other_filters_are_refused(given):
    with pytest.raises(ConfigError, match="interpolation must be one of bicubic, bilinear"):
        DynamicResize(32, 64, interpolation=given)


@pytest.mark.parametrize(("tile", "side"), [(224, 1024), (512, 256), (0, 512), (512, 0)])
def test_tiles_that_do_not_fill_the_largest_side_are_refused_at_construction(tile, side):
    with pytest.raises(ConfigError):
        DynamicResize(tile, side)


@pytest.mark.parametrize("shape", [(4, 4), (1, 2, 3, 4, 4), (3, 0, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ConfigError, match=r"\[C, H, W\]"):
        DynamicResize(32, 64)(torch.zeros(shape))


def test_it_travels_to_workers_and_says_what_it_is():
    resize = pickle.loads(pickle.dumps(DynamicResize(32, 128, True)))  # noqa: S301
    assert repr(resize) == (
        "DynamicResize(patch_size=32, max_side_len=128, resize_to_max_side_len=True, interpolation='bicubic')"
    )
    assert resize(picture(20, 50)).size == (128, 64)
