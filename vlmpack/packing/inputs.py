"""Checks of what users hand to the packer: budgets, one cost, a table of costs."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from vlmpack.budget import AXES, UNLIMITED, PackBudget, SampleCost
from vlmpack.errors import BudgetError, ConfigError
from vlmpack.kernels.totals import HIGH, LOW, NUM_TOTALS, axis_totals

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Int64s: TypeAlias = npt.NDArray[np.int64]
    Cost: TypeAlias = SampleCost | Sequence[int]
    Budget: TypeAlias = PackBudget | Int64s | Sequence[int]

MAX_AXES: Final[int] = 6
"""Tokens, images, patches and three more; the kernels' small arrays are sized for it."""

MAX_TOTAL: Final[int] = 1 << 62
"""Sums of costs stay below this, so that no int64 sum in a kernel can overflow."""


def check_least(least: int, **settings: object) -> None:
    """Check settings that are whole numbers.

    Args:
        least: The smallest that is allowed.
        **settings: By name.

    Raises:
        ConfigError: If one is none, or less.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")


def axis_name(axis: int) -> str:
    """Return the word for an axis: one of `budget.AXES`, or "axis 3" and up."""
    return AXES[axis] if axis < len(AXES) else f"axis {axis}"


def budget_array(budget: Budget) -> Int64s:
    """Return the budget as int64 [axes], `UNLIMITED` where there is no limit.

    Args:
        budget: A `PackBudget`, or 1 to 6 limits of which the first (tokens) is positive.

    Raises:
        ConfigError: If a limit is negative, not an integer, or there are no or too many axes.
    """
    if isinstance(budget, PackBudget):
        return budget.as_array()
    limits = np.asarray(budget)
    if limits.ndim != 1 or not 1 <= limits.shape[0] <= MAX_AXES:
        raise ConfigError(f"a budget has 1 to {MAX_AXES} limits, got an array of shape {limits.shape}")
    if not np.issubdtype(limits.dtype, np.integer):
        raise ConfigError(f"a budget holds integers, got {limits.dtype}: {limits.tolist()}")
    if limits[0] < 1 or limits.min() < 0 or limits.max() > UNLIMITED:
        raise ConfigError(
            f"limits lie between 0 and 2^62, the first (tokens) is at least 1, got {limits.tolist()}"
        )
    return np.ascontiguousarray(limits, np.int64)


def cost_tuple(cost: Cost, limits: Sequence[int], index: int) -> tuple[int, ...]:
    """Return one sample's cost as plain integers, in the order of the budget's axes.

    Args:
        cost: A `SampleCost` or as many integers as there are limits.
        limits: The budget, axis by axis.
        index: The sample's arrival number, for messages.

    Raises:
        ConfigError: If it is not a valid cost: wrong length, not integers, negative, no tokens.
        BudgetError: If the sample alone is over the budget.
    """
    values = cost.as_tuple() if isinstance(cost, SampleCost) else tuple(cost)
    if len(values) != len(limits):
        raise ConfigError(f"sample {index}: the cost has {len(values)} axes, the budget {len(limits)}")
    try:
        values = tuple(map(operator.index, values))
    except TypeError as error:
        raise ConfigError(f"sample {index}: a cost is made of integers, got {values!r}") from error
    if values[0] < 1 or min(values) < 0:
        raise ConfigError(f"sample {index}: needs at least one token and no negative cost, got {values}")
    if any(map(operator.gt, values, limits)):
        over = next(axis for axis, limit in enumerate(limits) if values[axis] > limit)
        raise BudgetError(_over_budget(index, over, values[over], limits[over]))
    return values


def cost_table(costs: npt.ArrayLike, budget_A: Int64s) -> Int64s:
    """Return the costs of a data set as C-contiguous int64 [n, axes], checked. O(n), no copy if it can.

    Args:
        costs: Integers [n, axes], or [n] where the budget has one axis.
        budget_A: int64 [axes].

    Raises:
        ConfigError: See `measured_costs`.
        BudgetError: See `measured_costs`.
    """
    return measured_costs(costs, budget_A)[0]


def measured_costs(costs: npt.ArrayLike, budget_A: Int64s) -> tuple[Int64s, Int64s]:
    """Return the costs of a data set, checked, and their totals. O(n), one pass, no copy if it can.

    Args:
        costs: Integers [n, axes], or [n] where the budget has one axis.
        budget_A: int64 [axes].

    Returns:
        The costs as C-contiguous int64 [n, axes], and int64 [3, axes] from `kernels.totals`, zeros for n = 0.

    Raises:
        ConfigError: If the shape or the type is wrong, a cost is negative or without tokens, or the
            costs are so large that their sum overflows.
        BudgetError: If a sample alone is over the budget; names the first one and counts them.
    """
    table = np.asarray(costs)
    total_KA = np.zeros((NUM_TOTALS, budget_A.shape[0]), np.int64)
    if table.size == 0:
        return np.empty((0, budget_A.shape[0]), np.int64), total_KA
    if table.ndim == 1 and budget_A.shape[0] == 1:
        table = table[:, None]
    if table.ndim != 2 or table.shape[1] != budget_A.shape[0]:
        raise ConfigError(f"costs must be [n, {budget_A.shape[0]}] like the budget, got {table.shape}")
    if not np.issubdtype(table.dtype, np.integer):
        raise ConfigError(f"costs are integers, got {table.dtype}; round them up before packing")
    if table.dtype == np.uint64 and int(table.max()) > MAX_TOTAL:
        raise ConfigError(f"a cost of {int(table.max())} is over 2^62")
    cost_NA = np.ascontiguousarray(table, np.int64)
    axis_totals(cost_NA, total_KA)
    low_A, high = total_KA[LOW], int(total_KA[HIGH].max())
    if low_A[0] < 1 or low_A.min() < 0:
        bad = int(np.flatnonzero((cost_NA[:, 0] < 1) | (cost_NA.min(axis=1) < 0))[0])
        raise ConfigError(
            f"sample {bad}: needs at least one token and no negative cost, got {cost_NA[bad].tolist()}"
        )
    for axis, limit in enumerate(budget_A.tolist()):
        if total_KA[HIGH, axis] > limit:
            over = np.flatnonzero(cost_NA[:, axis] > limit)
            first = int(over[0])
            message = _over_budget(first, axis, int(cost_NA[first, axis]), limit)
            raise BudgetError(f"{message} ({over.size} such samples of {cost_NA.shape[0]})")
    if high * cost_NA.shape[0] > MAX_TOTAL:
        raise ConfigError(f"costs up to {high} over {cost_NA.shape[0]} samples overflow 2^62")
    return cost_NA, total_KA


def _over_budget(index: int, axis: int, used: int, limit: int) -> str:
    return (
        f"sample {index}: {used} {axis_name(axis)} alone are over the pack's limit of {limit}. "
        "Raise the budget, or drop, split or shrink the sample before packing"
    )
