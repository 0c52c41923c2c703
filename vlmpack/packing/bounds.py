"""Lower bounds on the number of packs: how far from the optimum a plan can be at most.

Each is a dual-feasible function: values of samples of which no pack holds more than 1, so that their sum is a
bound. Sharper bounds cost more:

| bound | value of a sample | cost |
|---|---|---|
| per axis (L1) | its share of the budget | O(n) |
| L2 | 1 above limit - a; 1/2 above half, its share from a to half, for the best a | O(n + limit) |
| crossed | 1 less what fits beside it on another axis, or its share | O(n log n) |
| configuration | the dual of the linear program over all possible packs | small n |

On the workload `vlm_tiles` the configuration bound shows that no plan can be less than 0.3 % above L1.

Sources: S. Martello and P. Toth, "Lower bounds and reduction procedures for the bin packing problem"
(Discrete Appl. Math. 28, 1990), section 3, for L2; S. P. Fekete and J. Schepers, "New classes of fast lower
bounds for bin packing problems" (Math. Program. 91, 2001), for dual-feasible functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from vlmpack.kernels.bounds import count_sizes, crossed, densest, martello_toth
from vlmpack.kernels.totals import HIGH, SUM
from vlmpack.packing.inputs import budget_array, measured_costs
from vlmpack.packing.problem import Problem

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.packing.inputs import Budget, Int64s

MAX_SIZES: Final = 1 << 20
"""Larger limits are rounded down to so many sizes for L2, which weakens the bound a little."""
BINDING: Final = 0.5
"""Axes are crossed if each needs at least this share of the packs of the neediest axis."""
QUANTILES: Final = (0.999, 0.99, 0.95)
"""The densest samples spoil the crossed bound for all; it is tried without the top 0.1, 1 and 5 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LowerBounds:
    """Numbers of packs that no plan can beat."""

    per_axis: tuple[int, ...]
    """Sum of each axis in packs, rounded up (L1)."""
    martello_toth: tuple[int, ...]
    """L2 of each axis; at least L1 where the limit is not rounded."""
    crossed: int
    """The best bound over pairs of axes that bind; 0 where there is no pair."""

    @property
    def best(self) -> int:
        """The largest of them."""
        return max((*self.per_axis, *self.martello_toth, self.crossed))


def lower_bounds(costs: npt.ArrayLike, budget: Budget) -> LowerBounds:
    """Return the bounds that need no linear program. O(n log n): 0.1 s for a million samples.

    Args:
        costs: int64 [n, axes], as for `plan`.
        budget: What a pack may hold, as for `plan`.

    Raises:
        ConfigError: If the budget or a cost is invalid.
        BudgetError: If a sample alone is over the budget.
    """
    budget_A = budget_array(budget)
    problem = Problem(budget_A, *measured_costs(costs, budget_A))
    return LowerBounds(
        per_axis=_per_axis(problem),
        martello_toth=tuple(
            l2_bound(problem.costs, axis, limit) for axis, limit in enumerate(budget_A.tolist())
        ),
        crossed=max((crossed_bound(problem, *pair) for pair in _binding_pairs(problem)), default=0),
    )


def quick_bound(problem: Problem) -> int:
    """Return what a plan reports: all of them, the crossed bound at one density only. O(n + limit).

    Args:
        problem: The samples.
    """
    limits, highs = problem.budget.tolist(), problem.totals[HIGH].tolist()
    l2 = [  # with no sample above half it is L1
        l2_bound(problem.costs, axis, limit)
        for axis, (limit, high) in enumerate(zip(limits, highs, strict=True))
        if 2 * high > limit
    ]
    pairs = _binding_pairs(problem)
    over_pairs = [crossed_bound(problem, *pair, quantiles=()) for pair in pairs]
    return max([*_per_axis(problem), *l2, *over_pairs])


def _per_axis(problem: Problem) -> tuple[int, ...]:
    totals = problem.totals[SUM].tolist()
    return tuple(
        -(-total // max(limit, 1)) for total, limit in zip(totals, problem.budget.tolist(), strict=True)
    )


def _binding_pairs(problem: Problem) -> list[tuple[int, int]]:
    binding = problem.binding_axes(BINDING)
    return [(base, other) for base in binding for other in binding if base != other]


def l2_bound(cost_NA: Int64s, axis: int, limit: int) -> int:
    """Return the bound L2 of Martello and Toth on one axis. O(n + limit).

    A limit beyond `MAX_SIZES` is divided by a power of two, and so are the costs, both rounded down: whatever
    fits before fits after, so it stays a bound.

    Args:
        cost_NA: int64 [n, axes], checked.
        axis: The axis.
        limit: Its budget.
    """
    shift = max(0, limit.bit_length() - MAX_SIZES.bit_length())
    count_V = np.zeros((limit >> shift) + 1, np.int64)
    count_sizes(cost_NA, axis, shift, count_V)
    return int(martello_toth(count_V))


def crossed_bound(problem: Problem, base: int, other: int, quantiles: tuple[float, ...] = QUANTILES) -> int:
    """Return the bound from samples that leave no room on one axis for what the other axis needs.

    Let no sample use more than d of `other` for each unit of `base`, and d >= Q / T with the limits T of
    `base` and Q of `other`. Give a sample of (t, q) the value max(q / Q, 1 - d (T - t) / Q). A pack with k
    samples of the second kind and t' in them has at most d (T - t') of `other` in the rest, so its value is
    at most k - d (k T - t') / Q + d (T - t') / Q = k - (k - 1) d T / Q <= 1. The samples above a density can
    be left out, since fewer samples never need more packs.

    Args:
        problem: The samples.
        base: The axis by which samples are large.
        other: The axis that is counted.
        quantiles: Of the densities, which to try besides the largest.
    """
    cost_NA = problem.costs
    limits = int(problem.budget[base]), int(problem.budget[other])
    least = limits[1] / limits[0]
    candidates = {max(least, float(densest(cost_NA, base, other)))}
    if quantiles:
        has_base = cost_NA[:, base] > 0
        ratios = cost_NA[has_base, other] / cost_NA[has_base, base]
        candidates |= {max(least, float(value)) for value in np.quantile(ratios, quantiles)}
    totals = [crossed(cost_NA, base, other, *limits, density * (1 + 1e-12)) for density in candidates]
    return math.ceil(max(totals) * (1 - 1e-9) - 1e-6)
