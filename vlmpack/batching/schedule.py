"""BatchSizeScheduler: which batch size an epoch has, when it changes, and how memory caps it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.figure import Figure

    from vlmpack.batching.schedule_config import BatchSizeConfig


class ScheduleState(TypedDict):
    """What `BatchSizeScheduler.state_dict` returns."""

    settings: dict[str, object]
    """The schedule and the sizes that it was built with."""
    batch_size: int
    """The size that was last returned by `step`."""


class MicroBatches(NamedTuple):
    """How a batch is run where the device takes fewer samples at once."""

    micro_batch_size: int
    """Samples at once, at most."""
    accumulation_steps: int
    """Forward and backward passes of the step."""


class BatchSizeScheduler:
    """Says which batch size each epoch has, as documented; a pure function of progress, and a little state.

    Progress is epochs, or samples or tokens where the schedule's `unit` says so.

    Args:
        config: The schedule.
        initial_batch_size: The size at progress 0.
        max_rows: Samples that the device takes at once, for example from `memory.batch_budget_for_gpu`; the
            batch still grows beyond it, see `micro_batches`. None where memory is no concern.
        announce: Called with a line whenever the size changes.

    Raises:
        ConfigError: If a size is not a positive integer.
    """

    def __init__(
        self,
        config: BatchSizeConfig,
        initial_batch_size: int,
        *,
        max_rows: int | None = None,
        announce: Callable[[str], object] = print,
    ) -> None:
        for name, size in (("initial_batch_size", initial_batch_size), ("max_rows", max_rows)):
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, got {size!r}")
        if config.max_batch_size is not None and config.max_batch_size < initial_batch_size:
            warnings.warn(
                f"max_batch_size {config.max_batch_size} is below the initial batch size "
                f"{initial_batch_size}: the first epoch already has {config.max_batch_size}",
                stacklevel=2,
            )
        self.config = config
        self.initial_batch_size = initial_batch_size
        self.max_rows = max_rows
        self._announce = announce
        self._batch_size = initial_batch_size

    @property
    def batch_size(self) -> int:
        """The size that `step` returned last; the initial one before the first call."""
        return self._batch_size

    def get_batch_size(self, epoch: int) -> int:
        """Return the size at this progress; pure.

        Args:
            epoch: Epochs from 0, or samples or tokens where the schedule counts them.

        Raises:
            ConfigError: If it is negative or not an integer.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ConfigError(f"{self.config.unit} must be an integer of at least 0, got {epoch!r}")
        return self.config.size_at(epoch, self.initial_batch_size)

    def should_update(self, epoch: int) -> bool:
        """Return whether `step(epoch)` would change the size; changes nothing itself."""
        return self.get_batch_size(epoch) != self._batch_size

    def step(self, epoch: int) -> tuple[int, bool]:
        """Move to this progress; announces a change.

        Skipped epochs do not matter: the size is compared with the one that was returned last.

        Args:
            epoch: As for `get_batch_size`.

        Returns:
            The size, and whether it changed, so that the loader has to be made anew.
        """
        size, before = self.get_batch_size(epoch), self._batch_size
        if size == before:
            return size, False
        self._batch_size = size
        where = "Epoch" if self.config.unit == "epochs" else self.config.unit.capitalize()
        self._announce(f"{where} {epoch}: Updating batch size from {before} to {size}")
        return size, True

    def micro_batches(self, batch_size: int | None = None) -> MicroBatches:
        """Return how a batch is split so that no more than `max_rows` run at once, as evenly as it goes.

        The learning does not depend on it: what is in a step is the schedule's matter, how it is split is
        memory's.

        Args:
            batch_size: The batch; None: the present size.

        Raises:
            ConfigError: If the batch is empty.
        """
        size = self._batch_size if batch_size is None else batch_size
        if size < 1:
            raise ConfigError(f"a batch has at least 1 sample, got {size}")
        steps = 1 if self.max_rows is None else -(-size // self.max_rows)
        return MicroBatches(-(-size // steps), steps)

    def state_dict(self) -> ScheduleState:
        """Return where the schedule stands; plain values, fit for JSON."""
        return ScheduleState(settings=self._settings(), batch_size=self._batch_size)

    def load_state_dict(self, state: ScheduleState) -> None:
        """Go on from a saved state.

        Args:
            state: From `state_dict` of a scheduler with the same settings.

        Raises:
            ConfigError: If the settings differ.
        """
        if state["settings"] != self._settings():
            raise ConfigError(
                f"the saved schedule is {state['settings']}, this one is {self._settings()}; resume with the "
                "settings of the run, or start anew"
            )
        self._batch_size = state["batch_size"]

    def _settings(self) -> dict[str, object]:
        # A function has no value to compare; its name at least tells two apart.
        config = self.config.model_dump(exclude={"function"})
        function = getattr(self.config, "function", None)
        if function is not None:
            config["function"] = getattr(function, "__qualname__", type(function).__qualname__)
        return {**config, "initial_batch_size": self.initial_batch_size}

    def plot(self, until: int, path: str | Path | None = None) -> Figure:
        """Draw the batch size over progress, with the rows that run at once where memory caps them.

        Args:
            until: The end of the picture, in the schedule's unit.
            path: Where to save it; None: nowhere.

        Raises:
            ConfigError: If there is nothing to draw or matplotlib is missing.
        """
        from vlmpack.batching.schedule_plot import plot_schedule

        return plot_schedule(self, until, path)
