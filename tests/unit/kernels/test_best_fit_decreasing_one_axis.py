"""The bitmap of rooms, and best-fit decreasing on examples worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.properties.test_packing_kernels import one_axis_best_fit
from vlmpack.kernels.best_fit_decreasing_one_axis import WORD, lowest_bit, smallest_room


@pytest.mark.parametrize("index", range(32))
def test_lowest_bit_of_a_word_is_found_below_any_other_bits(index):
    assert lowest_bit(1 << index) == index
    assert lowest_bit((1 << index) | (0xFFFFFFFF << index & 0xFFFFFFFF)) == index


def bitmap(rooms, limit):
    words = limit // WORD + 1
    bits = np.zeros(words + words // WORD + 1, np.int64)
    for room in rooms:
        bits[room // WORD] |= 1 << (room % WORD)
        bits[words + room // WORD // WORD] |= 1 << (room // WORD % WORD)
    return bits, words


@pytest.mark.parametrize(
    ("need", "expected"),
    [(1, 5), (5, 5), (6, 31), (32, 32), (33, 100), (101, 2047), (2048, 4000), (4000, 4000), (4001, -1)],
)
def test_the_smallest_room_is_found_in_the_same_word_the_next_and_far_away(need, expected):
    bits, words = bitmap([5, 31, 32, 100, 2047, 4000], 4096)
    assert smallest_room(bits, words, need) == expected


def test_an_empty_bitmap_has_no_room():
    bits, words = bitmap([], 40)
    assert smallest_room(bits, words, 1) == smallest_room(bits, words, 40) == -1


def test_samples_go_longest_first_to_the_fullest_bin():
    # Limit 10. 6 opens bin 0 (4 left), 5 opens bin 1 (5 left), 4 fits both and bin 0 is fuller (0 left),
    # 3 goes to bin 1 (2 left), 2 fills bin 1.
    bins, num_bins = one_axis_best_fit(np.array([[2], [3], [4], [5], [6]], np.int64), 0, 10)
    assert (bins.tolist(), num_bins) == ([1, 1, 0, 1, 0], 2)


def test_equal_samples_fill_one_bin_after_the_other_in_their_own_order():
    bins, num_bins = one_axis_best_fit(np.full((7, 1), 3, np.int64), 0, 10)
    assert (bins.tolist(), num_bins) == ([0, 0, 0, 1, 1, 1, 2], 3)


def test_no_samples_need_no_bins():
    bins, num_bins = one_axis_best_fit(np.empty((0, 1), np.int64), 0, 10)
    assert (bins.size, num_bins) == (0, 0)
