"""The window packer with its arrays: whole data sets, streams, and its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias, TypedDict

import numpy as np

from vlmpack.errors import ConfigError
from vlmpack.kernels.completion import make_scratch
from vlmpack.kernels.window import (
    ARRIVAL,
    BORN,
    CLASS,
    COARSE,
    COST,
    COUNT,
    FINE,
    HIDDEN,
    INDEX,
    KEY,
    LEAST,
    LONGEST_DELAY,
    LONGEST_WAIT,
    MAX_LOOKAHEAD,
    MEMBER,
    NEWER,
    OLDER,
    ORDER,
    PLACE,
    SHIFT,
    SIZE,
    SLOT_BITS,
    TOTAL,
    UNIT,
    make_window,
)
from vlmpack.kernels.window_fill import window_feed, window_fill

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.packing.inputs import Int64s

Balance: TypeAlias = Literal["patches", "attention", "both"]
"""What to spread evenly over packs: ViT patches (axis 2), squared token counts (axis 0), or both."""

MAX_LOAD: Final = 1 << 62

_STAGE: Final = 256
"""Rows of costs that are fetched at a time."""

_SAVED: Final = (INDEX, BORN, ARRIVAL)
"""Fields of a slot that its costs do not give."""


class Effort(NamedTuple):
    """How hard the window packer works."""

    tries: int
    """Packs that are tried for each that is made."""
    lookahead: int
    """Samples that wait, where the caller does not say."""


EFFORTS: Final[dict[str, Effort]] = {
    "fast": Effort(tries=1, lookahead=256),
    "balanced": Effort(tries=4, lookahead=512),
    "best": Effort(tries=16, lookahead=1024),
}


class EngineState(TypedDict):
    """Where a window packer stands, as lists of integers."""

    meta: list[int]
    order: list[int]
    waiting: list[list[int]]


class WindowEngine:
    """Fills packs from a look-ahead window; see `vlmpack.kernels.window_fill`.

    Args:
        budget: int64 [A], checked.
        lookahead: Samples that may wait.
        tries: Packs to try for each pack.
        seed: Decides the random picks.
        balance: What to spread evenly over packs.

    Raises:
        ConfigError: If the look-ahead is too large, or there is no third axis to balance.
    """

    def __init__(
        self, budget: Int64s, *, lookahead: int, tries: int, seed: int, balance: Balance | None = None
    ) -> None:
        if lookahead > MAX_LOOKAHEAD:
            raise ConfigError(f"lookahead is {lookahead}, at most {MAX_LOOKAHEAD} samples can wait")
        if balance in {"patches", "both"} and budget.shape[0] < 3:
            raise ConfigError(
                f"balance={balance!r} needs patches as the third axis, costs have {budget.shape[0]}"
            )
        self.lookahead = lookahead
        self._balance = balance
        self._num_hard = int(budget.shape[0])
        num_soft = {None: 0, "patches": 1, "attention": 1, "both": 2}[balance]
        self._budget_A = np.concatenate([budget, np.ones(num_soft, np.int64)])
        self._window = make_window(lookahead, self._budget_A.shape[0])
        self._scratch = make_scratch(lookahead, self._budget_A)
        self._seed = seed & 0x7FFFFFFF
        self._tries = tries

    @property
    def num_waiting(self) -> int:
        """Samples in the window."""
        return int(self._window.meta[COUNT])

    @property
    def load(self) -> int:
        """Sum of the waiting samples' costs on axis 0."""
        return int(self._window.meta[TOTAL])

    @property
    def longest_wait(self) -> int:
        """The most packs that were emitted while a sample waited."""
        return int(self._window.meta[LONGEST_WAIT])

    @property
    def longest_delay(self) -> int:
        """The most samples that were fed after a sample and before its pack was emitted."""
        return int(self._window.meta[LONGEST_DELAY])

    def pack_all(self, cost_NA: Int64s, order_N: Int64s | npt.NDArray[np.int32], pack_N: Int64s) -> int:
        """Pack all samples; return the number of packs.

        Args:
            cost_NA: int64 [N, A], checked.
            order_N: int32 [N], the order in which samples enter the window.
            pack_N: int64 [N], the output, packs in the order in which they close.
        """
        scratch = self._scratch
        return window_fill(
            *self._window,
            self._budget_A,
            self._num_hard,
            scratch.room,
            scratch.price,
            scratch.trial,
            scratch.pack,
            self._seed,
            self._tries,
            self._with_balanced_axes(cost_NA),
            order_N,
            np.empty((_STAGE, self._budget_A.shape[0]), np.int64),
            pack_N,
        )

    def feed(
        self, cost_MA: Int64s, first_arrival: int, max_waiting: int, max_load: int = MAX_LOAD
    ) -> list[list[int]]:
        """Push samples one after the other; return the packs that became due, samples ascending.

        Args:
            cost_MA: int64 [M, A], checked.
            first_arrival: Arrival index of the first of them.
            max_waiting: Packs are made until fewer than this many samples wait; 1 empties the window.
            max_load: And until the samples that wait use less than this of axis 0.
        """
        capacity = self.num_waiting + cost_MA.shape[0]
        member_M, end_P = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
        scratch = self._scratch
        num_packs = window_feed(
            *self._window,
            self._budget_A,
            self._num_hard,
            scratch.room,
            scratch.price,
            scratch.trial,
            scratch.pack,
            self._seed,
            self._tries,
            self._with_balanced_axes(cost_MA),
            first_arrival,
            max_waiting,
            max_load,
            member_M,
            end_P,
        )
        packs, begin, members = [], 0, member_M.tolist()
        for end in end_P[:num_packs].tolist():
            packs.append(sorted(members[begin:end]))
            begin = end
        return packs

    def state(self) -> EngineState:
        """Return where it stands: O(lookahead) integers."""
        slots, meta = self._window.slots, self._window.meta
        order = slots[:, ORDER]
        fields = [*_SAVED, *range(COST, slots.shape[1])]
        waiting = slots[order[: self.num_waiting]][:, fields]
        return EngineState(meta=meta.tolist(), order=order.tolist(), waiting=waiting.tolist())

    def restore(self, state: EngineState) -> None:
        """Stand where `state` was taken.

        Args:
            state: From an engine with the same settings.
        """
        slots, classes, meta = self._window
        meta[:] = state["meta"]
        slots[:, ORDER] = state["order"]
        slots[slots[:, ORDER], PLACE] = np.arange(self.lookahead)
        classes[:] = HIDDEN
        classes[:, SIZE] = 0
        if not state["waiting"]:
            return
        rows = np.array(state["waiting"], np.int64)
        occupied = slots[: rows.shape[0], ORDER].copy()
        for column, name in enumerate(_SAVED):
            slots[occupied, name] = rows[:, column]
        slots[occupied, COST:] = rows[:, len(_SAVED) :]
        keys = ((slots[occupied, COST + meta[FINE]] >> meta[SHIFT]) << SLOT_BITS) | occupied
        groups = slots[occupied, COST + meta[COARSE]] // meta[UNIT]
        slots[occupied, KEY], slots[occupied, CLASS] = keys, groups
        classes[groups, MEMBER + slots[occupied, INDEX]] = keys
        np.add.at(classes[:, SIZE], groups, 1)
        np.minimum.at(classes[:, LEAST], groups, keys)
        by_age = occupied[np.argsort(slots[occupied, ARRIVAL])]
        slots[by_age[1:], OLDER], slots[by_age[:-1], NEWER] = by_age[:-1], by_age[1:]
        slots[by_age[0], OLDER] = slots[by_age[-1], NEWER] = -1

    def _with_balanced_axes(self, cost_NA: Int64s) -> Int64s:
        columns = [cost_NA]
        if self._balance in {"patches", "both"}:
            columns.append(cost_NA[:, 2:3])
        if self._balance in {"attention", "both"}:
            columns.append(cost_NA[:, :1] ** 2)
        return cost_NA if len(columns) == 1 else np.concatenate(columns, axis=1)
