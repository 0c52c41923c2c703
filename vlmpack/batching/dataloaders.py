"""Making a DataLoader anew with another batch size: every setting kept, the old workers ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmpack.batching.schedule import BatchSizeScheduler

_KEPT: Final = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "drop_last",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)
"""Arguments of a DataLoader that it keeps under the same name."""


def recreate_dataloader(old: DataLoader[Any], batch_size: int, *, seed: int | None = None) -> DataLoader[Any]:
    """Return a loader over the same data with another batch size, and end the old one's workers.

    Sampler, collation, workers, generator and all other settings are the old loader's. A seeded shuffle goes
    on: the generator is handed over with its state, so that epochs stay different from each other and the
    order of a resumed run is that of an uninterrupted one.

    Args:
        old: Not used any more after this.
        batch_size: Of the new loader.
        seed: Gives a shuffle without a generator one of its own; None leaves it to torch's global one.

    Raises:
        ConfigError: If the size is wrong, or the old loader's batches are not of a fixed size.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    if old.batch_size is None:
        raise ConfigError(
            "the loader has no batch size of its own (a batch_sampler, or no batching), so there is none to "
            "change: give the batch sampler the schedule instead"
        )
    options: dict[str, Any] = {name: getattr(old, name) for name in _KEPT if hasattr(old, name)}
    if options["num_workers"] == 0:
        for name in ("prefetch_factor", "persistent_workers", "multiprocessing_context"):
            options.pop(name, None)
    if not isinstance(old.dataset, IterableDataset):
        options["sampler"] = _seeded(old.sampler, seed)
    close_dataloader(old)
    return DataLoader(old.dataset, batch_size=batch_size, **options)


def _seeded(sampler: Any, seed: int | None) -> Any:
    if seed is not None and isinstance(sampler, RandomSampler) and sampler.generator is None:
        sampler.generator = torch.Generator().manual_seed(seed)
    return sampler


def close_dataloader(loader: DataLoader[Any]) -> None:
    """End the worker processes that a loader with persistent workers keeps between epochs.

    Args:
        loader: May be iterated again; it then starts workers anew.
    """
    iterator = loader._iterator  # torch has no public way to end persistent workers
    if iterator is not None:
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
        loader._iterator = None


def scheduled_epochs(
    loader: DataLoader[Any], scheduler: BatchSizeScheduler, num_epochs: int, *, first_epoch: int = 0
) -> Iterator[tuple[int, DataLoader[Any]]]:
    """Yield (epoch, loader) for each epoch of a plain training loop, the loader made anew when it must be.

    Args:
        loader: With the initial batch size; not used directly any more after this.
        scheduler: In epochs.
        num_epochs: The run's epochs, those before `first_epoch` included.
        first_epoch: Where a resumed run begins.

    Yields:
        The epoch's number from 0, and its loader.

    Raises:
        ConfigError: If the schedule does not count epochs.
    """
    if scheduler.config.unit != "epochs":
        raise ConfigError(
            f"this schedule counts {scheduler.config.unit}, so the size changes within an epoch, which one "
            "loader cannot do: take the steps of `plan_batch_sizes`"
        )
    for epoch in range(first_epoch, num_epochs):
        size, _ = scheduler.step(epoch)
        if loader.batch_size != size:
            loader = recreate_dataloader(loader, size)
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        yield epoch, loader


__all__ = ["close_dataloader", "recreate_dataloader", "scheduled_epochs"]
