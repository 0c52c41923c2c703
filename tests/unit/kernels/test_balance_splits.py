"""Splitting pairs of steps, against its slow version and by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests import reference_balance as reference
from tests.unit.kernels.test_balance_swaps import Window, windows
from vlmpack.kernels.balance_splits import split_pairs

DIRECTIONS = [(1, 0), (0, 1), (1, 1), (-1, 1)]


def run(window: Window, order: list[int], *, reach: int = 1 << 30, max_sweeps: int = 99):
    loads = np.array(window.loads, np.int64)
    directions = np.array([direction[: loads.shape[1]] for direction in DIRECTIONS], np.int64)
    slots = np.array(order, np.int64)
    sweeps = split_pairs(loads, loads, slots, window.num_ranks, directions, reach, max_sweeps)
    return slots.tolist(), sweeps


@given(window=windows(max_packs=16), reach=st.sampled_from([1, 2, 100]), seed=st.integers(0, 9))
def test_the_splits_are_those_of_the_slow_version(window, reach, seed):
    order = np.random.default_rng(seed).permutation(len(window.loads)).tolist()
    slots, _ = run(window, order, reach=reach)
    directions = [direction[: len(window.loads[0])] for direction in DIRECTIONS]
    assert slots == reference.split_pairs(
        window.loads, window.loads, order, window.num_ranks, directions, reach
    )


@given(window=windows())
def test_nothing_is_lost_and_no_window_gets_less_even(window):
    order = list(range(len(window.loads)))
    slots, sweeps = run(window, order)
    assert sorted(slots) == order
    assert 1 <= sweeps < 99
    before, after = (
        reference.objective(window.loads, packs, window.num_ranks, 1) for packs in (order, slots)
    )
    assert after <= before


def test_two_steps_change_two_packs_each_where_no_swap_of_one_helps():
    # Two loads. Steps {(1, 9), (1, 9), (9, 1), (9, 1)} twice: largest / mean 9 / 5 for both loads in both
    # steps, 7.2 in all. One swap gives (1, 9) x 3 and (9, 1): 9 / 3 and 9 / 7, and the mirror image: 8.57.
    # Split along the first load, each step has one kind: 1 for all, 4.
    window = Window([[1, 9], [1, 9], [9, 1], [9, 1]] * 2, num_ranks=4, batch_size=1)
    slots, sweeps = run(window, list(range(8)))
    assert slots == [0, 1, 4, 5, 2, 3, 6, 7]
    assert sweeps == 2
    assert reference.swap_to_balance(window.loads, list(range(8)), 4, 1, 99) == list(range(8))


def test_it_stops_after_as_many_sweeps_as_it_may():
    window = Window([[1], [9], [1], [9]], num_ranks=2, batch_size=1)
    assert run(window, [0, 1, 2, 3], max_sweeps=1) == ([0, 2, 1, 3], 1)
    assert run(window, [0, 1, 2, 3], max_sweeps=0)[0] == [0, 1, 2, 3]
