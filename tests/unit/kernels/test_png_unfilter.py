from __future__ import annotations

import numpy as np
import pytest

from vlmpack.kernels.png_unfilter import unfilter_png


def filtered_by_hand(rows, depth, kinds):
    """Filter rows of bytes as section 9.2 of the PNG specification says, byte by byte."""
    lines = []
    for y, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        line = [kind]
        for i, value in enumerate(row):
            a = row[i - depth] if i >= depth else 0
            b = rows[y - 1][i] if y else 0
            c = rows[y - 1][i - depth] if y and i >= depth else 0
            estimate = a + b - c
            nearest = min((abs(estimate - a), 0, a), (abs(estimate - b), 1, b), (abs(estimate - c), 2, c))[2]
            line.append((value - [0, a, b, (a + b) // 2, nearest][kind]) % 256)
        lines.append(line)
    return np.array(lines, np.uint8)


def unfiltered(filtered, depth):
    num_rows, num_bytes = filtered.shape[0], filtered.shape[1] - 1
    out = np.full((num_rows, num_bytes // depth * 3), 123, np.uint8)
    filtered.flags.writeable = False
    line = np.full((2, num_bytes), 77, np.uint8)
    return unfilter_png(filtered, depth, line, out), out


@pytest.mark.parametrize("kinds", [[k] * 4 for k in range(5)] + [[4, 3, 2, 1, 0, 1, 2, 3, 4]])
@pytest.mark.parametrize("smooth", [False, True])
def test_every_filter_of_rgb_rows(kinds, smooth):
    rng = np.random.default_rng(len(kinds))
    rows = rng.integers(0, 256, (len(kinds), 15))
    if smooth:  # near ties, where the order of choice counts
        rows = rows // 64
    known, out = unfiltered(filtered_by_hand(rows.tolist(), 3, kinds), 3)
    assert known
    np.testing.assert_array_equal(out, rows)


@pytest.mark.parametrize("kinds", [[k] * 3 for k in range(5)] + [[1, 4, 3, 2]])
def test_every_filter_of_rows_with_opacity(kinds):
    rows = np.random.default_rng(1).integers(0, 256, (len(kinds), 20))
    rows[:, 3::4] = 255
    known, out = unfiltered(filtered_by_hand(rows.tolist(), 4, kinds), 4)
    assert known
    np.testing.assert_array_equal(out.reshape(-1, 3), rows.reshape(-1, 4)[:, :3])


def test_transparency_is_laid_over_white():
    # opaque; invisible; half black: (0 x 128 + 255 x 127) / 255 = 127; a quarter of 200:
    # (200 x 64 + 255 x 191) / 255 = 241.2
    row = [10, 20, 30, 255, 10, 20, 30, 0, 0, 0, 0, 128, 200, 200, 200, 64]
    known, out = unfiltered(np.array([[0, *row]], np.uint8), 4)
    assert known
    assert out.reshape(-1, 3).tolist() == [[10, 20, 30], [255] * 3, [127] * 3, [241] * 3]


@pytest.mark.parametrize("kind", [5, 255])
def test_an_unknown_filter_is_reported(kind):
    known, out = unfiltered(np.array([[0, 1, 2, 3], [kind, 1, 2, 3]], np.uint8), 3)
    assert not known
    assert out[0].tolist() == [1, 2, 3]
