"""Hypothesis strategies for packing: budgets of one to six axes, and costs that are within them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from vlmpack.budget import UNLIMITED


class PackingProblem(NamedTuple):
    """A budget and the costs of some samples."""

    budget: list[int]
    costs: list[list[int]]

    @property
    def budget_array(self):
        return np.array(self.budget, np.int64)

    @property
    def cost_array(self):
        return np.array(self.costs, np.int64).reshape(-1, len(self.budget))


def limits(first):
    """A limit of an axis: axis 0 is at least 1, the others may be 0, small or unlimited."""
    if first:
        return st.one_of(st.integers(1, 60), st.integers(200, 5000))
    return st.one_of(st.integers(1, 40), st.sampled_from([0, 1, 48 * 1024, UNLIMITED]))


@st.composite
def problems(draw, *, max_axes=6, max_samples=60, min_samples=0):
    """Samples that crowd one axis or another; on tile-like axes all costs share a divisor."""
    num_axes = draw(st.integers(1, max_axes))
    budget = [draw(limits(axis == 0)) for axis in range(num_axes)]
    steps = [1024 if limit == 48 * 1024 else 1 for limit in budget]
    most = [
        draw(st.sampled_from([1, 4, 16, 1000])) * step if axis else draw(st.sampled_from([1, 7, limit]))
        for axis, (limit, step) in enumerate(zip(budget, steps, strict=True))
    ]
    cost = st.tuples(
        *(
            st.integers(axis == 0, min(limit, most[axis]) // steps[axis]).map(steps[axis].__mul__)
            for axis, limit in enumerate(budget)
        )
    ).map(list)
    return PackingProblem(budget, draw(st.lists(cost, min_size=min_samples, max_size=max_samples)))


def assert_valid(problem, bins, num_bins):
    """Each sample is in one of the bins, no bin is empty, and none is over any budget."""
    bins = list(bins)
    assert len(bins) == len(problem.costs)
    assert sorted(set(bins)) == list(range(num_bins))
    loads = np.zeros((num_bins, len(problem.budget)), object)
    for bin_id, cost in zip(bins, problem.costs, strict=True):
        loads[bin_id] += np.array(cost, object)
    assert (loads <= np.array(problem.budget, object)).all()
