"""Plans by every method: valid, deterministic, reported truthfully, never below a lower bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests import reference
from tests.packing_problems import assert_valid, problems
from vlmpack.packing.bounds import lower_bounds
from vlmpack.packing.methods import METHODS
from vlmpack.packing.plan import plan

SMALL_LIMITS = st.integers(1, 30)


@pytest.mark.parametrize("method", METHODS)
@given(problem=problems(), seed=st.integers(0, 2**40), shuffle=st.booleans())
def test_a_plan_holds_each_sample_once_within_every_budget(method, problem, seed, shuffle):
    made = plan(problem.cost_array, problem.budget, method=method, seed=seed, shuffle=shuffle)
    event(f"method: {made.method}")
    assert_valid(problem, made.pack_ids.tolist(), made.num_packs)
    loads = np.zeros((made.num_packs, len(problem.budget)), np.int64)
    np.add.at(loads, made.pack_ids, problem.cost_array)
    assert made.loads.tolist() == loads.tolist()
    assert made.num_samples == len(problem.costs)
    assert made.lower_bound <= made.num_packs
    assert made.as_lists() == [np.flatnonzero(made.pack_ids == p).tolist() for p in range(made.num_packs)]
    again = plan(problem.cost_array, problem.budget, method=method, seed=seed, shuffle=shuffle)
    assert again.pack_ids.tolist() == made.pack_ids.tolist()


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("auto", "fast", "balanced", "best")])
@given(problem=problems(), seed=st.integers(0, 99))
def test_a_seed_only_renumbers_the_packs_of_the_textbook_methods(method, problem, seed):
    shuffled = plan(problem.cost_array, problem.budget, method=method, seed=seed)
    in_order = plan(problem.cost_array, problem.budget, method=method, shuffle=False)
    assert sorted(shuffled.as_lists()) == sorted(in_order.as_lists())


def small_costs(draw, budget, max_samples):
    cost = st.tuples(*(st.integers(i == 0, limit) for i, limit in enumerate(budget))).map(list)
    return draw(st.lists(cost, min_size=1, max_size=max_samples))


@given(data=st.data())
def test_no_bound_is_above_the_optimum_and_no_plan_below_it(data):
    budget = data.draw(st.lists(SMALL_LIMITS, min_size=1, max_size=3))
    costs = small_costs(data.draw, budget, 8)
    optimum = reference.fewest_packs(costs, budget)
    bounds = lower_bounds(costs, budget)
    assert bounds.best <= optimum
    assert bounds.per_axis == tuple(
        -(-sum(column) // limit) for column, limit in zip(zip(*costs, strict=True), budget, strict=True)
    )
    for method in ("auto", "best"):
        made = plan(costs, budget, method=method)
        assert made.lower_bound <= optimum <= made.num_packs
    event(f"best is above the optimum by {made.num_packs - optimum}")
