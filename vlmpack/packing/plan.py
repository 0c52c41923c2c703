"""A plan for a whole data set: which sample goes into which pack. Costs in, pack ids out."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from vlmpack.packing.inputs import budget_array, cost_table
from vlmpack.packing.methods import choose, pack_all

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.packing.inputs import Budget, Int64s
    from vlmpack.packing.methods import Method


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackPlan:
    """Which pack each sample goes into. Packs are numbered in the order in which they should be used."""

    pack_ids: Int64s = field(repr=False)
    """int64 [n], the pack of each sample, 0 to num_packs - 1; no pack is empty."""
    num_packs: int
    """How many packs there are."""
    loads: Int64s = field(repr=False)
    """int64 [num_packs, axes], what each pack holds."""
    budget: Int64s
    """int64 [axes], what a pack may hold; `budget.UNLIMITED` where there is no limit."""
    lower_bound: int
    """No plan has fewer packs than this."""
    method: str
    """The algorithm that made it: what `auto` chose."""

    @property
    def num_samples(self) -> int:
        """Samples in the plan."""
        return int(self.pack_ids.shape[0])

    def members(self) -> tuple[Int64s, Int64s]:
        """Return all samples pack by pack, and where each pack begins. O(n).

        Returns:
            samples: int64 [n]; those of pack p are `samples[starts[p] : starts[p + 1]]`, ascending.
            starts: int64 [num_packs + 1].
        """
        starts = np.zeros(self.num_packs + 1, np.int64)
        np.cumsum(np.bincount(self.pack_ids, minlength=self.num_packs), out=starts[1:])
        return np.argsort(self.pack_ids, kind="stable"), starts

    def as_lists(self) -> list[list[int]]:
        """Return the samples of each pack as lists, ascending: what `StreamPacker` emits."""
        samples, starts = self.members()
        return [samples[low:high].tolist() for low, high in pairwise(starts.tolist())]


def plan(
    costs: npt.ArrayLike,
    budget: Budget,
    *,
    method: Method = "auto",
    seed: int = 0,
    delta: int = 0,
    shuffle: bool = True,
) -> PackPlan:
    """Pack a whole data set. Deterministic: a function of its arguments only.

    Args:
        costs: int64 [n, axes], what each sample uses: at least one token, nothing negative.
        budget: What a pack may hold: a `PackBudget`, or as many limits as `costs` has columns.
        method: An algorithm of `methods.METHODS`, or "auto".
        seed: Decides the order of the packs.
        delta: Spare bins that worst-fit decreasing opens at the start; ignored by the others.
        shuffle: Number the packs in a seeded random order; else in the order in which the algorithm
            opened them, which often is from the fullest to the emptiest.

    Returns:
        The plan; n = 0 gives a plan without packs.

    Raises:
        ConfigError: If a setting, the budget or a cost is invalid.
        BudgetError: If a sample alone is over the budget.
    """
    budget_A = budget_array(budget)
    cost_NA = cost_table(costs, budget_A)
    chosen = choose(method, cost_NA, budget_A)
    pack_ids, num_packs = pack_all(cost_NA, budget_A, method=chosen, seed=seed, delta=delta)
    if shuffle:
        pack_ids = np.random.default_rng(seed).permutation(num_packs)[pack_ids]
    loads = np.zeros((num_packs, budget_A.shape[0]), np.int64)
    np.add.at(loads, pack_ids, cost_NA)
    return PackPlan(
        pack_ids=pack_ids,
        num_packs=num_packs,
        loads=loads,
        budget=budget_A,
        lower_bound=_lower_bound(cost_NA, budget_A),
        method=chosen,
    )


def _lower_bound(cost_NA: Int64s, budget_A: Int64s) -> int:
    totals, limits = cost_NA.sum(axis=0).tolist(), budget_A.tolist()
    return max(-(-total // max(limit, 1)) for total, limit in zip(totals, limits, strict=True))
