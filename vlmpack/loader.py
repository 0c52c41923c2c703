"""A DataLoader over a stream of packs that stops after any batch and goes on from there, bit for bit.

Workers run ahead of the training loop, so where a worker stands is not where the run stands. Here each
batch brings along where its worker stood behind it, and the loader keeps that of the last batch that was
handed out:

    worker 0    batch 0 + place    batch 2 + place    batch 4 + place    (made, not handed out)
    worker 1    batch 1 + place    batch 3 + place
    handed out  0  1  2
    position    worker 0 behind batch 2, worker 1 behind batch 1, worker 1 is next

For a data set with a length, `vlmpack.PackLoader` over an index is better: its position is one integer and
suits any number of workers and ranks.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlmpack.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vlmpack.packing.assemble import PackedSequence
    from vlmpack.packing.dataset import ConstantLengthDataset
    from vlmpack.packing.place import StreamPlace


class ResumableState(TypedDict):
    """Where a `ResumableLoader` stands; plain values, fit for JSON, under 4 kB a worker."""

    num_workers: int
    """Workers of the run; each has a part of the data and packs of its own."""
    epoch: int
    """The pass over the data."""
    turn: int
    """The worker whose batch comes next."""
    workers: list[StreamPlace | None]
    """Where each stands; None before its first batch."""


class _Made(NamedTuple):
    """What a worker sends."""

    worker: int
    batch: Any
    """None behind the last batch."""
    place: StreamPlace


class _Position(NamedTuple):
    """Where the run stands."""

    places: tuple[StreamPlace | None, ...]
    """Of each worker."""
    turn: int
    """The worker whose batch comes next."""


class _Batches(IterableDataset[_Made]):
    """The batches of one worker, each with where the worker stood behind it."""

    def __init__(
        self,
        packs: ConstantLengthDataset,
        batch_size: int,
        collate_fn: Callable[[Sequence[PackedSequence]], Any],
        places: tuple[StreamPlace | None, ...],
    ) -> None:
        self._packs = packs
        self._batch_size = batch_size
        self._collate_fn = collate_fn
        self._places = places

    def __iter__(self) -> Iterator[_Made]:
        info = get_worker_info()
        worker = info.id if info is not None else 0
        self._packs.load_state_dict(self._places[worker])
        batch: list[PackedSequence] = []
        packs = iter(self._packs)
        try:
            for pack in packs:
                batch.append(pack)
                if len(batch) == self._batch_size:
                    yield _Made(worker, self._collate_fn(batch), self._packs.state_dict())
                    batch = []
            if batch:
                yield _Made(worker, self._collate_fn(batch), self._packs.state_dict())
            yield _Made(worker, None, self._packs.state_dict())
        finally:
            packs.close()  # type: ignore[attr-defined]  # ends its threads now, not when it is collected


class ResumableLoader:
    """Batches of a stream of packs; its position is that of the last batch that was handed out.

    Iterating gives one epoch, or the rest of it: after `load_state_dict`, after a loop that stopped early,
    and after a worker was killed. The next iteration gives the next epoch.

    Args:
        packs: The stream.
        batch_size: Packs a batch.
        collate_fn: Packs -> batch, such as a `VQACollator`.
        num_workers: Processes that make batches; each packs a part of the data.
        **loader_options: For `torch.utils.data.DataLoader`, such as pin_memory or prefetch_factor.

    Raises:
        ConfigError: If a setting is invalid, or the data set cannot find a place again.
    """

    def __init__(
        self,
        packs: ConstantLengthDataset,
        *,
        batch_size: int,
        collate_fn: Callable[[Sequence[PackedSequence]], Any],
        num_workers: int = 0,
        **loader_options: Any,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        taken = {"sampler", "shuffle", "batch_sampler", "drop_last", "persistent_workers", "in_order"}
        if taken & loader_options.keys():
            raise ConfigError(f"{', '.join(sorted(taken & loader_options.keys()))} would break the resume")
        packs.check_resumable()
        self.packs = packs
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._collate_fn = collate_fn
        self._options = loader_options
        self._epoch = 0
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        # One attribute, set in one step: a signal that says that a worker died may come at any time.
        self._position = _Position(places=(None,) * max(self.num_workers, 1), turn=0)

    def __iter__(self) -> Iterator[Any]:
        self.packs.load_state_dict(None)
        self.packs.set_epoch(self._epoch)
        loader: DataLoader[_Made] = DataLoader(
            _Batches(self.packs, self.batch_size, self._collate_fn, self._position.places),
            batch_size=None,
            num_workers=self.num_workers,
            **{"generator": torch.Generator(), **self._options},
        )
        made = self._in_turn(iter(loader))
        try:
            yield from made
        finally:
            made.close()  # type: ignore[attr-defined]
        self._epoch += 1
        self._begin_epoch()

    def _in_turn(self, messages: Iterator[_Made]) -> Iterator[Any]:
        """Yield batches worker by worker, beginning with the one whose turn it was when the run stopped.

        A DataLoader begins with worker 0, so up to `num_workers` - 1 batches wait here.

        Raises:
            SourceError: If a worker was killed.
        """
        places, worker = list(self._position.places), self._position.turn
        waiting: list[deque[_Made]] = [deque() for _ in places]
        has_ended = [False] * len(places)  # one that had ended says so once more, its counts being in by then
        while not all(has_ended):
            batch = None
            if not has_ended[worker]:
                while not waiting[worker]:
                    message = self._next(messages)
                    waiting[message.worker].append(message)
                _, batch, places[worker] = waiting[worker].popleft()
                has_ended[worker] = batch is None
            worker = (worker + 1) % len(places)
            # Set before the batch is handed out: a state taken between batches includes this one.
            self._position = _Position(tuple(places), worker)
            if batch is not None:
                yield batch

    def _next(self, messages: Iterator[_Made]) -> _Made:
        try:
            return next(messages)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or isinstance(error, SourceError):
                raise
            raise SourceError(
                f"{error!s:.500} The system ends a process like this when memory runs out. The position "
                "behind the last batch is safe: iterate again to go on from it, here or, by state_dict, in a "
                "new run with fewer workers' worth of memory a process (queue_size, prefetch_factor)"
            ) from error

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data comes next; needed only to skip or to repeat one.

        Args:
            epoch: From 0.

        Raises:
            ConfigError: If the run stands inside another epoch.
        """
        if epoch == self._epoch:
            return
        if any(place is not None for place in self._position.places):
            raise ConfigError(
                f"the run stands inside epoch {self._epoch}, so set_epoch({epoch}) would throw its position "
                "away; make a new loader if that is meant"
            )
        self._epoch = epoch

    def state_dict(self) -> ResumableState:
        """Return where the run stands after the last batch handed out."""
        places, turn = self._position
        return ResumableState(
            num_workers=self.num_workers, epoch=self._epoch, turn=turn, workers=list(places)
        )

    def load_state_dict(self, state: ResumableState) -> None:
        """Go on from a saved state, with the same number of workers and any batch size.

        Args:
            state: From `state_dict`, over the same data with the same settings.

        Raises:
            ConfigError: If it is of another number of workers, data set, tokenizer or setting.
        """
        if max(state["num_workers"], 1) != max(self.num_workers, 1):
            raise ConfigError(
                f"the saved run had {state['num_workers']} workers, this one has {self.num_workers}: each "
                f"packs a part of its own. Use num_workers={state['num_workers']}, or an index "
                "(ConstantLengthDataset.index with PackLoader), which suits any number"
            )
        for place in state["workers"]:
            self.packs.load_state_dict(place)  # refuses what does not belong to it
        self.packs.load_state_dict(None)
        self._epoch = state["epoch"]
        self._position = _Position(tuple(state["workers"]), state["turn"])
