"""Lower bounds on the number of packs: how far from the optimum a plan can be at most.

Each one is a dual-feasible function: values of samples such that no pack holds more than 1 in total, so that
their sum is a bound. Sharper bounds cost more:

| bound | value of a sample | cost |
|---|---|---|
| per axis (L1) | its share of the budget | O(n) |
| L2 | 1 above limit - a, 1/2 above half, its share above a, else 0; the best a | O(n + limit) |
| crossed | 1 less what fits beside it on another axis | O(n) |
| configuration | the dual of the linear program over all possible packs | small n only |

Sources: S. Martello and P. Toth, "Lower bounds and reduction procedures for the bin packing problem"
(Discrete Appl. Math. 28, 1990) for L2; S. P. Fekete and J. Schepers, "New classes of fast lower bounds for
bin packing problems" (Math. Program. 91, 2001) for dual-feasible functions; P. C. Gilmore and R. E. Gomory,
"A linear programming approach to the cutting-stock problem" (Oper. Res. 9, 1961) for configurations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmpack.packing.inputs import Int64s


def cheap_bound(cost_NA: Int64s, budget_A: Int64s) -> int:
    """Return the largest sum of an axis in packs, rounded up. O(n)."""
    totals, limits = cost_NA.sum(axis=0).tolist(), budget_A.tolist()
    return max(-(-total // max(limit, 1)) for total, limit in zip(totals, limits, strict=True))
