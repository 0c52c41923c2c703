from __future__ import annotations

import numpy as np

from vlmpack.kernels.planes import to_planes, to_unit_planes


def levels(num, height, width):
    return np.random.default_rng(0).integers(0, 256, (num, height, 3 * width), dtype=np.uint8)


def test_colours_are_parted():
    pixels = np.array([[[1, 2, 3, 4, 5, 6]]], np.uint8)  # two pixels
    out = np.zeros((1, 3, 1, 2), np.uint8)
    to_planes(pixels, out)
    assert out.tolist() == [[[[1, 4]], [[2, 5]], [[3, 6]]]]


def test_several_tiles_keep_their_rows():
    pixels = levels(2, 3, 5)
    out = np.zeros((2, 3, 3, 5), np.uint8)
    to_planes(pixels, out)
    np.testing.assert_array_equal(out, pixels.reshape(2, 3, 5, 3).transpose(0, 3, 1, 2))


def test_floats_are_divided_by_255_and_rounded_once():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 1, -1)
    out = np.zeros((1, 3, 1, 256), np.float32)
    to_unit_planes(pixels, out)
    expected = np.array([level / 255 for level in range(256)], np.float32)
    for colour in range(3):
        np.testing.assert_array_equal(out[0, colour, 0], expected)


def test_floats_of_several_tiles():
    pixels = levels(2, 3, 5)
    out = np.zeros((2, 3, 3, 5), np.float32)
    to_unit_planes(pixels, out)
    parted = pixels.reshape(2, 3, 5, 3).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(out, (parted / 255).astype(np.float32))
