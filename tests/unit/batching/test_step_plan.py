"""The plan of a run: every sample of every epoch once, over any ranks, with an exact length and place."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmpack.batching import RandomSteps, StepPlan
from vlmpack.errors import ConfigError


@given(
    samples=st.integers(1, 60),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    world=st.integers(1, 4),
    seed=st.integers(0, 99),
    weighed=st.booleans(),
)
def test_each_epoch_has_each_sample_once_over_all_ranks(samples, sizes, world, seed, weighed):
    source = RandomSteps(samples, lambda epoch: sizes[epoch], seed=seed)
    costs = [float(index % 7) for index in range(samples)] if weighed else None
    plans = [
        StepPlan(source, epochs=len(sizes), rank=rank, world_size=world, costs=costs) for rank in range(world)
    ]
    steps = [list(plan) for plan in plans]
    expected = sum(-(-samples // size) for size in sizes)
    assert [len(plan) for plan in plans] == [len(each) for each in steps] == [expected] * world
    for epoch in range(len(sizes)):
        seen = Counter(index for each in steps for step in each if step.epoch == epoch for index in step)
        assert seen == Counter(range(samples))
    for number in range(expected):
        held = [len(each[number]) for each in steps]
        assert max(held) - min(held) <= 1
        assert sum(held) == len(plans[0].step(number))


@given(samples=st.integers(1, 40), size=st.integers(1, 9), stop=st.integers(0, 30), world=st.integers(1, 3))
def test_a_run_goes_on_where_it_stood_with_any_number_of_ranks(samples, size, stop, world):
    source = RandomSteps(samples, size, seed=1)
    whole = [sorted(step) for step in StepPlan(source, epochs=2)]
    stop = min(stop, len(whole))
    state = StepPlan(source, epochs=2).state_dict(stop)
    plans = [StepPlan(source, epochs=2, rank=rank, world_size=world) for rank in range(world)]
    rests = []
    for plan in plans:
        plan.load_state_dict(state)
        rests.append(list(plan))
    joined = [sorted(index for step in steps for index in step) for steps in zip(*rests, strict=True)]
    assert joined == whole[stop:]
    assert len(list(plans[0])) == len(whole)  # the next pass begins at the beginning


def test_epochs_lie_where_the_steps_say():
    plan = StepPlan(RandomSteps(101, lambda epoch: (8, 16, 32, 32)[epoch]), epochs=4)
    assert plan.epoch_ends == (13, 20, 24, 28)
    assert [plan.epoch_of(step) for step in (0, 12, 13, 19, 20, 27)] == [0, 0, 1, 1, 2, 3]
    assert [plan.progress(steps) for steps in (0, 13, 20, 24, 28)] == [0, 1, 2, 3, 4]
    assert plan.progress(22) == 2.5


def test_a_part_of_an_epoch_and_a_number_of_steps_end_in_the_middle():
    source = RandomSteps(10, 2)
    assert len(StepPlan(source, epochs=1.5)) == 8  # 5 + ceil(2.5)
    assert len(StepPlan(source, epochs=0.2)) == 1
    plan = StepPlan(source, max_steps=12)
    assert (len(plan), plan.epoch_ends, plan.progress(12)) == (12, (5, 10, 12), 2.4)


def test_epochs_differ_and_repeat_with_the_seed():
    first, second = RandomSteps(50, 50, seed=1), RandomSteps(50, 50, seed=2)
    assert first.batches(0) == RandomSteps(50, 50, seed=1).batches(0)
    assert len({tuple(order[0]) for order in (first.batches(0), first.batches(1), second.batches(0))}) == 3
    assert RandomSteps(5, 2, shuffle=False).batches(3) == [[0, 1], [2, 3], [4]]
    assert RandomSteps(5, 2, shuffle=False, drop_last=True).batches(3) == [[0, 1], [2, 3]]


def test_ranks_get_equal_loads_where_costs_are_known():
    costs = [1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0]
    plans = [StepPlan(RandomSteps(8, 8, seed=3), rank=rank, world_size=2, costs=costs) for rank in range(2)]
    assert [sum(costs[index] for index in plan.mine(0)) for plan in plans] == [20.0, 20.0]


def test_what_is_wrong_is_named():
    source = RandomSteps(10, 4)
    with pytest.raises(ConfigError, match=r"rank must lie in 0\.\.1, got 2"):
        StepPlan(source, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="epochs must be positive"):
        StepPlan(source, epochs=0)
    with pytest.raises(ConfigError, match="max_steps must be positive"):
        StepPlan(source, max_steps=0)
    with pytest.raises(ConfigError, match="epoch 0 has no step"):
        StepPlan(RandomSteps(3, 4, drop_last=True))
    with pytest.raises(ConfigError, match="at least one sample"):
        RandomSteps(0, 4)
    with pytest.raises(ConfigError, match=r"epoch 1 must hold a positive number of samples, got 0"):
        StepPlan(RandomSteps(10, lambda epoch: 4 if epoch == 0 else 0), epochs=2)
    other = StepPlan(RandomSteps(10, 4, seed=9)).state_dict(1)
    with pytest.raises(ConfigError, match="its place means nothing"):
        StepPlan(source).load_state_dict(other)
    assert StepPlan(source).batch_size is None
