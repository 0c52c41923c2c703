"""The stream packer: nothing lost, no budget exceeded, bounded delay, the same packs after any restart."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.packing_problems import assert_valid, problems
from vlmpack.errors import BudgetError, ConfigError
from vlmpack.packing.methods import METHODS
from vlmpack.packing.plan import plan
from vlmpack.packing.stream import StreamPacker

WINDOWED = ("fast", "balanced", "best")


@st.composite
def settings(draw):
    method = draw(st.sampled_from(METHODS))
    return {
        "method": method,
        "lookahead": draw(st.integers(1, 30)),
        "seed": draw(st.integers(0, 2**40)),
        "max_waiting_tokens": draw(st.sampled_from([None, None, 1, 50, 5000])),
        "balance": draw(st.sampled_from([None, "attention"])) if method in (*WINDOWED, "auto") else None,
        "delta": draw(st.integers(0, 3)),
    }


def pushed(packer, costs):
    return [packer.push(cost) for cost in costs]


def flat(packs):
    return [pack for group in packs for pack in group]


@given(problem=problems(), settings=settings())
def test_each_sample_comes_out_once_within_every_budget_and_in_time(problem, settings):
    packer = StreamPacker(problem.budget, **settings)
    groups = []
    for num_pushed, cost in enumerate(problem.costs, 1):
        groups.append(packer.push(cost))
        assert packer.num_arrived == num_pushed
        assert packer.num_waiting == num_pushed - sum(map(len, flat(groups)))
        assert packer.num_waiting < settings["lookahead"]
        waiting = set(range(num_pushed)) - {arrival for pack in flat(groups) for arrival in pack}
        limit = settings["max_waiting_tokens"]
        assert limit is None or sum(problem.costs[arrival][0] for arrival in waiting) < limit
    packs = flat(groups) + packer.flush()
    assert all(pack == sorted(pack) for pack in packs)
    bins = {arrival: number for number, pack in enumerate(packs) for arrival in pack}
    assert_valid(problem, [bins[arrival] for arrival in range(len(problem.costs))], len(packs))
    assert packer.num_packs == len(packs)
    assert packer.num_waiting == 0
    assert packer.longest_wait <= settings["lookahead"]
    assert packer.flush() == []


@given(problem=problems(min_samples=1), settings=settings())
def test_the_reported_delays_are_the_longest_ones(problem, settings):
    packer = StreamPacker(problem.budget, **settings)
    groups = [*pushed(packer, problem.costs), packer.flush()]
    last = len(problem.costs) - 1
    delays = [
        min(now, last) - arrival for now, packs in enumerate(groups) for pack in packs for arrival in pack
    ]
    assert packer.longest_delay == max(delays)
    before = np.cumsum([0, *map(len, groups)])  # packs out when each sample came
    waits = [
        before[now] + index - before[arrival]
        for now, packs in enumerate(groups)
        for index, pack in enumerate(packs)
        for arrival in pack
    ]
    num_flushed = sum(map(len, groups[-1]))
    if packer.method not in WINDOWED:
        assert packer.longest_wait == max(waits)
    else:  # the flush shuffles its packs after they are counted
        assert packer.longest_wait >= max(waits[: len(waits) - num_flushed], default=0)


@given(problem=problems(), settings=settings(), data=st.data())
def test_a_packer_restored_at_any_point_gives_the_same_rest(problem, settings, data):
    stop = data.draw(st.integers(0, len(problem.costs)))
    packer = StreamPacker(problem.budget, **settings)
    before = pushed(packer, problem.costs[:stop])
    state = json.loads(json.dumps(packer.state_dict()))
    rest = [*pushed(packer, problem.costs[stop:]), packer.flush()]

    other = StreamPacker(problem.budget, **settings)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert [*pushed(other, problem.costs[stop:]), other.flush()] == rest
    assert (other.num_packs, other.longest_wait, other.longest_delay) == (
        packer.num_packs,
        packer.longest_wait,
        packer.longest_delay,
    )

    untouched = StreamPacker(problem.budget, **settings)
    assert [*pushed(untouched, problem.costs), untouched.flush()] == before + rest, "saving changed the packs"


@given(problem=problems(), settings=settings(), data=st.data())
def test_many_samples_at_once_give_the_packs_of_one_by_one(problem, settings, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(problem.costs)), max_size=4)))
    bounds = [0, *cuts, len(problem.costs)]
    packer, other = (StreamPacker(problem.budget, **settings) for _ in range(2))
    expected = flat(pushed(packer, problem.costs)) + packer.flush()
    chunks = [other.push_many(problem.cost_array[low:high]) for low, high in pairwise(bounds)]
    assert flat(chunks) + other.flush() == expected


@given(
    problem=problems(),
    method=st.sampled_from(WINDOWED),
    lookahead=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_a_stream_makes_the_packs_of_a_plan_that_keeps_the_order(problem, method, lookahead, seed):
    packer = StreamPacker(problem.budget, lookahead=lookahead, method=method, seed=seed)
    steady, rest = flat(pushed(packer, problem.costs)), packer.flush()
    made = plan(
        problem.cost_array, problem.budget, method=method, lookahead=lookahead, seed=seed, shuffle=False
    ).as_lists()
    assert made[: len(steady)] == steady
    assert sorted(made[len(steady) :]) == sorted(rest)


@given(problem=problems(min_samples=1), settings=settings(), data=st.data())
def test_a_refused_cost_leaves_no_trace(problem, settings, data):
    where = data.draw(st.integers(0, len(problem.costs)))
    axis = data.draw(st.integers(0, len(problem.budget) - 1))
    bad = list(problem.costs[0])
    bad[axis] = data.draw(st.sampled_from([-1, problem.budget[axis] + 1, 0.5, float("nan"), None]))
    packer, clean = (StreamPacker(problem.budget, **settings) for _ in range(2))
    groups = pushed(packer, problem.costs[:where])
    with pytest.raises((BudgetError, ConfigError), match=f"sample {where}"):
        packer.push(bad)
    assert packer.num_arrived == where
    groups += [*pushed(packer, problem.costs[where:]), packer.flush()]
    assert groups == [*pushed(clean, problem.costs), clean.flush()]
