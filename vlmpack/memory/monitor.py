"""Watch memory during training, and derive how many micro-batches a step should have."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmpack.errors import ConfigError
from vlmpack.memory.linear_cost import GB

if TYPE_CHECKING:
    from vlmpack.memory.device import MemoryBackend


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRecord:
    """One entry of the monitor."""

    step: int
    """The training step."""
    allocated: int
    """Bytes in tensors."""
    reserved: int
    """Bytes of the allocator."""
    peak: int
    """Most bytes in tensors since the entry before."""


@dataclass(slots=True)
class MemoryMonitor:
    """Records memory every `interval` steps: peak, average, trend.

    Args:
        backend: What is watched; None: the GPU, or this process without one.
        interval: Steps between two entries.
        history: Entries that are remembered.

    Raises:
        ConfigError: If a number is not positive.
    """

    backend: MemoryBackend | None = None
    interval: int = 10
    history: int = 1000
    records: deque[MemoryRecord] = field(init=False)
    """The entries, oldest first."""
    peak_bytes: int = field(init=False, default=0)
    """The highest peak of all entries, forgotten ones too."""

    def __post_init__(self) -> None:
        if self.interval < 1 or self.history < 1:
            raise ConfigError(f"interval and history must be positive, got {self.interval}, {self.history}")
        self.records = deque(maxlen=self.history)

    def record(self, step: int, *, force: bool = False) -> MemoryRecord | None:
        """Make an entry if the step is due.

        Args:
            step: The training step.
            force: Make it in any case.

        Returns:
            The entry, or None.
        """
        if step % self.interval and not force:
            return None
        if self.backend is None:
            from vlmpack.memory.device import default_backend

            self.backend = default_backend()
        reading = self.backend.read()
        self.backend.reset_peak()
        entry = MemoryRecord(
            step=step, allocated=reading.allocated, reserved=reading.reserved, peak=reading.peak
        )
        self.records.append(entry)
        self.peak_bytes = max(self.peak_bytes, reading.peak)
        return entry

    @property
    def average_bytes(self) -> float:
        """Mean of the entries' peaks; 0 without entries."""
        return sum(entry.peak for entry in self.records) / len(self.records) if self.records else 0.0

    def trend_bytes_per_step(self) -> float:
        """Return the slope of the peaks over the steps by least squares; 0 with fewer than two steps.

        A slope that stays positive is a leak, or batches that grow.
        """
        n = len(self.records)
        if n < 2:
            return 0.0
        mean_step = sum(entry.step for entry in self.records) / n
        mean_peak = self.average_bytes
        spread = sum((entry.step - mean_step) ** 2 for entry in self.records)
        if not spread:
            return 0.0
        return sum((e.step - mean_step) * (e.peak - mean_peak) for e in self.records) / spread

    def summary(self) -> dict[str, float]:
        """Return peak, average and last figure in GB, the trend in GB a step, and the number of entries."""
        return {
            "peak_gb": self.peak_bytes / GB,
            "average_gb": self.average_bytes / GB,
            "current_gb": self.records[-1].allocated / GB if self.records else 0.0,
            "trend_gb_per_step": self.trend_bytes_per_step() / GB,
            "num_records": len(self.records),
        }


@dataclass(slots=True)
class GradientAccumulationScheduler:
    """Splits a step into micro-batches that fit, and keeps the step's size exactly.

    Args:
        target_effective_batch_size: Samples of a step.
        bytes_per_sample: What a sample of a micro-batch costs; 0: learned by `adjust` alone.
        fixed_bytes: What a micro-batch costs whatever its size.
        max_micro_batch: Most samples of a micro-batch; None: the whole step.

    Raises:
        ConfigError: If a number is out of its range.
    """

    target_effective_batch_size: int
    bytes_per_sample: float = 0.0
    fixed_bytes: float = 0.0
    max_micro_batch: int | None = None
    micro_batch_size: int = field(init=False)
    """Samples of a micro-batch now."""

    def __post_init__(self) -> None:
        if self.target_effective_batch_size < 1:
            raise ConfigError(f"a step needs at least one sample, got {self.target_effective_batch_size}")
        if self.bytes_per_sample < 0 or self.fixed_bytes < 0:
            raise ConfigError("bytes_per_sample and fixed_bytes must not be negative")
        if self.max_micro_batch is not None and self.max_micro_batch < 1:
            raise ConfigError(f"max_micro_batch must be positive, got {self.max_micro_batch}")
        self.micro_batch_size = self._most

    @property
    def _most(self) -> int:
        return min(self.target_effective_batch_size, self.max_micro_batch or self.target_effective_batch_size)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a step, the last one possibly smaller."""
        return -(-self.target_effective_batch_size // self.micro_batch_size)

    def micro_batches(self) -> tuple[int, ...]:
        """Return the samples of each micro-batch; they add up to the target exactly."""
        full, rest = divmod(self.target_effective_batch_size, self.micro_batch_size)
        return (self.micro_batch_size,) * full + ((rest,) if rest else ())

    def recommend(self, available_bytes: float) -> int:
        """Set the micro-batches from the memory that is there, and return their number.

        Args:
            available_bytes: What a micro-batch may take.

        Raises:
            ConfigError: If not even one sample fits, or the cost of a sample is not known.
        """
        if not self.bytes_per_sample:
            raise ConfigError("bytes_per_sample is 0: give it, or let adjust() learn it from measurements")
        fitting = int((available_bytes - self.fixed_bytes) / self.bytes_per_sample)
        if fitting < 1:
            raise ConfigError(
                f"one sample needs {(self.fixed_bytes + self.bytes_per_sample) / GB:.2f} GB, but only "
                f"{available_bytes / GB:.2f} GB are there: use checkpointing or smaller images"
            )
        self.micro_batch_size = min(fitting, self._most)
        return self.accumulation_steps

    def adjust(self, peak_bytes: float, limit_bytes: float, *, margin: float = 0.1) -> int:
        """Change the micro-batches after a measured step, and return their number.

        Over the limit less the margin they shrink in proportion; well below it they grow, but by no more than
        a quarter at once, since a peak of one step says little about the next one's.

        Args:
            peak_bytes: Most that the step took.
            limit_bytes: What there is.
            margin: Share of the limit that is left free.

        Raises:
            ConfigError: If the margin is no fraction, or a size is not positive.
        """
        if not 0 <= margin < 1:
            raise ConfigError(f"margin is a fraction, 0 <= margin < 1, got {margin}")
        if peak_bytes <= self.fixed_bytes or limit_bytes <= 0:
            raise ConfigError(
                f"the peak of {peak_bytes} must exceed the fixed {self.fixed_bytes} bytes, and the limit 0"
            )
        room = limit_bytes * (1 - margin) - self.fixed_bytes
        each = (peak_bytes - self.fixed_bytes) / self.micro_batch_size
        self.bytes_per_sample = each
        wanted = max(1, int(room / each))
        growth = self.micro_batch_size + max(1, self.micro_batch_size // 4)
        self.micro_batch_size = max(1, min(wanted, growth, self._most))
        return self.accumulation_steps
