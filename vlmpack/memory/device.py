"""Ask the device how full it is: a GPU through torch, the process's own memory, or a fake for tests."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Protocol

from vlmpack.errors import ConfigError
from vlmpack.memory.linear_cost import GB


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryReading:
    """The device's memory at one moment, in bytes."""

    allocated: int
    """In tensors."""
    reserved: int
    """Held by the allocator, free blocks included."""
    peak: int
    """Most in tensors since the last reset."""
    total: int
    """What the device has; 0 where nobody knows."""


class MemoryBackend(Protocol):
    """Something whose memory can be read."""

    def read(self) -> MemoryReading:
        """Return what is in use."""
        ...

    def reset_peak(self) -> None:
        """Start a new peak."""
        ...


class CudaMemory:
    """The current GPU, through torch.

    Args:
        device: Its index; None: the current one.
    """

    def __init__(self, device: int | None = None) -> None:
        self.device = device

    def read(self) -> MemoryReading:
        """Return the allocator's figures."""
        import torch

        cuda = torch.cuda
        return MemoryReading(
            allocated=cuda.memory_allocated(self.device),
            reserved=cuda.memory_reserved(self.device),
            peak=cuda.max_memory_allocated(self.device),
            total=cuda.get_device_properties(self.device or 0).total_memory,
        )

    def reset_peak(self) -> None:
        """Start a new peak."""
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)


class ProcessMemory:
    """This process's resident memory: for runs on the CPU. Its peak cannot be reset."""

    def read(self) -> MemoryReading:
        """Return the resident set and the machine's memory."""
        import resource  # not on Windows

        # kilobytes on Linux, bytes on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        page = os.sysconf("SC_PAGE_SIZE")
        now = peak
        if sys.platform == "linux":
            with open("/proc/self/statm", encoding="ascii") as file:
                now = int(file.read().split()[1]) * page
        total = page * os.sysconf("SC_PHYS_PAGES")
        return MemoryReading(allocated=now, reserved=now, peak=peak, total=total)

    def reset_peak(self) -> None:
        """Do nothing: the system keeps one peak a process."""


@dataclass(slots=True)
class FakeMemory:
    """Figures that a test sets."""

    total: int
    """What the device pretends to have."""
    allocated: int = 0
    """In tensors."""
    peak: int = 0
    """Most in tensors since the last reset."""

    def use(self, size: int) -> None:
        """Pretend that this many bytes are in tensors.

        Raises:
            ConfigError: If they are negative.
        """
        if size < 0:
            raise ConfigError(f"memory in use cannot be negative, got {size}")
        self.allocated = size
        self.peak = max(self.peak, size)

    def read(self) -> MemoryReading:
        """Return the figures."""
        return MemoryReading(
            allocated=self.allocated, reserved=self.allocated, peak=self.peak, total=self.total
        )

    def reset_peak(self) -> None:
        """Start a new peak."""
        self.peak = self.allocated


def default_backend() -> MemoryBackend:
    """Return the GPU where there is one, else this process."""
    import torch

    return CudaMemory() if torch.cuda.is_available() else ProcessMemory()


def get_gpu_memory_info(*, legacy: bool = False) -> dict[str, float]:
    """Return the GPU's memory in GB of 10^9 bytes.

    Keys: allocated, reserved, free (total - reserved), total, utilization (reserved / total). Without a GPU
    all are 0.

    Args:
        legacy: Without a GPU give the first three keys only, as the reference document's code does;
            `log_memory_usage` then fails on the missing ones.
    """
    import torch

    if not torch.cuda.is_available():
        info: dict[str, float] = {"allocated": 0, "reserved": 0, "free": 0}
        return info if legacy else {**info, "total": 0, "utilization": 0}
    reading = CudaMemory().read()
    total = reading.total / GB
    return {
        "allocated": reading.allocated / GB,
        "reserved": reading.reserved / GB,
        "free": total - reading.reserved / GB,
        "total": total,
        "utilization": reading.reserved / reading.total,
    }


def get_gpu_memory() -> float:
    """Return the most that tensors have taken on the GPU since the last call, in GB; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    backend = CudaMemory()
    peak = backend.read().peak / GB
    backend.reset_peak()
    return peak


def log_memory_usage(step: int, prefix: str = "", *, legacy: bool = False) -> None:
    """Write one line about the GPU's memory to standard output.

    Args:
        step: The training step.
        prefix: Put before it.
        legacy: Use the reference document's dictionary, which lacks `utilization` without a GPU (KeyError).
    """
    info = get_gpu_memory_info(legacy=legacy)
    sys.stdout.write(
        f"{prefix}[Step {step}] GPU: "
        f"Alloc={info['allocated']:.1f}GB "
        f"Reserved={info['reserved']:.1f}GB "
        f"({info['utilization'] * 100:.0f}%)\n"
    )
