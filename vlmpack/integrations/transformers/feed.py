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

from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, IterableDataset

from vlmpack.errors import ConfigError, SourceError
from vlmpack.packing import ConstantLengthDataset
from vlmpack.packing.index import IndexedPacks
from vlmpack.ranks import PackLoader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import TrainingArguments


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
    if isinstance(data, DataLoader):
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
        return DataLoader(data, batch_size=batch_size, collate_fn=collate_fn, **options)
    raise ConfigError(
        f"a {type(data).__name__} is not packed: give a ConstantLengthDataset, what its index() returns, or "
        "a PackLoader or DataLoader over one of them"
    )


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

    def state_dict(self) -> Any:
        """Return the loader's position after the last batch handed out; None where it has none."""
        return self.loader.state_dict() if isinstance(self.loader, Resumable) else None

    def load_state_dict(self, state: Any, *, same_ranks: bool) -> None:
        """Go on from a position. Without one, the Trainer reads up to it and drops what it reads.

        Args:
            state: From `state_dict`.
            same_ranks: Whether the run has as many ranks as when the position was saved.

        Raises:
            ConfigError: If the position is that of another kind of loader, or of other ranks.
        """
        if not same_ranks and not isinstance(self.loader, PackLoader):
            raise ConfigError(
                "the number of ranks changed since the checkpoint; only packs by index can be dealt anew"
            )
        if (state is not None) != isinstance(self.loader, Resumable):
            raise ConfigError(
                f"the checkpoint {'has' if state is not None else 'lacks'} a position in the data, and a "
                f"{type(self.loader).__name__} {'cannot take' if state is not None else 'needs'} one: "
                "resume with the kind of data that the run began with"
            )
        if state is None:
            return
        self.loader.load_state_dict(state)
        self._batches = iter(())
        self._stands_at_position = True


def as_dataloader(feed: Feed) -> DataLoader[Any]:
    """Return the feed as the `DataLoader` that the Trainer's loop expects, unprepared.

    Args:
        feed: Of this rank.
    """
    return DataLoader(feed, batch_size=None, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
