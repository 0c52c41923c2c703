"""The configuration bound: the linear program over all packs that could exist. For small n; needs highspy.

It chooses how often each possible pack is used, fractions allowed, so that every kind of sample is covered.
Packs are generated when they are needed: the prices of the kinds in the current program make a knapsack
problem, whose best packs are added until none is worth more than 1. On the way, the value of the program
divided by the worth of the best pack is a bound (A. A. Farley, Oper. Res. 38, 1990), so it can be stopped at
any time.

Costs are rounded down to a grid over the two axes that need most packs, and the other axes are left out:
whatever fits before fits after, so it stays a bound. Ten thousand samples of `vlm_tiles` take a minute on a
grid of 256 x 48.

Source: P. C. Gilmore and R. E. Gomory, "A linear programming approach to the cutting-stock problem" (Oper.
Res. 9, 1961).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmpack.errors import ConfigError
from vlmpack.kernels.bounds import best_patterns
from vlmpack.packing.inputs import budget_array, cost_table

if TYPE_CHECKING:
    import highspy
    import numpy.typing as npt

    from vlmpack.packing.inputs import Budget, Int64s

    Floats = npt.NDArray[np.float64]
    Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigurationBound:
    """What the linear program says."""

    num_packs: int
    """No plan has fewer packs."""
    value: float
    """The bound before it was rounded up."""
    is_converged: bool
    """Whether no pack could improve the program; else the time ran out and the bound is weaker."""
    num_rounds: int
    """How often packs were added."""


def configuration_bound(
    costs: npt.ArrayLike, budget: Budget, *, levels: int = 256, time_limit_s: float = 60.0
) -> ConfigurationBound:
    """Return the bound of the linear program over all possible packs.

    Args:
        costs: int64 [n, axes], as for `plan`.
        budget: What a pack may hold, as for `plan`.
        levels: Cells of the grid on each of the two axes that need most packs; more are sharper and slower.
        time_limit_s: Seconds after which the best bound so far is returned.

    Raises:
        ConfigError: If highspy is not installed, or the budget or a cost is invalid.
        BudgetError: If a sample alone is over the budget.
    """
    budget_A = budget_array(budget)
    cost_NA = cost_table(costs, budget_A)
    if levels < 1:
        raise ConfigError(f"levels must be at least 1, got {levels}")
    if not cost_NA.shape[0]:
        return ConfigurationBound(num_packs=0, value=0.0, is_converged=True, num_rounds=0)
    size_K2, count_K, cells = _kinds(cost_NA, budget_A, levels)
    program = _Program(size_K2, count_K, cells)
    deadline = time.monotonic() + time_limit_s
    best, num_rounds, is_converged = 0.0, 0, False
    while not is_converged and time.monotonic() < deadline:
        value, worth = program.solve()
        best = max(best, value / max(worth, 1.0))
        is_converged = worth < 1.0 + 1e-6 or not program.add_packs()
        num_rounds += 1
    return ConfigurationBound(
        num_packs=math.ceil(best - 1e-6), value=best, is_converged=is_converged, num_rounds=num_rounds
    )


def _kinds(cost_NA: Int64s, budget_A: Int64s, levels: int) -> tuple[Int64s, Int64s, tuple[int, int]]:
    """Return the kinds of samples on the grid, how many samples each has, and the cells of a pack."""
    needs = cost_NA.sum(axis=0) / np.maximum(budget_A, 1)
    axes = np.argsort(-needs, kind="stable")[:2]
    columns, cells = [], []
    for axis in axes.tolist():
        step = max(int(np.gcd.reduce(cost_NA[:, axis])), 1)
        cell = max(step, -(-int(budget_A[axis]) // levels))
        columns.append(cost_NA[:, axis] // cell)
        cells.append(int(budget_A[axis]) // cell)
    if len(columns) == 1:
        columns.append(np.zeros_like(columns[0]))
        cells.append(0)
    grid = np.stack(columns, axis=1)
    size_K2, count_K = np.unique(grid[grid.any(axis=1)], axis=0, return_counts=True)
    return size_K2, count_K, (cells[0], cells[1])


class _Program:
    """The linear program over the packs known so far.

    Args:
        size_K2: int64 [K, 2], sizes of the kinds in cells.
        count_K: int64 [K], samples of each kind.
        cells: Cells of a pack on both axes.
    """

    MAX_NEW = 60
    """Packs to add in a round; one a round needs ten times the rounds."""

    def __init__(self, size_K2: Int64s, count_K: Int64s, cells: tuple[int, int]) -> None:
        try:
            import highspy
        except ImportError as error:
            raise ConfigError(
                "the configuration bound needs highspy: pip install 'vlmpack[bounds]'"
            ) from error
        self._size_K2 = size_K2
        self._best_GH: Floats = np.zeros((cells[0] + 1, cells[1] + 1))
        self._last_GH: Int32s = np.zeros(self._best_GH.shape, np.int32)
        self._infinity = highspy.kHighsInf
        self._solver: highspy.Highs = highspy.Highs()
        self._solver.setOptionValue("output_flag", False)
        for count in count_K.tolist():
            self._solver.addRow(float(count), self._infinity, 0, np.array([], np.int32), np.array([]))
        for kind, sizes in enumerate(size_K2.tolist()):
            most = min(cell // size for cell, size in zip(cells, sizes, strict=True) if size)
            self._add({kind: most})

    def solve(self) -> tuple[float, float]:
        """Return the value of the program, and the worth of the best pack at its prices."""
        self._solver.run()
        price_K = np.maximum(np.array(self._solver.getSolution().row_dual), 0.0)
        best_patterns(self._size_K2, price_K, self._best_GH, self._last_GH)
        return float(self._solver.getObjectiveValue()), float(self._best_GH[-1, -1])

    def add_packs(self) -> bool:
        """Add the most valuable packs, whole or smaller; return whether there was one."""
        worth_it = np.argwhere(self._best_GH > 1.0 + 1e-7)
        order = np.argsort(-self._best_GH[worth_it[:, 0], worth_it[:, 1]], kind="stable")
        known: set[tuple[tuple[int, int], ...]] = set()
        for row, column in worth_it[order[: 8 * self.MAX_NEW]].tolist():
            pattern = self._pattern(row, column)
            key = tuple(sorted(pattern.items()))
            if key not in known:
                known.add(key)
                self._add(pattern)
            if len(known) == self.MAX_NEW:
                break
        return bool(known)

    def _pattern(self, row: int, column: int) -> dict[int, int]:
        pattern: dict[int, int] = {}
        while (kind := int(self._last_GH[row, column])) >= 0:
            pattern[kind] = pattern.get(kind, 0) + 1
            row, column = row - int(self._size_K2[kind, 0]), column - int(self._size_K2[kind, 1])
        return pattern

    def _add(self, pattern: dict[int, int]) -> None:
        kinds, counts = np.array(list(pattern), np.int32), np.array(list(pattern.values()), np.float64)
        self._solver.addCol(1.0, 0.0, self._infinity, len(pattern), kinds, counts)
