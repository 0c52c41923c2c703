"""Feed: the batches of one rank as the Trainer's loop wants them, with a position that can be saved.

The Trainer thinks in epochs of a number of steps fixed at the start, and goes back to a position by
reading and dropping batches. A feed never ends: the Trainer takes as many batches as it calls an epoch, and
the next pass over the data begins when the one before ends. After a resume the feed stands at the saved
position already; it answers the batches that the Trainer wants to drop with as many empty places:

    the Trainer drops 3, then trains        . . . b3 b4 b5 | b0 ...
    a feed with a saved position            - - - b3 b4 b5 | b0 ...     nothing is read twice

accelerate's `prepare` must not see the loader: its dispatcher cuts flat tensors (see docs/training.md).
"""

from __future__ import annotations

import logging
from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, IterableDataset

from vlmpack.errors import ConfigError, SourceError
from vlmpack.loader import ResumableLoader
from vlmpack.packing import ConstantLengthDataset
from vlmpack.packing.index import IndexedPacks
from vlmpack.ranks import EvenRanks, PackLoader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


@runtime_checkable
class Resumable(Protocol):
    """A loader whose position can be saved and restored."""

    def state_dict(self) -> Any:
        """Return the position, fit for JSON."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Go on from a position."""
        ...


def make_loader(
    data: object, args: TrainingArguments, *, collate_fn: Callable[..., Any], batch_size: int, seed: int
) -> Any:
    """Return a loader of this rank's batches. Iterating it gives one pass.

    Args:
        data: Packs by index, a stream of packs, or a loader that somebody made of either.
        args: Rank, ranks and loader settings.
        collate_fn: Packs -> batch; not used where `data` is a loader.
        batch_size: Packs a batch; not used where `data` is a loader.
        seed: Decides the order of packs; not used where `data` is a loader.

    Raises:
        ConfigError: If `data` is something else, or a loader for another rank.
    """
    if isinstance(data, PackLoader):
        _check_rank(data, args)
        return data
    options = {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
    }
    if isinstance(data, IndexedPacks):
        return PackLoader(
            data,
            batch_size=batch_size,
            collate_fn=collate_fn,
            rank=args.process_index,
            world_size=args.world_size,
            seed=seed,
            **options,
        )
    if isinstance(data, ConstantLengthDataset):
        return _stream_loader(data, batch_size, collate_fn, options)
    if isinstance(data, (DataLoader, EvenRanks, Resumable)):
        return data
    raise ConfigError(
        f"a {type(data).__name__} is not packed: give a ConstantLengthDataset, what its index() returns, or "
        "a loader over one of them (PackLoader, DataLoader, EvenRanks)"
    )


def _stream_loader(
    packs: ConstantLengthDataset, batch_size: int, collate_fn: Callable[..., Any], options: dict[str, Any]
) -> Any:
    """Return a loader that can be resumed, where the stream's source can find a place again."""
    try:
        packs.check_resumable()
    except ConfigError as error:
        logger.info("a checkpoint will be read up to, not sought: %s", error)
        return DataLoader(packs, batch_size=batch_size, collate_fn=collate_fn, **options)
    return ResumableLoader(packs, batch_size=batch_size, collate_fn=collate_fn, **options)


def _check_rank(loader: PackLoader, args: TrainingArguments) -> None:
    if (loader.rank, loader.world_size) != (args.process_index, args.world_size):
        raise ConfigError(
            f"the PackLoader is for rank {loader.rank} of {loader.world_size}, this process is rank "
            f"{args.process_index} of {args.world_size}: make it with rank=args.process_index and "
            "world_size=args.world_size, or give the trainer the packs instead"
        )


def passes_length(loader: Any) -> int | None:
    """Return the batches of a whole pass on this rank, None where nobody knows.

    Args:
        loader: From `make_loader`.
    """
    if isinstance(loader, PackLoader):  # its own length is what is left of this pass
        packs_a_rank = -(-len(loader.packs) // loader.world_size)
        return -(-packs_a_rank // loader.batch_size)
    try:
        return len(loader)
    except TypeError:
        return None


def num_samples(loader: Any, world_size: int) -> int:
    """Return the samples of a pass over all ranks where they are known, else its packs.

    Args:
        loader: From `make_loader`.
        world_size: Ranks.
    """
    if isinstance(loader, PackLoader):
        return len(loader.packs.index.rows)
    return (passes_length(loader) or 0) * (getattr(loader, "batch_size", None) or 1) * world_size


class Feed(IterableDataset[Any]):
    """Batches without end, for `DataLoader(feed, batch_size=None)`.

    Args:
        loader: From `make_loader`.
        num_to_skip: Called at each iteration: the batches that the Trainer will drop.
    """

    def __init__(self, loader: Any, *, num_to_skip: Callable[[], int] = int) -> None:
        self.loader = loader
        self._num_to_skip = num_to_skip
        self._length = passes_length(loader)
        self._batches: Iterator[Any] = iter(())
        self._num_since_start = 0
        self._stands_at_position = False

    def __len__(self) -> int:
        """Return what the Trainer shall call an epoch.

        Raises:
            TypeError: If the length of a pass is not known; the Trainer needs `max_steps` then.
        """
        if self._length is None:
            raise TypeError("a stream of packs has no length")
        return self._length

    def __iter__(self) -> Iterator[Any]:
        if self._stands_at_position:
            self._stands_at_position = False
            yield from repeat(None, self._num_to_skip())
        while True:
            yield self._next()

    def _next(self) -> Any:
        """Return the next batch, of the next pass where this one is at its end.

        Raises:
            SourceError: If a whole pass gives nothing.
        """
        for _ in range(3):  # the end of this pass, and a position at the very end of one
            for batch in self._batches:
                self._num_since_start += 1
                return batch
            self._batches = iter(self.loader)
        raise SourceError(
            f"the data gave {self._num_since_start} batches and then, read once more, none: a loader must "
            "begin again when it is iterated again"
        )

    @property
    def kind(self) -> str:
        """The loader's class, since positions of different ones do not fit each other."""
        return type(self.loader).__name__

    def state_dict(self) -> Any:
        """Return the loader's position after the last batch handed out; None where it has none."""
        return self.loader.state_dict() if _has_position(self.loader) else None

    def load_state_dict(self, state: Any, *, kind: str, same_ranks: bool) -> None:
        """Go on from a position. Without one, the Trainer reads up to it and drops what it reads.

        Args:
            state: From `state_dict`.
            kind: The loader's class when the position was saved.
            same_ranks: Whether the run has as many ranks as then.

        Raises:
            ConfigError: If the position is that of another kind of loader, or of other ranks.
        """
        if kind != self.kind:
            raise ConfigError(
                f"the checkpoint has the position of a {kind} in the data, which means nothing to a "
                f"{self.kind}: resume with the kind of data that the run began with"
            )
        if not same_ranks and not isinstance(self.loader, PackLoader):
            raise ConfigError(
                "the number of ranks changed since the checkpoint; only packs by index can be dealt anew"
            )
        if state is None:
            return
        self.loader.load_state_dict(state)
        self._batches = iter(())
        self._stands_at_position = True


def _has_position(loader: Any) -> bool:
    return loader.has_state if isinstance(loader, EvenRanks) else isinstance(loader, Resumable)


def as_dataloader(feed: Feed) -> DataLoader[Any]:
    """Return the feed as the `DataLoader` that the Trainer's loop expects, unprepared.

    Args:
        feed: Of this rank.
    """
    return DataLoader(feed, batch_size=None, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
