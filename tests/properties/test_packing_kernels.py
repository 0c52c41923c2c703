"""Every packing kernel against its slow version, and the laws that any packing keeps.

These tests also run with NUMBA_BOUNDSCHECK=1, where a read past an array's end raises, and with
NUMBA_DISABLE_JIT=1, where the kernels are ordinary Python.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests import reference
from tests.packing_problems import PackingProblem, assert_valid, problems
from vlmpack import kernels
from vlmpack.kernels.best_fit_decreasing_one_axis import WORD
from vlmpack.kernels.shares import num_entries
from vlmpack.kernels.totals import HIGH, LOW, SUM, axis_totals, pack_by_pack, pack_loads, relabel
from vlmpack.packing.engine import WindowEngine


def ordered(problem, decreasing):
    costs = problem.cost_array
    return np.argsort(-costs[:, 0], kind="stable") if decreasing else np.arange(len(costs))


def run(name, problem, order, num_open=0):
    bins, budget = np.full(len(problem.costs), -1, np.int64), problem.budget_array
    if name == "next_fit":
        num_bins = kernels.next_fit(problem.cost_array, order, budget, np.zeros_like(budget), bins)
    elif name == "worst_fit":
        entries = num_entries(len(budget))
        num_bins = kernels.worst_fit_decreasing(problem.cost_array, order, budget, entries, num_open, bins)
    else:
        kernel = getattr(kernels, name)
        num_bins = kernel(problem.cost_array, order, budget, num_entries(len(budget)), bins)
    return bins.tolist(), num_bins


@pytest.mark.parametrize("decreasing", [False, True], ids=["as they come", "longest first"])
@pytest.mark.parametrize("name", ["next_fit", "first_fit", "best_fit"])
@given(problem=problems())
def test_textbook_kernels_equal_their_slow_versions(name, decreasing, problem):
    order = ordered(problem, decreasing)
    bins, num_bins = run(name, problem, order)
    assert bins == getattr(reference, name)(problem.costs, order.tolist(), problem.budget)
    assert_valid(problem, bins, num_bins)


@given(problem=problems(), num_open=st.integers(0, 20))
def test_worst_fit_decreasing_equals_its_slow_version(problem, num_open):
    order = ordered(problem, decreasing=True)
    bins, num_bins = run("worst_fit", problem, order, num_open)
    assert bins == reference.worst_fit(problem.costs, order.tolist(), problem.budget, num_open)
    assert num_bins == max([num_open, *(bin_id + 1 for bin_id in bins)])


def one_axis_best_fit(costs, axis, limit):
    words, n = limit // WORD + 1, len(costs)
    bins, starts, places = np.full(n, -1, np.int64), np.zeros(limit + 2, np.int64), np.full(n, -1, np.int32)
    num_bins = kernels.best_fit_decreasing_one_axis(
        costs,
        axis,
        limit,
        starts,
        np.zeros(words + words // WORD + 1, np.int64),
        np.empty(limit + 1, np.int32),
        np.empty(n, np.int32),
        places,
    )
    loads = np.zeros(num_bins, np.int64)
    kernels.place_loads(starts, places, loads)
    kernels.take_places(costs, axis, starts, places, bins)
    assert loads.tolist() == np.bincount(bins, weights=costs[:, axis], minlength=num_bins).tolist()
    return bins, num_bins


@given(
    limit=st.one_of(st.integers(1, 70), st.integers(1000, 5000)),
    shares=st.lists(st.floats(0, 1), max_size=60),
    axis=st.integers(0, 2),
)
def test_one_axis_best_fit_decreasing_equals_its_slow_version(limit, shares, axis):
    lengths = [max(1, round(share * limit)) for share in shares]
    costs = np.zeros((len(lengths), 3), np.int64)
    costs[:, axis] = lengths
    bins, num_bins = one_axis_best_fit(costs, axis, limit)
    assert bins.tolist() == reference.best_fit_decreasing_one_axis(lengths, limit)
    assert_valid(PackingProblem([limit], [[length] for length in lengths]), bins.tolist(), num_bins)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), data=st.data())
def test_one_axis_best_fit_decreasing_does_not_depend_on_the_order_of_the_samples(lengths, data):
    shuffled = data.draw(st.permutations(lengths))
    loads = []
    for version in (lengths, shuffled):
        bins, num_bins = one_axis_best_fit(np.array(version, np.int64)[:, None], 0, 300)
        loads.append(sorted(np.bincount(bins, weights=version, minlength=num_bins).tolist()))
    assert loads[0] == loads[1]


@pytest.mark.parametrize("name", ["next_fit", "first_fit", "best_fit", "worst_fit"])
@given(problem=problems(), factor=st.integers(2, 1000))
def test_textbook_kernels_do_not_depend_on_the_unit(name, problem, factor):
    if max(problem.budget) >= 1 << 50:
        problem = PackingProblem([min(limit, 1 << 40) for limit in problem.budget], problem.costs)
    scaled = PackingProblem(
        [factor * limit for limit in problem.budget], [[factor * c for c in cost] for cost in problem.costs]
    )
    order = ordered(problem, decreasing=True)
    assert run(name, problem, order, 2) == run(name, scaled, order, 2)


def window_bins(problem, lookahead, tries, seed, balance=None):
    engine = WindowEngine(problem.budget_array, lookahead=lookahead, tries=tries, seed=seed, balance=balance)
    bins = np.full(len(problem.costs), -1, np.int64)
    order = np.arange(len(problem.costs), dtype=np.int32)
    return bins, engine.pack_all(problem.cost_array, order, bins), engine


def slow_window_bins(problem, lookahead, tries, seed, balance=None):
    costs = [[*cost, cost[0] ** 2] for cost in problem.costs] if balance else problem.costs
    window = reference.SlowWindow(problem.budget, lookahead, tries, seed, len(problem.budget) + bool(balance))
    bins, entered = [-1] * len(costs), 0
    while True:
        while entered < len(costs) and len(window.age) < lookahead:
            window.insert(costs[entered], entered)
            entered += 1
        if not window.age:
            return bins, window
        for arrival in window.next_pack():
            bins[arrival] = window.packs - 1


@given(
    problem=problems(),
    lookahead=st.integers(1, 40),
    tries=st.integers(1, 6),
    seed=st.integers(0, 2**31 - 1),
    balance=st.sampled_from([None, "attention"]),
)
def test_the_window_packer_equals_its_slow_version(problem, lookahead, tries, seed, balance):
    bins, num_packs, engine = window_bins(problem, lookahead, tries, seed, balance)
    expected, window = slow_window_bins(problem, lookahead, tries, seed, balance)
    assert bins.tolist() == expected
    event(f"indexed: {'one axis' if window.fine == window.coarse else 'two axes'}")
    event(f"classes: {'exact' if window.blur == 0 else 'slices'}")
    assert_valid(problem, bins.tolist(), num_packs)
    assert engine.num_waiting == engine.load == 0


@given(problem=problems(min_samples=1), lookahead=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_no_sample_waits_for_more_packs_than_the_window_has_slots(problem, lookahead, seed):
    _, num_packs, engine = window_bins(problem, lookahead, 2, seed)
    assert engine.longest_wait < lookahead
    assert engine.longest_wait < num_packs


@given(problem=problems(max_axes=2), power=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_window_packer_does_not_depend_on_the_unit(problem, power, seed):
    # Two axes that both bind and whose levels are few: then no limit is cut into slices.
    pairs = [(1 + 31 * cost[0] // problem.budget[0], 1 + cost[-1] % 9) for cost in problem.costs]
    problem = PackingProblem([32, 12], [list(pair) for pair in pairs])
    scaled = PackingProblem([32 << power, 12 << power], [[a << power, b << power] for a, b in pairs])
    bins, _, _ = window_bins(problem, 16, 3, seed)
    assert bins.tolist() == window_bins(scaled, 16, 3, seed)[0].tolist()


@given(problem=problems(min_samples=1), data=st.data())
def test_totals_and_loads_are_sums(problem, data):
    costs = problem.cost_array
    totals = np.zeros((3, costs.shape[1]), np.int64)
    axis_totals(costs, totals)
    assert totals[[LOW, HIGH, SUM]].tolist() == [
        [pick(column) for column in zip(*problem.costs, strict=True)] for pick in (min, max, sum)
    ]
    num_packs = data.draw(st.integers(1, 8))
    ids = data.draw(st.lists(st.integers(0, num_packs - 1), min_size=len(costs), max_size=len(costs)))
    packs, loads = np.array(ids, np.int64), np.zeros((num_packs, costs.shape[1]), np.int64)
    pack_loads(costs, packs, loads)
    members = [[s for s, p in enumerate(ids) if p == pack] for pack in range(num_packs)]
    assert loads.tolist() == [
        [sum(problem.costs[s][axis] for s in pack) for axis in range(costs.shape[1])] for pack in members
    ]
    starts, samples = np.zeros(num_packs + 1, np.int64), np.empty(len(costs), np.int64)
    pack_by_pack(packs, starts, samples)
    assert [samples[a:b].tolist() for a, b in pairwise(starts)] == members
    names = np.array(data.draw(st.permutations(range(num_packs))), np.int64)
    relabel(packs, names)
    assert packs.tolist() == [names[p] for p in ids]
