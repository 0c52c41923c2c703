"""What a simulation counts is what packing the same costs one by one counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmpack.budget import PackBudget, SampleCost
from vlmpack.errors import ConfigError, SourceError
from vlmpack.packing import PackingReport, StreamPacker, plan
from vlmpack.packing.report import MAX_EXAMPLES
from vlmpack.packing.simulate import simulate
from vlmpack.packing.workloads import costs_of

BUDGET = PackBudget(max_tokens=100, max_images=4, max_patches=40)


def sample(cost) -> SampleCost:
    tokens, images, patches = cost
    return SampleCost(num_tokens=tokens, num_images=images, num_patches=patches)


def add(report: PackingReport, costs, pack) -> None:
    patches = sum(costs[index][2] for index in pack)
    report.add_pack(
        [sample(costs[index]) for index in pack], num_tiles=patches, num_supervised=0, num_appended=0
    )


def counted_one_by_one(costs, budget, lookahead, seed) -> PackingReport:
    """Pack and count as `ConstantLengthDataset` does: a sample, a pack, a number at a time."""
    report = PackingReport(budget=budget, num_read=len(costs))
    if lookahead is None:
        for pack in plan(np.array(costs), budget, seed=seed).as_lists():
            add(report, costs, pack)
        return report
    packer = StreamPacker(budget, lookahead=lookahead, seed=seed)
    num_arrived = 0
    for cost in costs:
        num_arrived += 1
        for pack in packer.push(cost):
            add(report, costs, pack)
            report.add_delays(num_arrived - 1 - arrival for arrival in pack)
    for pack in packer.flush():
        add(report, costs, pack)
        report.add_delays(num_arrived - 1 - arrival for arrival in pack)
    return report


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 4), st.integers(0, 40)), min_size=1, max_size=60),
    st.one_of(st.none(), st.integers(1, 70)),
    st.integers(0, 3),
)
def test_the_counts_are_those_of_packs_counted_one_by_one(costs, lookahead, seed):
    run = simulate(costs, BUDGET, lookahead=lookahead, seed=seed, patches_per_tile=1)
    assert run.report.as_dict() == counted_one_by_one(costs, BUDGET, lookahead, seed).as_dict()
    assert run.lower_bound <= run.report.num_packs
    assert run.over_bound >= 0
    json.dumps(run.as_dict())


def test_two_packs_worked_by_hand():
    # 60 + 40 and 50 + 50 tokens fill two packs; no other two packs hold all four samples.
    costs = [(60, 1, 8), (50, 0, 0), (40, 2, 16), (50, 0, 0)]
    run = simulate(costs, BUDGET, patches_per_tile=8)
    assert (run.report.num_packs, run.lower_bound, run.over_bound) == (2, 2, 0.0)
    assert run.report.num_tiles == 24 // 8
    assert run.report.fill["tokens"] == 1.0
    assert run.samples_per_pack == 2.0
    assert run.report.patches_per_pack == {24: 1, 0: 1}
    # Whole packs attend over 2 x 100^2 pairs; alone, the samples do over 60^2 + 2 x 50^2 + 40^2 = 10,200.
    assert run.attention_factor == 20_000 / 10_200
    # One pack costs 60^2 + 40^2 = 5,200, the other 2 x 50^2 = 5,000; 95 % of two packs are both.
    assert run.attention_per_pack == (5_100.0, 5_200, 5_200)
    assert (run.mean_delay, run.max_delay) == (None, None)
    assert run.seconds > 0
    assert run.samples_per_second == 4 / run.seconds


def test_with_a_look_ahead_of_one_every_sample_is_a_pack_at_once():
    run = simulate([(30, 0, 0)] * 5, BUDGET, lookahead=1)
    # 5 x 30 tokens need 2 packs of 100; 3 more are 150 %.
    assert (run.report.num_packs, run.lower_bound, run.over_bound) == (5, 2, 1.5)
    assert run.attention_per_pack == (900.0, 900, 900)
    assert (run.mean_delay, run.max_delay) == (0.0, 0)
    assert run.attention_factor == 1.0


def test_samples_over_the_budget_are_refused_with_their_numbers():
    costs = [(50, 0, 0), (101, 0, 0), (50, 5, 41), (30, 0, 0)]
    run = simulate(costs, BUDGET, patches_per_tile=1)
    report = run.report
    assert (report.num_read, report.num_packed, report.num_packs) == (4, 2, 1)
    assert report.num_refused == {"over_budget": 2}
    assert report.load == sample((80, 0, 0))
    first, second = report.refusals
    assert (first.key, first.message) == ("1", "101 tokens where a pack holds 100. Raise the limit")
    assert (second.key, second.numbers) == (
        "2",
        {"num_images": 5, "max_images": 4, "num_patches": 41, "max_patches": 40},
    )


def test_many_samples_over_the_budget_are_all_counted_and_few_kept():
    run = simulate([(101, 0, 0)] * (MAX_EXAMPLES + 50) + [(1, 0, 0)], BUDGET)
    assert run.report.num_refused == {"over_budget": MAX_EXAMPLES + 50}
    assert len(run.report.refusals) == MAX_EXAMPLES
    assert run.report.num_read == run.report.num_packed + run.report.total_refused


def test_an_axis_without_a_limit_takes_anything():
    run = simulate([(10, 9, 10**6)] * 3, PackBudget(max_tokens=100), patches_per_tile=1024)
    assert run.report.num_packs == 1
    assert run.report.fill == {"tokens": 0.3, "images": None, "patches": None}


def test_progress_rises_from_nothing_to_all():
    for lookahead in (None, 256):
        seen: list[float] = []
        simulate(
            costs_of("text", 3000), PackBudget(max_tokens=4096), lookahead=lookahead, on_progress=seen.append
        )
        assert seen[0] == 0.0
        assert seen[-1] == 1.0
        assert seen == sorted(seen)
        assert len(seen) >= 3


@pytest.mark.parametrize("lookahead", [None, 256])
def test_a_simulation_is_a_function_of_its_arguments(lookahead):
    costs = costs_of("vlm_tiles", 1000)
    budget = PackBudget(max_tokens=4096, max_images=18, max_patches=48)
    first, again = (simulate(costs, budget, lookahead=lookahead, seed=3).report for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ([(0, 0, 0)], "sample 0: needs at least one token"),
        (
            [(5, 0, 0), (5, -1, 0)],
            r"sample 1: needs at least one token and no cost that is negative or above .*, got \[5, -1, 0\]",
        ),
        ([(5, 0)], r"costs are integers \[n, 3\] \(tokens, images, patches\), got int64 \[1, 2\]"),
        ([(5.5, 0, 0)], r"costs are integers .*, got float64 \[1, 3\]"),
        ([(5, 0, 2**41)], "sample 0: .* above 1,099,511,627,776"),
    ],
)
def test_wrong_costs_are_explained(costs, message):
    with pytest.raises(ConfigError, match=message):
        simulate(costs, BUDGET)


def test_wrong_settings_are_explained():
    with pytest.raises(ConfigError, match="no packing method 'fit'"):
        simulate([(5, 0, 0)], BUDGET, method="fit")
    with pytest.raises(ConfigError, match="lookahead must be at least 1"):
        simulate([(5, 0, 0)], BUDGET, lookahead=0)


def test_nothing_to_pack_is_an_error():
    with pytest.raises(SourceError, match="the data set is empty"):
        simulate([], BUDGET)
    with pytest.raises(
        SourceError, match=r"none of 2 rows can be packed: 2 over_budget\. The first.*row 0: 200 tokens"
    ):
        simulate([(200, 0, 0), (101, 0, 0)], BUDGET)
