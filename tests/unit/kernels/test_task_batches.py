"""Batches by priority equal those of scoring every candidate for every place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import task_batches
from vlmpack.batching.sampler import TaskItems
from vlmpack.kernels.task_batches import lowest_fitting, nearest_left


@given(
    samples=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=30),
    limit=st.integers(23, 90),
    size=st.integers(1, 9),
    weight=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    priority=st.sampled_from(["legacy", "bestfit"]),
)
def test_batches_are_those_of_the_formula_scanned_over_all_samples(samples, limit, size, weight, priority):
    tasks = [task for task, _ in samples]
    costs = [cost for _, cost in samples]
    items = TaskItems(cost_N=np.array(costs, np.int64), task_N=np.array(tasks, np.int64))
    found = items.batches(
        np.arange(len(samples)),
        fixed=3,
        limit=limit,
        max_batch=size,
        weight=weight,
        priority=priority,
    )
    expected = task_batches(
        costs,
        [str(task) for task in tasks],
        fixed=3,
        limit=limit,
        max_batch=size,
        weight=weight,
        legacy=priority == "legacy",
    )
    assert [batch.tolist() for batch in found] == expected


def test_a_batch_worked_out_by_hand():
    # limit 10, half diversity. Empty batch: every diversity is 1, so the fullest wins: 6 of task 0.
    # Then task 1 has diversity 1 and task 0 has 0: 3 of task 1 (0.5 * 0.9 + 0.5) beats 4 of task 0 (0.5 * 1).
    # One is left: 1 of task 0 fits. The 4 begins the next batch.
    items = TaskItems(cost_N=np.array([6, 4, 3, 1], np.int64), task_N=np.array([0, 0, 1, 0], np.int64))
    found = items.batches(np.arange(4), fixed=0, limit=10, max_batch=9, weight=0.5, priority="bestfit")
    assert [batch.tolist() for batch in found] == [[0, 2, 3], [1]]


@pytest.mark.parametrize(("place", "expected"), [(5, 5), (4, 2), (3, 2), (2, 2), (1, 0), (0, 0)])
def test_the_nearest_place_that_is_left_is_found_over_those_taken(place, expected):
    below = np.arange(-1, 6)
    for taken in (1, 3, 4):
        below[taken + 1] = taken - 1
    assert nearest_left(below, place, 0) == expected
    assert nearest_left(below, place, 0) == expected  # and again, over the shortened path


def test_a_tasks_first_place_is_where_the_search_ends():
    below = np.arange(-1, 4)
    below[2 + 1] = 1
    assert nearest_left(below, 2, 2) == 1  # one below the first: nothing is left


def test_the_lowest_position_that_fits_is_found():
    # leaves 7 5 9 2: a tree of minima over them
    least = np.array([0, 2, 5, 2, 7, 5, 9, 2], np.int64)
    assert [lowest_fitting(least, 4, room) for room in (1, 2, 4, 5, 7, 9)] == [-1, 3, 3, 1, 0, 0]
