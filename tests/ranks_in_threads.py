"""Ranks as threads of one process: the same calls as over torch.distributed, without its start-up."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TIMEOUT_S = 20
"""A rank that waits longer is one that would hang."""


class Meeting:
    """Where the ranks of a world leave their numbers for each other."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.left: list[object] = [None] * world_size
        self.barrier = Barrier(world_size, timeout=TIMEOUT_S)
        self.num_meetings = 0

    def gather(self, rank: int, value: object) -> list:
        self.left[rank] = value
        self.barrier.wait()
        values = list(self.left)
        self.num_meetings += rank == 0
        self.barrier.wait()
        return values


class ThreadExchange:
    """One rank's way to the others."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank, self.world_size, self._meeting = rank, meeting.world_size, meeting

    def total(self, numbers: Sequence[int]) -> list[int]:
        return [sum(column) for column in zip(*self._meeting.gather(self.rank, list(numbers)), strict=True)]

    def lowest(self, number: int) -> int:
        return min(self._meeting.gather(self.rank, number))

    def copy_of(self, value, source: int):
        return copy.deepcopy(self._meeting.gather(self.rank, value)[source])


def run_ranks(world_size: int, run: Callable[[ThreadExchange], object]) -> tuple[list, Meeting]:
    """Return what each rank returned or raised; a rank that waits in vain is a failure."""
    meeting = Meeting(world_size)

    def outcome(rank: int) -> object:
        try:
            return run(ThreadExchange(meeting, rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(outcome, range(world_size))), meeting
