"""Callbacks that watch memory during training, for any `transformers.Trainer`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from transformers import TrainerCallback

from vlmpack.errors import ConfigError
from vlmpack.memory.device import default_backend, log_memory_usage

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from vlmpack.batching.guardian import OOMGuardian
    from vlmpack.memory.device import MemoryBackend

logger = logging.getLogger(__name__)

MONITOR_INTERVAL: Final = 100
"""Steps between two lines of `MemoryMonitorCallback`."""


class MemorySafetyCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Warns when memory is nearly full, and follows how often it ran out.

    Args:
        guardian: Whose errors are counted; None: memory alone is watched.
        interval: Steps between two looks.
        warn_at: Share of the device from which it warns.
        backend: The device; None: the GPU, or this process without one.

    Raises:
        ConfigError: If a number is out of its range.
    """

    def __init__(
        self,
        guardian: OOMGuardian | None = None,
        *,
        interval: int = 10,
        warn_at: float = 0.9,
        backend: MemoryBackend | None = None,
    ) -> None:
        if interval < 1 or not 0 < warn_at <= 1:
            raise ConfigError(f"interval >= 1 and 0 < warn_at <= 1 are needed, got {interval}, {warn_at}")
        self.guardian = guardian
        self.interval = interval
        self.warn_at = warn_at
        self.backend = backend
        self.num_warnings = 0
        """Looks at which memory was nearly full."""
        self.oom_steps: dict[int, int] = {}
        """Steps at which memory ran out, and how often."""
        self._seen = 0

    @property
    def num_ooms(self) -> int:
        """Errors so far."""
        return sum(self.oom_steps.values())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count from here."""
        self._seen = self.guardian.num_ooms if self.guardian is not None else 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at memory if it is time, and at the guardian's count."""
        if self.guardian is not None and self.guardian.num_ooms > self._seen:
            self.oom_steps[state.global_step] = self.guardian.num_ooms - self._seen
            self._seen = self.guardian.num_ooms
        if state.global_step % self.interval == 0:
            self._look(state.global_step)

    def _look(self, step: int) -> None:
        if self.backend is None:
            self.backend = default_backend()
        reading = self.backend.read()
        if reading.total and reading.reserved >= self.warn_at * reading.total:
            self.num_warnings += 1
            logger.warning(
                "[Step %d] memory is nearly full: %.1f of %.1f GB (%.0f%%)",
                step,
                reading.reserved / 1e9,
                reading.total / 1e9,
                100 * reading.reserved / reading.total,
            )


class MemoryMonitorCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Writes one line about the GPU's memory every 100 global steps."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the line if it is time."""
        if state.global_step % MONITOR_INTERVAL == 0:
            log_memory_usage(state.global_step, prefix="[Monitor] ")
