from __future__ import annotations

import os
import platform
import subprocess
import sys

import numba
import numpy as np
import pytest
from PIL import Image

from vlmpack.kernels.resample import BLOCK_COLUMNS, BLOCK_ROWS, resample_across, resample_down
from vlmpack.kernels.taps import BITS, CUBIC, TRIANGLE, Taps, join_taps, split_weights, weigh_taps

ONE = 1 << BITS
FILTERS = {TRIANGLE: Image.Resampling.BILINEAR, CUBIC: Image.Resampling.BICUBIC}


def taps(length, num, kind=CUBIC, extent=None):
    extent = float(length if extent is None else extent)
    first = np.empty(num, np.int64)
    needed = weigh_taps(length, extent, kind, first, np.empty((num, 0), np.int32))
    weight = np.full((num, -(-needed // 4) * 4), 99, np.int32)
    assert weigh_taps(length, extent, kind, first, weight) == needed
    return first, weight


def as_taps(first, weight):
    split = np.empty(weight.shape, np.int32)
    split_weights(weight, split)
    return Taps(first, weight, split, False)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pillow(pixels, size, kind=CUBIC, box=None):
    """The picture [H, W, 3] resized by Pillow to (height, width)."""
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], FILTERS[kind], box=box))


def across(pixels, num, kind=CUBIC, extent=None):
    height, width, _ = pixels.shape
    out = np.empty((height, num, 3), np.uint8)
    made = as_taps(*taps(width, num, kind, extent))
    resample_across(pixels.reshape(height, -1), made, out.reshape(height, -1))
    return out


def down(pixels, num, kind=CUBIC, extent=None):
    height, width, _ = pixels.shape
    out = np.empty((num, width, 3), np.uint8)
    line = 3 * width
    source = np.array([height, height, 0, 0, line, line])
    made = as_taps(*taps(height, num, kind, extent))
    resample_down(pixels.reshape(-1), source, made, 0, num, 0, out.reshape(-1), np.array([0, line, 1]))
    return out


class TestWeighTaps:
    def test_enlarging_twofold_with_the_triangle(self):
        # Outputs lie at 0.25, 0.75, 1.25, 1.75; inputs at 0.5 and 1.5. The outer two see one input only,
        # the inner two are 0.25 and 0.75 away from the two.
        first, weight = taps(2, 4, TRIANGLE)
        assert first.tolist() == [0, 0, 0, 1]
        quarter = ONE // 4
        assert weight.tolist() == [
            [ONE, 0, 0, 0],
            [3 * quarter, quarter, 0, 0],
            [quarter, 3 * quarter, 0, 0],
            [ONE, 0, 0, 0],
        ]

    def test_halving_with_the_triangle(self):
        # The filter is widened twofold: inputs 0.5 and 1.5 from the centre weigh 0.75 and 0.25 before their
        # sum is made 1: (1, 3, 3, 1) / 8, and (3, 3, 1) / 7 where the picture ends.
        first, weight = taps(6, 3, TRIANGLE)
        assert first.tolist() == [0, 1, 3]
        assert weight[1].tolist() == [ONE // 8, 3 * ONE // 8, 3 * ONE // 8, ONE // 8]
        # 3/7 and 1/7 of 2^22 are 1797558.86 and 599186.29, rounded
        assert weight[0].tolist() == [1797559, 1797559, 599186, 0]
        assert weight[2].tolist() == [599186, 1797559, 1797559, 0]

    def test_the_cubic_of_a_point_in_the_middle(self):
        # Doubling 8 pixels: output 5 lies at 2.75, its inputs 1.5, 2.5, 3.5, 4.5 at distances 1.25, 0.25,
        # 0.75, 1.75. Keys' cubic with a = -1/2: 1.5 d^3 - 2.5 d^2 + 1 below 1, and below 2
        # -0.5 d^3 + 2.5 d^2 - 4 d + 2. In 128ths: -9, 111, 29, -3.
        first, weight = taps(8, 16)
        assert first[5] == 1
        assert (weight[5] * 128 / ONE).tolist() == [-9, 111, 29, -3]

    @pytest.mark.parametrize("kind", [TRIANGLE, CUBIC])
    @pytest.mark.parametrize(("length", "num"), [(1, 1), (1, 7), (5, 5), (13, 40), (100, 9), (7, 6)])
    def test_weights_sum_to_one_and_stay_inside(self, kind, length, num):
        first, weight = taps(length, num, kind)
        used = np.count_nonzero(weight, axis=1)
        assert (np.abs(weight.sum(axis=1) - ONE) <= weight.shape[1]).all()
        assert (first >= 0).all()
        assert (first + used <= length).all()
        assert (np.diff(first) >= 0).all()

    def test_without_room_for_weights_nothing_is_written(self):
        first = np.full(4, -7, np.int64)
        # Output 1 lies at 3 and reaches 2 x 2 pixels each way: inputs 0 to 6.
        assert weigh_taps(8, 8.0, CUBIC, first, np.empty((4, 0), np.int32)) == 7
        assert first.tolist() == [-7] * 4


MANY_TAPS = pytest.param(
    2100, 5, marks=pytest.mark.skipif(numba.config.DISABLE_JIT, reason="takes minutes when interpreted")
)
SIZES = [(1, 1), (1, 5), (2, 3), (9, 9), (20, 8), (30, 4), (7, 50), (40, 1)]


class TestOneAxis:
    @pytest.mark.parametrize("kind", [TRIANGLE, CUBIC])
    @pytest.mark.parametrize(("length", "num"), SIZES)
    def test_each_axis_is_pillows_bit_for_bit(self, kind, length, num):
        wide, tall = noise(3, length, 3), noise(length, 4, 3)
        np.testing.assert_array_equal(across(wide, num, kind), pillow(wide, (3, num), kind))
        np.testing.assert_array_equal(down(tall, num, kind), pillow(tall, (num, 4), kind))

    def test_more_rows_and_columns_than_a_block_holds(self):
        pixels = noise(BLOCK_ROWS + 9, 6, 3)
        num = BLOCK_COLUMNS + 3
        np.testing.assert_array_equal(across(pixels, num), pillow(pixels, (BLOCK_ROWS + 9, num)))

    @pytest.mark.parametrize("kind", [TRIANGLE, CUBIC])
    @pytest.mark.parametrize(("length", "num"), [(40, 33), (9, 150), (150, 9), MANY_TAPS])
    def test_lines_longer_than_a_vector_are_pillows_bit_for_bit(self, kind, length, num):
        # 67 columns are three vectors of 64 bytes and a part; 5 of 2,100 need more taps than vectors can sum.
        wide, tall = noise(67, length, 3), noise(length, 67, 3)
        np.testing.assert_array_equal(across(wide, num, kind), pillow(wide, (67, num), kind))
        np.testing.assert_array_equal(down(tall, num, kind), pillow(tall, (num, 67), kind))

    @pytest.mark.parametrize("times", [2, 4])
    def test_weights_without_low_parts_take_the_short_way(self, times):
        _, weight = taps(64 * times, 64, TRIANGLE)
        assert not (weight[2:-2] & 0x7FFF).any()
        tall = noise(64 * times, 67, 3)
        np.testing.assert_array_equal(down(tall, 64, TRIANGLE), pillow(tall, (64, 67), TRIANGLE))

    def test_some_outputs_of_some_rows(self):
        pixels = noise(30, 67, 3)
        made = as_taps(*taps(30, 50))
        start = int(made.first[20])
        out = np.empty((10, 201), np.uint8)
        source = np.array([30 - start, 30, 0, 0, 201, 201])
        resample_down(
            pixels[start:].reshape(-1), source, made, 20, 30, start, out.reshape(-1), np.array([0, 201, 1])
        )
        np.testing.assert_array_equal(out.reshape(10, 67, 3), pillow(pixels, (50, 67))[20:30])

    def test_extreme_levels_and_weights_do_not_overflow(self):
        # White and black columns in turn under 120 taps: the largest sums that a low part can come to.
        tall = np.zeros((480, 67, 3), np.uint8)
        tall[::2] = 255
        for kind in (TRIANGLE, CUBIC):
            np.testing.assert_array_equal(down(tall, 8, kind), pillow(tall, (8, 67), kind))
            np.testing.assert_array_equal(down(tall + 255, 8, kind), pillow(tall + 255, (8, 67), kind))

    def test_overshoot_is_clipped(self):
        stripe = np.zeros((1, 8, 3), np.uint8)
        stripe[:, 4:] = 255
        levels = across(stripe, 16)[0, :, 0]
        assert levels.min() == 0
        assert levels.max() == 255
        np.testing.assert_array_equal(levels, pillow(stripe, (1, 16))[0, :, 0])

    def test_a_picture_that_was_rounded_up_to_whole_pixels(self):
        pixels = noise(5, 11, 3)
        expected = pillow(pixels, (5, 20), box=(0, 0, 10.5, 5))
        np.testing.assert_array_equal(across(pixels, 20, extent=10.5), expected)
        expected = pillow(pixels, (9, 11), box=(0, 0, 11, 4.5))
        np.testing.assert_array_equal(down(pixels, 9, extent=4.5), expected)


class TestTiles:
    def test_rows_are_written_where_tiles_want_them(self):
        # 2 tiles of 3 columns side by side: a row of the picture is a row of each.
        pixels = noise(4, 6, 3)
        out = np.full((2, 5, 3, 3), 7, np.uint8)
        source = np.array([4, 4, 0, 9, 18, 9])
        made = as_taps(*taps(4, 5))
        resample_down(pixels.reshape(-1), source, made, 0, 5, 0, out.reshape(-1), np.array([45, 9, 2]))
        expected = pillow(pixels, (5, 6)).reshape(5, 2, 3, 3).transpose(1, 0, 2, 3)
        np.testing.assert_array_equal(out, expected)

    def test_rows_are_read_from_where_tiles_have_them(self):
        # A grid of 2 x 2 tiles of 3 x 3 pixels, shrunk to 2 rows of 6 pixels.
        picture = noise(6, 6, 3)
        tiles = np.ascontiguousarray(picture.reshape(2, 3, 2, 9).transpose(0, 2, 1, 3))
        out = np.empty((2, 6, 3), np.uint8)
        source = np.array([6, 3, 54, 27, 9, 9])
        made = as_taps(*taps(6, 2, TRIANGLE))
        resample_down(tiles.reshape(-1), source, made, 0, 2, 0, out.reshape(-1), np.array([9, 18, 2]))
        np.testing.assert_array_equal(out, pillow(picture, (2, 6), TRIANGLE))

    def test_taps_behind_the_last_row_are_not_read(self):
        # One row and weights for four, of which three are 0: the next memory belongs to somebody else.
        memory = np.full(12, 200, np.uint8)
        memory[:3] = [10, 20, 30]
        out = np.zeros(3, np.uint8)
        weight = np.array([[ONE, 0, 0, 0]], np.int32)
        source = np.array([1, 1, 0, 3, 3, 3])
        made = as_taps(np.zeros(1, np.int64), weight)
        resample_down(memory[:3], source, made, 0, 1, 0, out, np.array([3, 3, 1]))
        assert out.tolist() == [10, 20, 30]


@pytest.mark.slow
@pytest.mark.parametrize("features", ["+avx2", "+sse4.2"])
def test_other_processors_make_the_same_pixels(features, tmp_path):
    """In a process of its own, whose compiler knows no wider vectors."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        pytest.skip("the features are those of x86-64")
    pixels, made = noise(67, 90, 3), tmp_path / "made.npz"
    program = (
        "import sys, numpy as np\n"
        "from vlmpack.kernels.vectors import VECTOR_BYTES\n"
        "from tests.unit.kernels.test_resample import across, down, noise\n"
        "pixels = noise(67, 90, 3)\n"
        "np.savez(sys.argv[1], bytes=VECTOR_BYTES, across=across(pixels, 40), down=down(pixels, 150))\n"
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    subprocess.run([sys.executable, "-c", program, str(made)], check=True, env=environment, timeout=100)
    found = np.load(made)
    assert found["bytes"] == (32 if features == "+avx2" else 0)
    np.testing.assert_array_equal(found["across"], pillow(pixels, (67, 40)))
    np.testing.assert_array_equal(found["down"], pillow(pixels, (150, 90)))


def dense(first, weight, length):
    """The same taps as a matrix [O, length] of fractions."""
    matrix = np.zeros((len(first), length + weight.shape[1]))
    for row, (start, weights) in enumerate(zip(first, weight, strict=True)):
        matrix[row, start : start + len(weights)] = weights / ONE
    return matrix[:, :length]


class TestJoinTaps:
    @pytest.mark.parametrize(("length", "between", "num"), [(5, 16, 4), (3, 12, 12), (30, 40, 10), (1, 8, 2)])
    def test_they_do_what_two_resizes_do(self, length, between, num):
        inner, outer = taps(length, between), taps(between, num, TRIANGLE)
        first = np.empty(num, np.int64)
        needed = join_taps(*inner, *outer, first, np.empty((num, 0), np.int32))
        weight = np.empty((num, needed), np.int32)
        assert join_taps(*inner, *outer, first, weight) == needed
        expected = dense(*outer, between) @ dense(*inner, length)
        # Each weight is rounded once, to half a unit; what it is made of was rounded before.
        assert np.abs(dense(first, weight, length) - expected).max() * ONE <= 1
        assert (first >= 0).all()

    def test_without_room_for_weights_nothing_is_written(self):
        inner, outer = taps(4, 8), taps(8, 4, TRIANGLE)
        first = np.full(4, -7, np.int64)
        assert join_taps(*inner, *outer, first, np.empty((4, 0), np.int32)) <= 4
        assert first.tolist() == [-7] * 4
