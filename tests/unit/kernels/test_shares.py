"""What a search tree keeps of its bins."""

from __future__ import annotations

import numpy as np

from vlmpack.budget import UNLIMITED
from vlmpack.kernels.shares import SCALE, fits_bin, may_fit, measure, num_entries

BUDGET = np.array([10, 10], np.int64)


def measured(values, budget=BUDGET):
    row = np.zeros((1, num_entries(len(budget))), np.int32)
    measure(np.array([values], np.int64), 0, budget, row, 0)
    return row


def test_a_pair_turns_a_sample_away_that_only_two_bins_together_could_hold():
    # Bins with (9, 2) and (4, 7) left of (10, 10): their maxima (9, 7) would take (5, 5).
    node = np.maximum(measured([9, 2]), measured([4, 7]))
    need = measured([5, 5])
    assert (need[0, :2] <= node[0, :2]).all(), "the axes alone are not enough"
    assert not may_fit(node, 0, need)


def test_a_bin_that_holds_a_sample_is_never_turned_away():
    # (4, 7) holds (4, 7) exactly, although 0.4 and 0.7 are no binary fractions.
    assert may_fit(measured([4, 7]), 0, measured([4, 7]))
    assert not may_fit(measured([4, 7]), 0, measured([5, 7]))


def test_shares_of_axes_without_a_limit_and_with_a_limit_of_zero():
    budget = np.array([10, UNLIMITED, 0], np.int64)
    assert measured([10, UNLIMITED, 0], budget)[0, :3].tolist() == [SCALE, SCALE, 0]
    assert may_fit(measured([10, UNLIMITED, 0], budget), 0, measured([10, 5, 0], budget))


def test_a_bin_is_checked_exactly():
    rooms, costs = np.array([[3, 4]], np.int64), np.array([[3, 4], [3, 5], [4, 0]], np.int64)
    assert [bool(fits_bin(rooms, 0, costs, sample)) for sample in range(3)] == [True, False, False]
