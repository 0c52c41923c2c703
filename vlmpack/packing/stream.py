"""Packing of a stream: samples come one by one, finished packs go out, memory and delay are bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypedDict, cast

import numpy as np

from vlmpack.errors import ConfigError
from vlmpack.packing.engine import EFFORTS, MAX_LOAD, WindowEngine
from vlmpack.packing.inputs import budget_array, cost_table, cost_tuple
from vlmpack.packing.methods import check_method, choose_for_stream, pack_at_once
from vlmpack.packing.problem import problem_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from vlmpack.packing.engine import Balance, EngineState
    from vlmpack.packing.inputs import Budget, Cost, Int64s
    from vlmpack.packing.methods import Method


_SEED_MASK: Final = 0x7FFFFFFF


class StreamState(TypedDict):
    """What `StreamPacker.state_dict` returns; plain numbers, lists and strings, fit for JSON."""

    settings: dict[str, object]
    """What the packer was built with."""
    counters: list[int]
    """Samples that arrived, packs emitted, the longest wait in packs and in samples."""
    pending: list[list[int]]
    """Costs of samples that are not in the window packer yet, the last that arrived."""
    engine: EngineState | None
    """The window packer's own state."""


class StreamPacker:
    """Packs a stream of costs; refers to samples by arrival index 0, 1, 2, ...

    No sample waits for more than `lookahead` packs: every pack of the window packer begins with the sample
    that waits longest, and the other algorithms pack all samples that wait at once.

    Args:
        budget: What a pack may hold.
        lookahead: Samples that may wait for a pack; more fill packs better and delay samples longer.
        method: An algorithm of `methods.METHODS`, or "auto". "fast", "balanced" and "best" emit a pack
            whenever `lookahead` samples wait; the others collect that many and pack them all.
        seed: Decides the window packer's picks, and the order of packs that are packed at once.
        max_waiting_tokens: The waiting samples' tokens (axis 0) at which packs are made even before
            `lookahead` samples wait; None for no such limit.
        balance: Spread "patches" (axis 2), "attention" (squared tokens) or "both" evenly over packs.
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
        balance: Balance | None = None,
        delta: int = 0,
    ) -> None:
        if lookahead < 1:
            raise ConfigError(f"lookahead must be at least 1 sample, got {lookahead}")
        if max_waiting_tokens is not None and max_waiting_tokens < 1:
            raise ConfigError(f"max_waiting_tokens must be at least 1, got {max_waiting_tokens}")
        if delta < 0:
            raise ConfigError(f"delta must not be negative, got {delta}")
        check_method(method)
        self.method: Method = choose_for_stream(method)
        """The algorithm: what "auto" chose."""
        self._budget_A = budget_array(budget)
        self._limits: list[int] = self._budget_A.tolist()
        self._settings: dict[str, object] = {
            "budget": self._limits,
            "lookahead": lookahead,
            "method": self.method,
            "seed": seed,
            "max_waiting_tokens": max_waiting_tokens,
            "balance": balance,
            "delta": delta,
        }
        self._lookahead = lookahead
        self._max_load = MAX_LOAD if max_waiting_tokens is None else max_waiting_tokens
        self._seed = seed
        self._delta = delta
        self._engine: WindowEngine | None = None
        if self.method in EFFORTS:
            tries = EFFORTS[self.method].tries
            self._engine = WindowEngine(
                self._budget_A, lookahead=lookahead, tries=tries, seed=seed, balance=balance
            )
        elif balance is not None:
            raise ConfigError(f"balance={balance!r} needs one of {', '.join(EFFORTS)}, not {self.method}")
        self._num_arrived = 0
        self._num_packs = 0
        self._longest_wait = 0
        self._longest_delay = 0
        self._load = 0
        self._pending: list[tuple[int, ...]] = []

    @property
    def num_arrived(self) -> int:
        """Samples that were taken."""
        return self._num_arrived

    @property
    def num_packs(self) -> int:
        """Packs that were emitted."""
        return self._num_packs

    @property
    def num_waiting(self) -> int:
        """Samples that arrived and are in no emitted pack yet."""
        return len(self._pending) + (self._engine.num_waiting if self._engine is not None else 0)

    @property
    def longest_wait(self) -> int:
        """The most packs that were emitted while a sample waited; never more than `lookahead`."""
        return self._engine.longest_wait if self._engine is not None else self._longest_wait

    @property
    def longest_delay(self) -> int:
        """The most samples that arrived after a sample and before its pack was emitted."""
        return self._engine.longest_delay if self._engine is not None else self._longest_delay

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
        self._pending.append(values)
        self._num_arrived += 1
        self._load += values[0]
        if self.num_waiting < self._lookahead and self._load < self._max_load:
            return []
        return self._count(self._pack_window() if self._engine is None else self._feed(self._engine))

    def push_many(self, costs: npt.ArrayLike) -> list[list[int]]:
        """Take many samples at once; the packs are those of one `push` after the other, but faster.

        Args:
            costs: int64 [n, axes]. If one of them is invalid, none is taken.

        Returns:
            Packs as lists of arrival indices, ascending in each pack.

        Raises:
            ConfigError: If one is not a valid cost.
            BudgetError: If a sample alone is over the budget.
        """
        cost_MA = cost_table(costs, self._budget_A)
        if self._engine is None:
            return [pack for cost in cost_MA.tolist() for pack in self.push(cost)]
        self._settle(self._engine)
        first, self._num_arrived = self._num_arrived, self._num_arrived + cost_MA.shape[0]
        packs = self._engine.feed(cost_MA, first, self._lookahead, self._max_load)
        self._load = self._engine.load
        return self._count(packs)

    def drain(self, max_waiting: int) -> list[list[int]]:
        """Return packs, by the window packer, until at most `max_waiting` samples wait; it goes on as before.

        The other algorithms pack all samples that wait at once; where more wait, they do so here.

        Args:
            max_waiting: At least 0.
        """
        if self.num_waiting <= max_waiting:
            return []
        if self._engine is None:
            return self._count(self._pack_window())
        self._settle(self._engine)
        packs = self._engine.feed(self._no_costs(), self._num_arrived, max_waiting + 1)
        self._load = self._engine.load
        return self._count(packs)

    def flush(self) -> list[list[int]]:
        """Return packs with all samples that wait; the packer can go on with new samples."""
        if self._engine is None:
            return self._count(self._pack_window())
        self._settle(self._engine)
        packs = self._engine.feed(self._no_costs(), self._num_arrived, 1)
        self._load = 0
        return self._count(self._shuffled(packs))  # the last packs of a window that empties are less full

    def state_dict(self) -> StreamState:
        """Return what is needed to go on exactly from here: counters and waiting costs, no payload.

        About 60 bytes of JSON for each sample that may wait.
        """
        if self._engine is not None:
            self._settle(self._engine)
        return StreamState(
            settings=dict(self._settings),
            counters=[self._num_arrived, self._num_packs, self._longest_wait, self._longest_delay],
            pending=[list(cost) for cost in self._pending],
            engine=None if self._engine is None else self._engine.state(),
        )

    def load_state_dict(self, state: Mapping[str, object] | StreamState) -> None:
        """Go on from a saved state.

        Args:
            state: From `state_dict` of a packer with the same settings.

        Raises:
            ConfigError: If it was saved with other settings: the packs would differ.
        """
        saved = cast("StreamState", state)
        if saved["settings"] != self._settings:
            raise ConfigError(
                f"the saved packer had settings {saved['settings']}, this one has {self._settings}; "
                "packs would differ. Build the packer with the saved settings."
            )
        self._num_arrived, self._num_packs, self._longest_wait, self._longest_delay = saved["counters"]
        self._pending = [tuple(cost) for cost in saved["pending"]]
        self._load = sum(cost[0] for cost in self._pending)
        if self._engine is not None and saved["engine"] is not None:
            self._engine.restore(saved["engine"])
            self._load = self._engine.load

    def _no_costs(self) -> Int64s:
        return np.empty((0, len(self._limits)), np.int64)

    def _settle(self, engine: WindowEngine) -> None:
        """Hand the pending samples to the window packer; no pack is due."""
        packs = self._feed(engine)
        assert not packs, "push emits packs as soon as they are due"

    def _feed(self, engine: WindowEngine) -> list[list[int]]:
        costs = np.array(self._pending, np.int64) if self._pending else self._no_costs()
        first = self._num_arrived - len(self._pending)
        self._pending = []
        packs = engine.feed(costs, first, self._lookahead, self._max_load)
        self._load = engine.load
        return packs

    def _pack_window(self) -> list[list[int]]:
        """Pack all samples that wait with an algorithm that packs at once."""
        if not self._pending:
            return []
        problem = problem_of(np.array(self._pending, np.int64), self._budget_A)
        bins, loads = pack_at_once(problem, self.method, delta=self._delta)
        num_bins = loads.shape[0]
        packs: list[list[int]] = [[] for _ in range(num_bins)]
        first = self._num_arrived - len(self._pending)
        for arrival, bin_id in enumerate(bins.tolist(), first):
            packs[bin_id].append(arrival)
        self._pending, self._load = [], 0
        self._longest_wait = max(self._longest_wait, num_bins - 1)
        self._longest_delay = max(self._longest_delay, bins.shape[0] - 1)
        return self._shuffled(packs)

    def _shuffled(self, packs: list[list[int]]) -> list[list[int]]:
        """Return packs in an order that depends on the seed and the number of packs before them."""
        order = np.random.default_rng([self._seed & _SEED_MASK, self._num_packs]).permutation(len(packs))
        return [packs[index] for index in order.tolist()]

    def _count(self, packs: list[list[int]]) -> list[list[int]]:
        self._num_packs += len(packs)
        return packs
