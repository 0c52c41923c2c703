"""Every step of a run whose batch size follows a schedule: how many there are, and how large each is.

A learning-rate schedule needs the number of steps before the first one. Where the batch grows that is not
epochs * steps an epoch, and a Trainer that assumes it stops early or never finishes its decay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from vlmpack.batching.schedule_config import BatchSizeConfig


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchSizePlan:
    """The size of each step of a run, in order."""

    sizes: npt.NDArray[np.int64] = field(repr=False)
    """int64 [steps], samples of each step over all ranks; none is empty."""
    epoch_starts: npt.NDArray[np.int64]
    """int64 [epochs + 1], the first step of each epoch; at the end the number of steps."""
    seen: npt.NDArray[np.int64] = field(repr=False)
    """int64 [steps + 1], samples seen before each step; at the end all of them."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return int(self.sizes.shape[0])

    @property
    def total_samples(self) -> int:
        """Samples of the run, those of dropped batches left out."""
        return int(self.seen[-1])

    def samples_at(self, step: int) -> int:
        """Return the samples seen after so many steps; from the end on, all of them.

        Args:
            step: From 0.
        """
        return int(self.seen[min(step, self.total_steps)])

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 0, that a step belongs to.

        Args:
            step: 0 to `total_steps` - 1.
        """
        return int(np.searchsorted(self.epoch_starts, step, side="right")) - 1


def plan_batch_sizes(
    config: BatchSizeConfig,
    initial_batch_size: int,
    *,
    num_samples: int,
    num_epochs: int,
    drop_last: bool = False,
    tokens_per_sample: float | None = None,
) -> BatchSizePlan:
    """Return every step of the run. No step crosses the end of an epoch. O(steps).

    Args:
        config: The schedule. In samples or tokens, the size may change within an epoch.
        initial_batch_size: The size at the beginning.
        num_samples: Samples of an epoch; packs, where the data set is packed.
        num_epochs: Passes over them.
        drop_last: Leave out an epoch's last step where it is not full.
        tokens_per_sample: Needed for a schedule in tokens: the mean, or the length of a pack.

    Raises:
        ConfigError: If a number is not positive, tokens are needed and not given, or no step is left.
    """
    for name, value in (
        ("initial_batch_size", initial_batch_size),
        ("num_samples", num_samples),
        ("num_epochs", num_epochs),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    if config.unit == "tokens" and not (tokens_per_sample and tokens_per_sample > 0):
        raise ConfigError(f"a schedule in tokens needs tokens_per_sample above 0, got {tokens_per_sample!r}")
    scale = {"samples": 1.0, "tokens": tokens_per_sample or 1.0, "epochs": 1.0}[config.unit]
    sizes: list[int] = []
    starts = [0]
    for epoch in range(num_epochs):
        sizes += _steps_of_epoch(config, initial_batch_size, epoch, num_samples, scale, drop_last)
        starts.append(len(sizes))
    if not sizes:
        raise ConfigError(
            f"no step is left: drop_last, and each batch is larger than the {num_samples} samples of an epoch"
        )
    all_sizes = np.array(sizes, np.int64)
    return BatchSizePlan(
        sizes=all_sizes,
        epoch_starts=np.array(starts, np.int64),
        seen=np.concatenate([np.zeros(1, np.int64), np.cumsum(all_sizes)]),
    )


def _steps_of_epoch(
    config: BatchSizeConfig, initial: int, epoch: int, num_samples: int, scale: float, drop_last: bool
) -> Iterator[int]:
    had = 0
    while had < num_samples:
        progress = epoch if config.unit == "epochs" else int((epoch * num_samples + had) * scale)
        size = min(config.size_at(progress, initial), num_samples - had)
        full = size == config.size_at(progress, initial)
        if full or not drop_last:
            yield size
        had += size
