"""What a packing algorithm is given: checked costs, the budget, and the totals that everybody asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlmpack.kernels.totals import NUM_TOTALS, SUM, axis_totals

if TYPE_CHECKING:
    from vlmpack.packing.inputs import Int64s


class Problem(NamedTuple):
    """Checked costs with their totals."""

    budget: Int64s
    """int64 [A]."""
    costs: Int64s
    """int64 [N, A]."""
    totals: Int64s
    """int64 [3, A], see `kernels.totals`; zeros where N is 0."""

    def needs(self) -> list[float]:
        """Return how many packs each axis needs by its sum alone."""
        pairs = zip(self.totals[SUM].tolist(), self.budget.tolist(), strict=True)
        return [total / max(limit, 1) for total, limit in pairs]

    def binding_axes(self, share: float) -> list[int]:
        """Return the axes that need at least this share of the packs of the neediest axis.

        Args:
            share: 0 to 1.
        """
        needs = self.needs()
        return [axis for axis, need in enumerate(needs) if 0 < need >= share * max(needs)]


def problem_of(cost_NA: Int64s, budget_A: Int64s) -> Problem:
    """Return checked costs, at least one, with their totals. O(n).

    Args:
        cost_NA: int64 [N, A].
        budget_A: int64 [A].
    """
    total_KA = np.zeros((NUM_TOTALS, budget_A.shape[0]), np.int64)
    axis_totals(cost_NA, total_KA)
    return Problem(budget_A, cost_NA, total_KA)
