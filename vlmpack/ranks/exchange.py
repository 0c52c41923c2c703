"""What the ranks of a stream tell each other, through torch.distributed: a few integers a step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
import torch.distributed as dist

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

Value = TypeVar("Value")


class Exchange(Protocol):
    """Calls that all ranks make together."""

    rank: int
    """This process, from 0."""
    world_size: int
    """Processes in all."""

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Return the sums over all ranks, number by number."""
        ...

    def lowest(self, number: int) -> int:
        """Return the smallest of all ranks' numbers."""
        ...

    def copy_of(self, value: Value, source: int) -> Value:
        """Return what rank `source` passed."""
        ...


class Alone:
    """One process: there is nobody to tell."""

    def __init__(self) -> None:
        self.rank = 0
        self.world_size = 1

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Return the numbers."""
        return list(numbers)

    def lowest(self, number: int) -> int:
        """Return the number."""
        return number

    def copy_of(self, value: Value, source: int) -> Value:
        """Return the value."""
        assert source == 0
        return value


class Distributed:
    """The ranks of a process group; numbers travel as int64 tensors.

    Args:
        group: Takes part in every call as a whole. NCCL sums on the device, for which the host waits;
            gloo does not disturb it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        self._device = torch.device("cpu") if _takes_cpu(group) else torch.device("cuda")

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Return the sums over all ranks, number by number: one all_reduce."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def lowest(self, number: int) -> int:
        """Return the smallest of all ranks' numbers."""
        return self._reduced([number], dist.ReduceOp.MIN)[0]

    def copy_of(self, value: Value, source: int) -> Value:
        """Return what rank `source` passed; pickled, as between the workers of a DataLoader."""
        values = [value]
        source = dist.get_global_rank(self._group, source)
        dist.broadcast_object_list(values, src=source, group=self._group, device=self._device)
        return values[0]

    def _reduced(self, numbers: Sequence[int], operation: dist.ReduceOp.RedOpType) -> list[int]:
        shared = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        dist.all_reduce(shared, op=operation, group=self._group)
        return [int(number) for number in shared.tolist()]


def connect(group: dist.ProcessGroup | None = None) -> Exchange:
    """Return the way to the other ranks. Every rank calls it, as it may make a process group.

    Args:
        group: Ranks that read one stream together; all of them where None, through gloo.

    Raises:
        ConfigError: If there are other ranks, and torch.distributed does not know them yet.
    """
    if group is not None:
        return Distributed(group)
    if not (dist.is_available() and dist.is_initialized()):
        world_size = os.environ.get("WORLD_SIZE", "1")
        if world_size != "1":
            raise ConfigError(
                f"WORLD_SIZE is {world_size}, but the ranks do not know each other yet: call "
                "torch.distributed.init_process_group before iterating"
            )
        return Alone()
    world = dist.group.WORLD
    assert world is not None
    if _takes_cpu(world):
        return Distributed(world)
    made = dist.new_group(backend="gloo")
    assert isinstance(made, dist.ProcessGroup)
    return Distributed(made)


def _takes_cpu(group: dist.ProcessGroup) -> bool:
    return "cpu" in dist.get_backend_config(group)
