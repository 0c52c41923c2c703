"""The dispatch table of the packing algorithms, and what "auto" chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import numpy as np

from vlmpack.errors import ConfigError
from vlmpack.kernels.worst_fit_decreasing import worst_fit_decreasing

if TYPE_CHECKING:
    from vlmpack.packing.inputs import Int64s

Method: TypeAlias = Literal["auto", "worst_fit_decreasing"]

METHODS: Final[tuple[Method, ...]] = get_args(Method)
"""Names for the `method` argument."""


def choose(method: Method, cost_NA: Int64s, budget_A: Int64s) -> Method:
    """Return the algorithm that "auto" stands for; any other name stays.

    Args:
        method: One of `METHODS`.
        cost_NA: int64 [n, axes], checked costs.
        budget_A: int64 [axes].

    Raises:
        ConfigError: If there is no such method.
    """
    check_method(method)
    return "worst_fit_decreasing" if method == "auto" else method


def check_method(method: str) -> None:
    """Refuse a name that is not in `METHODS`.

    Args:
        method: What the user wrote.

    Raises:
        ConfigError: If there is no such method.
    """
    if method not in METHODS:
        raise ConfigError(f"no packing method {method!r}; choose one of {', '.join(METHODS)}")


def pack_all(
    cost_NA: Int64s, budget_A: Int64s, *, method: Method, seed: int, delta: int
) -> tuple[Int64s, int]:
    """Run one algorithm over all samples.

    Args:
        cost_NA: int64 [n, axes], checked costs.
        budget_A: int64 [axes].
        method: Any of `METHODS` but "auto".
        seed: For the algorithms that try at random.
        delta: Spare bins of worst-fit decreasing.

    Returns:
        int64 [n] bins without gaps, in the order in which the algorithm opened them; their number.
    """
    bin_N = np.empty(cost_NA.shape[0], np.int64)
    order_N = np.argsort(-cost_NA[:, 0], kind="stable")
    num_open = -(-int(cost_NA[:, 0].sum()) // int(budget_A[0])) + delta
    worst_fit_decreasing(cost_NA, order_N, budget_A, num_open, bin_N)
    return _without_gaps(bin_N)


def _without_gaps(bin_N: Int64s) -> tuple[Int64s, int]:
    used = np.bincount(bin_N) > 0
    return (np.cumsum(used) - 1)[bin_N], int(used.sum())
