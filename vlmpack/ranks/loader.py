"""Even ranks and exact resume in index mode: every rank gets as many packs, each sample comes once.

    plan order    p0 p1 p2 p3 p4 p5 p6                       7 packs, 2 ranks: not even
    made even     p0 p1 p2 p3 p4 p5 p6a p6b                  the fullest one by count is split in two
    rank 0        p0    p2    p4    p6a
    rank 1           p1    p3    p5    p6b

No rank talks to another. Where a run stands is the plan's digest, the epoch, and how many packs all
ranks together have had; so a run resumes with other workers, batch sizes or ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from torch.utils.data import DataLoader

from vlmpack.errors import ConfigError
from vlmpack.ranks.order import epoch_order, even

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vlmpack.packing.assemble import PackedSequence
    from vlmpack.packing.index import IndexedPacks
    from vlmpack.packing.inputs import Int64s


class LoaderState(TypedDict):
    """Where a run stands; plain values, fit for JSON, the same on every rank."""

    digest: str
    """The plan."""
    seed: int
    """Decides the order of packs in each epoch."""
    epoch: int
    """The pass over the data, from 0."""
    stages: list[list[int]]
    """[ranks, packs that all of them had together] in the order of the run's parts in this epoch."""


class PackLoader:
    """Batches of an indexed data set for one rank; resumes exactly, evenly over any number of ranks.

    Iterating gives one epoch, or the rest of it after `load_state_dict`; the next iteration gives the
    next epoch.

    Args:
        packs: From `ConstantLengthDataset.index`.
        batch_size: Packs a batch.
        collate_fn: Packs -> batch, such as a `VQACollator`.
        rank: This process, from 0.
        world_size: Processes in all.
        seed: Decides the order of packs in each epoch.
        **loader_options: For `torch.utils.data.DataLoader`, such as num_workers or pin_memory.

    Raises:
        ConfigError: If a setting is invalid.
    """

    def __init__(
        self,
        packs: IndexedPacks,
        *,
        batch_size: int,
        collate_fn: Callable[[Sequence[PackedSequence]], Any],
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        **loader_options: Any,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        taken = {"sampler", "shuffle", "batch_sampler", "drop_last"} & loader_options.keys()
        if taken:
            raise ConfigError(f"{', '.join(sorted(taken))} would break the even split or the resume")
        self.packs = packs
        self.batch_size = batch_size
        self._collate_fn = collate_fn
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._options = loader_options
        self._epoch = 0
        self._stages: list[tuple[int, int]] = []
        self._num_had = 0
        """Packs that this rank handed out since the last stage."""
        self._spans = np.stack([packs.starts[:-1], packs.starts[1:]], axis=1)

    def __len__(self) -> int:
        """Return the batches that are left of this epoch, the same on every rank."""
        return -(-len(self._rest()) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        rest = self._rest()
        loader = DataLoader(
            self.packs,
            batch_size=self.batch_size,
            sampler=[(start, stop) for start, stop in rest.tolist()],
            collate_fn=self._collate_fn,
            **self._options,
        )
        num_left = len(rest)
        for batch in loader:
            # Counted before it is handed out: a state taken between batches includes this one.
            had = min(self.batch_size, num_left)
            num_left -= had
            self._num_had += had
            yield batch
        self._epoch += 1
        self._stages, self._num_had = [], 0

    def state_dict(self) -> LoaderState:
        """Return where the run stands after the last batch handed out; the same on every rank."""
        return LoaderState(
            digest=self.packs.index.digest,
            seed=self._seed,
            epoch=self._epoch,
            stages=[list(stage) for stage in self._all_stages()],
        )

    def load_state_dict(self, state: LoaderState) -> None:
        """Go on from a saved state, with any number of ranks, workers and packs a batch.

        Args:
            state: From `state_dict` over the same index.

        Raises:
            ConfigError: If the state is of another plan or order.
        """
        if state["digest"] != self.packs.index.digest:
            raise ConfigError(
                f"the saved position is of plan {state['digest']}, this is plan {self.packs.index.digest}: "
                "the data, the tokenizer, the tiling or the budget changed, so the position means nothing"
            )
        if state["seed"] != self._seed:
            raise ConfigError(f"the saved run had seed {state['seed']}, this one has {self._seed}")
        self._epoch = state["epoch"]
        self._stages = [(world_size, num_had) for world_size, num_had in state["stages"]]
        self._num_had = 0

    def _all_stages(self) -> list[tuple[int, int]]:
        """Return the finished parts of the epoch and this one, those that moved nothing left out."""
        had = (self._world_size, self._num_had * self._world_size)
        return [stage for stage in [*self._stages, had] if stage[1]]

    def _rest(self) -> Int64s:
        """Return int64 [packs, 2]: what this rank has yet to hand out in this epoch."""
        spans = epoch_order(self._spans, seed=self._seed, epoch=self._epoch)
        for world_size, num_had in self._all_stages():
            spans = even(spans, world_size)[num_had:]
        return even(spans, self._world_size)[self._rank :: self._world_size]
