"""The steps of a run whose size follows a schedule, for a `StepPlan`; it may change within an epoch."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from vlmpack.batching.schedule_steps import plan_batch_sizes
from vlmpack.batching.step_plan import RandomSteps
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from vlmpack.batching.schedule_config import BatchSizeConfig


class ScheduledSteps:
    """Every sample once an epoch, in seeded random order, in steps whose size follows a schedule.

    `DynamicBatchingTrainer(batch_sampler=...)` takes it. The order of the samples is that of `RandomSteps`
    with the same seed, whatever the schedule.

    Args:
        config: The schedule.
        initial_batch_size: Samples of the first step, over all ranks.
        num_samples: Samples of the data set; packs, where it is packed.
        num_epochs: Passes over it; as many as the plan has.
        shuffle: False keeps the data set's order.
        seed: Of the order.
        drop_last: Leave out an epoch's last step where it is not full.
        tokens_per_sample: For a schedule in tokens.

    Raises:
        ConfigError: If a setting is wrong.
    """

    def __init__(
        self,
        config: BatchSizeConfig,
        initial_batch_size: int,
        *,
        num_samples: int,
        num_epochs: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        tokens_per_sample: float | None = None,
    ) -> None:
        self.plan = plan_batch_sizes(
            config,
            initial_batch_size,
            num_samples=num_samples,
            num_epochs=num_epochs,
            drop_last=drop_last,
            tokens_per_sample=tokens_per_sample,
        )
        """The size of every step, and the samples seen before it."""
        self._order = RandomSteps(num_samples, num_samples, shuffle=shuffle, seed=seed)

    @property
    def digest(self) -> str:
        """A name for the order and all sizes."""
        sizes = hashlib.sha256(self.plan.sizes.tobytes()).hexdigest()[:16]
        return f"scheduled-{self._order.digest}-{sizes}"

    def batches(self, epoch: int) -> list[list[int]]:
        """Return the samples of each step of an epoch.

        Args:
            epoch: From 0.

        Raises:
            ConfigError: If the schedule was planned for fewer epochs.
        """
        num_epochs = self.plan.epoch_starts.shape[0] - 1
        if epoch >= num_epochs:
            raise ConfigError(
                f"the schedule was planned for {num_epochs} epochs and the run wants epoch {epoch}: give "
                "both the same number of epochs"
            )
        first, end = self.plan.epoch_starts[epoch : epoch + 2].tolist()
        order, at = self._order.batches(epoch)[0], 0
        steps = []
        for size in self.plan.sizes[first:end].tolist():
            steps.append(order[at : at + size])
            at += size
        return steps
