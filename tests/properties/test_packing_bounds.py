"""The lower bounds against their definitions, and against optima found by trying everything."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from tests.properties.test_packing_plan import small_costs
from vlmpack.kernels.bounds import best_patterns
from vlmpack.packing.bounds import crossed_bound, l2_bound
from vlmpack.packing.configuration_bound import configuration_bound
from vlmpack.packing.problem import problem_of


@given(limit=st.integers(1, 60), shares=st.lists(st.floats(0, 1), max_size=40))
def test_l2_equals_its_definition(limit, shares):
    sizes = [round(share * limit) for share in shares]
    costs = np.array(sizes, np.int64).reshape(-1, 1)
    assert l2_bound(costs, 0, limit) == reference.martello_toth(sizes, limit)


@given(data=st.data())
def test_the_crossed_bound_equals_its_definition(data):
    limits = data.draw(st.lists(st.integers(1, 50), min_size=2, max_size=2))
    costs = small_costs(data.draw, limits, 20)
    density = max(Fraction(limits[1], limits[0]), *(Fraction(q, t) for t, q in costs))
    value = sum(max(Fraction(q), limits[1] - density * (limits[0] - t)) for t, q in costs) / limits[1]
    problem = problem_of(np.array(costs, np.int64), np.array(limits, np.int64))
    found = crossed_bound(problem, 0, 1, quantiles=())
    assert found in {ceil(value), ceil(value - Fraction(1, 10**5))}  # floats, rounded down to be safe
    assert crossed_bound(problem, 0, 1) >= found


@given(
    sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any), min_size=1, max_size=5),
    data=st.data(),
)
def test_the_pattern_table_holds_the_best_value_of_every_cell(sizes, data):
    values = data.draw(
        st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.55]), min_size=len(sizes), max_size=len(sizes))
    )
    best, last = np.empty((9, 8)), np.empty((9, 8), np.int32)
    best_patterns(np.array(sizes, np.int64), np.array(values), best, last)
    for row, column in ((8, 7), (0, 0), (3, 7), (8, 1)):
        assert best[row, column] == pytest.approx(
            reference.most_value(tuple(sizes), tuple(values), row, column)
        )
        value, r, c = 0.0, row, column
        while (kind := last[r, c]) >= 0:  # the pattern that is written down is worth what the table says
            value, r, c = value + values[kind], r - sizes[kind][0], c - sizes[kind][1]
            assert min(r, c) >= 0
        assert value == pytest.approx(best[row, column])


@settings(max_examples=30)
@given(data=st.data())
def test_the_configuration_bound_is_between_the_cheap_bounds_and_the_optimum(data):
    pytest.importorskip("highspy")
    budget = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=2))
    costs = small_costs(data.draw, budget, 8)
    bound = configuration_bound(costs, budget)
    assert bound.is_converged
    assert bound.num_packs <= reference.fewest_packs(costs, budget)
    sums = [-(-sum(column) // limit) for column, limit in zip(zip(*costs, strict=True), budget, strict=True)]
    assert bound.num_packs >= max(sums)
