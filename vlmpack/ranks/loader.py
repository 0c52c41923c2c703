"""Index mode: even ranks, balanced steps and exact resume; each sample comes once.

    plan order    p0 p1 p2 p3 p4 p5 p6                       7 packs, 2 ranks: not even
    made even     p0 p1 p2 p3 p4 p5 p6a p6b                  the fullest one by count is split in two
    rank 0        p0    p2    p4    p6a
    rank 1           p1    p3    p5    p6b

No rank talks to another: all compute the same order. Where a run stands is the plan's digest, the epoch, and
how many packs all ranks together have had; so a run resumes with other workers, batch sizes or ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypedDict, get_args

import numpy as np
from torch.utils.data import DataLoader

from vlmpack.errors import ConfigError
from vlmpack.ranks.balance import Balance
from vlmpack.ranks.imbalance import LoadImbalance, load_imbalance
from vlmpack.ranks.order import LEAST_STEPS, Balancing, Stage, epoch_order, even

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vlmpack.packing.assemble import PackedSequence
    from vlmpack.packing.index import IndexedPacks

_SETTINGS: Final = ("seed", "balance", "window")
"""What decides the order, and so must be the same in a run that goes on."""


class LoaderState(TypedDict):
    """Where a run stands; plain values, fit for JSON, the same on every rank."""

    digest: str
    """The plan."""
    seed: int
    """Decides the order of packs in each epoch."""
    balance: Balance | None
    """What the ranks of a step share evenly."""
    window: int | None
    """Packs that are put into steps together."""
    epoch: int
    """The pass over the data, from 0."""
    stages: list[list[int]]
    """[ranks, packs a batch, packs that all ranks had together] for each part of the run in this epoch."""


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
        balance: What the ranks of a step should share evenly: "patches" (the vision encoder's work),
            "attention" (the language model's, the sum of squared sample lengths), or "both". Packs of a
            kind then meet in one step. None keeps the random order.
        window: Packs that are put into balanced steps together. More balance better, and leave the order
            less random. None: 1,024, and at least 128 steps.
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
        balance: Balance | None = None,
        window: int | None = None,
        **loader_options: Any,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        _check_balance(balance, window, world_size * batch_size)
        taken = {"sampler", "shuffle", "batch_sampler", "drop_last"} & loader_options.keys()
        if taken:
            raise ConfigError(f"{', '.join(sorted(taken))} would break the even split or the resume")
        self.packs = packs
        self.batch_size = batch_size
        self._collate_fn = collate_fn
        self.rank = rank
        self.world_size = world_size
        self._options = loader_options
        self._order = Balancing(balance=balance, window=window, seed=seed, load_prefix=packs.load_prefix())
        self._spans = np.stack([packs.starts[:-1], packs.starts[1:]], axis=1)
        self._start_epoch(0)

    def __len__(self) -> int:
        """Return the batches that are left of this epoch, the same on every rank."""
        num_left = (len(self._begun) - self._num_had) // self.world_size
        return -(-num_left // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        stage = self._stage()
        num_left = (len(self._begun) - stage.num_had) // self.world_size
        loader = DataLoader(
            self.packs,
            batch_size=self.batch_size,
            sampler=self._mine(stage),
            collate_fn=self._collate_fn,
            **self._options,
        )
        for batch in loader:
            # Counted before it is handed out: a state taken between batches includes this one.
            had = min(self.batch_size, num_left)
            num_left -= had
            self._num_had += had * self.world_size
            yield batch
        self._start_epoch(self._epoch + 1)

    def state_dict(self) -> LoaderState:
        """Return where the run stands after the last batch handed out; the same on every rank."""
        return LoaderState(
            digest=self.packs.index.digest,
            seed=self._order.seed,
            balance=self._order.balance,
            window=self._order.window,
            epoch=self._epoch,
            stages=[list(stage) for stage in [*self._stages, self._stage()] if stage.num_had],
        )

    def load_state_dict(self, state: LoaderState) -> None:
        """Go on from a saved state, with any number of ranks, workers and packs a batch.

        Args:
            state: From `state_dict` over the same index.

        Raises:
            ConfigError: If the state is of another plan or order, or is none.
        """
        missing = sorted(LoaderState.__required_keys__ - state.keys())
        if missing:
            raise ConfigError(f"the saved position lacks {', '.join(missing)}: it is not one of this version")
        if state["digest"] != self.packs.index.digest:
            raise ConfigError(
                f"the saved position is of plan {state['digest']}, this is plan {self.packs.index.digest}: "
                "the data, the tokenizer, the tiling or the budget changed, so the position means nothing"
            )
        for name in _SETTINGS:
            ours, theirs = getattr(self._order, name), state[name]
            if ours != theirs:
                raise ConfigError(
                    f"the saved run had {name} {theirs}, this one has {ours}: its order is another, so go on "
                    f"with {name}={theirs!r}"
                )
        self._start_epoch(state["epoch"], [Stage(*stage) for stage in state["stages"]])

    def load_imbalance(self) -> LoadImbalance:
        """Return how unevenly the ranks are loaded in what is left of this epoch, from costs alone.

        O(packs), 10 to 30 ms for 1,024 of them where they are balanced; nothing is read or decoded. Compare
        with a loader that balances nothing.
        """
        blocks = list(self._order.blocks(self._begun, self._stage(), epoch=self._epoch))
        spans = np.concatenate(blocks) if blocks else self._begun[:0]
        return load_imbalance(
            self._order.loads(spans), world_size=self.world_size, batch_size=self.batch_size
        )

    def _start_epoch(self, epoch: int, stages: Sequence[Stage] = ()) -> None:
        """Stand in an epoch behind these stages."""
        self._epoch = epoch
        self._stages = list(stages)
        self._num_had = 0
        """Packs that all ranks together had in this stage."""
        if self._stages and self._stages[-1][:2] == (self.world_size, self.batch_size):
            # The same stage goes on: begun anew, its windows would lie elsewhere.
            self._num_had = self._stages.pop().num_had
        spans = epoch_order(self._spans, seed=self._order.seed, epoch=epoch)
        for stage in self._stages:
            spans = self._order.after(even(spans, stage.world_size), stage, epoch=epoch)
        self._begun = even(spans, self.world_size)
        """int64 [packs, 2]: what this stage began with."""

    def _stage(self) -> Stage:
        return Stage(self.world_size, self.batch_size, self._num_had)

    def _mine(self, stage: Stage) -> Iterator[tuple[int, int]]:
        """Yield what this rank has yet to hand out in this epoch."""
        for block in self._order.blocks(self._begun, stage, epoch=self._epoch):
            mine = block[self.rank :: self.world_size]
            yield from zip(mine[:, 0].tolist(), mine[:, 1].tolist(), strict=True)


def _check_balance(balance: Balance | None, window: int | None, size: int) -> None:
    """Check how steps of `size` packs are to be balanced.

    Raises:
        ConfigError: If they cannot be.
    """
    if balance is not None and balance not in get_args(Balance):
        raise ConfigError(f"balance must be one of {', '.join(get_args(Balance))} or None, got {balance!r}")
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ConfigError(f"window must be a positive integer or None, got {window!r}")
    if balance is None:
        raise ConfigError(f"window={window} has no use without balance; set balance or leave window out")
    if window < 2 * size:
        raise ConfigError(
            f"window {window} is too small: a step has {size} packs, and a window needs two steps or more "
            f"to choose from. Use {LEAST_STEPS * size}, or leave window out"
        )
