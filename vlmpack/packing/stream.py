"""Packing of a stream: samples come one by one, finished packs go out, memory and delay are bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np

from vlmpack.errors import ConfigError
from vlmpack.packing.inputs import budget_array, cost_tuple
from vlmpack.packing.methods import check_method, choose, pack_all

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmpack.packing.inputs import Budget, Cost
    from vlmpack.packing.methods import Method


class StreamState(TypedDict):
    """What `StreamPacker.state_dict` returns; plain numbers, lists and strings, fit for JSON."""

    settings: dict[str, object]
    num_arrived: int
    num_windows: int
    arrivals: list[int]
    costs: list[list[int]]


class StreamPacker:
    """Packs a stream of costs; refers to samples by arrival index 0, 1, 2, ...

    Args:
        budget: What a pack may hold.
        lookahead: Samples that may wait for a pack; more fill packs better and delay samples longer.
        method: An algorithm of `methods.METHODS`, or "auto".
        seed: Decides the order of packs within a window.
        max_waiting_tokens: The waiting samples' tokens (axis 0) at which packs are made even before
            `lookahead` samples wait; None for no such limit.
        delta: Spare bins that worst-fit decreasing opens at the start; ignored by the others.

    Raises:
        ConfigError: If a setting is invalid.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        lookahead: int = 1024,
        method: Method = "auto",
        seed: int = 0,
        max_waiting_tokens: int | None = None,
        delta: int = 0,
    ) -> None:
        if lookahead < 1:
            raise ConfigError(f"lookahead must be at least 1 sample, got {lookahead}")
        if max_waiting_tokens is not None and max_waiting_tokens < 1:
            raise ConfigError(f"max_waiting_tokens must be at least 1, got {max_waiting_tokens}")
        if delta < 0:
            raise ConfigError(f"delta must not be negative, got {delta}")
        check_method(method)
        self._budget_A = budget_array(budget)
        self._limits: list[int] = self._budget_A.tolist()
        self._settings: dict[str, object] = {
            "budget": self._limits,
            "lookahead": lookahead,
            "method": method,
            "seed": seed,
            "max_waiting_tokens": max_waiting_tokens,
            "delta": delta,
        }
        self._lookahead = lookahead
        self._max_tokens = max_waiting_tokens
        self._method = method
        self._seed = seed
        self._delta = delta
        self._num_arrived = 0
        self._num_windows = 0
        self._waiting_tokens = 0
        self._arrivals: list[int] = []
        self._costs: list[tuple[int, ...]] = []

    @property
    def num_waiting(self) -> int:
        """Samples that arrived and are in no emitted pack yet."""
        return len(self._arrivals)

    def push(self, cost: Cost) -> list[list[int]]:
        """Take the next sample and return the packs that are finished now, often none.

        Args:
            cost: What the sample uses. A cost that raises is not taken: it gets no arrival index, and
                the packer can go on.

        Returns:
            Packs as lists of arrival indices, ascending in each pack.

        Raises:
            ConfigError: If it is not a valid cost.
            BudgetError: If the sample alone is over the budget.
        """
        values = cost_tuple(cost, self._limits, self._num_arrived)
        self._arrivals.append(self._num_arrived)
        self._costs.append(values)
        self._num_arrived += 1
        self._waiting_tokens += values[0]
        full = self._max_tokens is not None and self._waiting_tokens >= self._max_tokens
        return self.flush() if full or len(self._arrivals) >= self._lookahead else []

    def flush(self) -> list[list[int]]:
        """Return packs with all samples that wait; the packer can go on with new samples."""
        if not self._arrivals:
            return []
        cost_NA = np.array(self._costs, np.int64)
        method = choose(self._method, cost_NA, self._budget_A)
        bins, num_bins = pack_all(cost_NA, self._budget_A, method=method, seed=self._seed, delta=self._delta)
        packs: list[list[int]] = [[] for _ in range(num_bins)]
        order = np.random.default_rng([self._seed, self._num_windows]).permutation(num_bins).tolist()
        for arrival, bin_id in zip(self._arrivals, bins.tolist(), strict=True):
            packs[order[bin_id]].append(arrival)
        self._num_windows += 1
        self._waiting_tokens = 0
        self._arrivals, self._costs = [], []
        return packs

    def state_dict(self) -> StreamState:
        """Return what is needed to go on exactly from here: counters and waiting costs, no payload."""
        return StreamState(
            settings=dict(self._settings),
            num_arrived=self._num_arrived,
            num_windows=self._num_windows,
            arrivals=list(self._arrivals),
            costs=[list(cost) for cost in self._costs],
        )

    def load_state_dict(self, state: Mapping[str, object] | StreamState) -> None:
        """Go on from a saved state.

        Args:
            state: From `state_dict` of a packer with the same settings.

        Raises:
            ConfigError: If it was saved with other settings: the packs would differ.
        """
        if state["settings"] != self._settings:
            raise ConfigError(
                f"the saved packer had settings {state['settings']}, this one has {self._settings}; "
                "packs would differ. Build the packer with the saved settings."
            )
        self._num_arrived = state["num_arrived"]  # type: ignore[assignment]
        self._num_windows = state["num_windows"]  # type: ignore[assignment]
        self._arrivals = list(state["arrivals"])  # type: ignore[call-overload]
        self._costs = [tuple(cost) for cost in state["costs"]]  # type: ignore[attr-defined]
        self._waiting_tokens = sum(cost[0] for cost in self._costs)
