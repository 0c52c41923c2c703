"""Trying one batch size: whatever happens, the search learns of it and nothing of the try stays in memory."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import torch

from vlmpack.batching.detect import is_oom_error
from vlmpack.errors import VlmpackError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmpack.batching.search_rules import Trial

    Probe: TypeAlias = Callable[[int], "int | float | ProbeOutcome | None"]


class NoFeasibleBatchSizeError(VlmpackError):
    """No batch size that was tried fits."""


NoFeasibleBatchSize = NoFeasibleBatchSizeError
"""The same under a shorter name."""


class ProbeError(VlmpackError):
    """A try failed for another reason than memory, or did not end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOutcome:
    """What became of one batch size."""

    fits: bool
    """Whether the step ran through."""
    peak_bytes: int | None = None
    """What the device held at its peak, where that was read."""
    seconds: float = 0.0
    """How long it took."""


def try_batch_size(probe: Probe, batch_size: int, *, timeout_s: float | None = None) -> ProbeOutcome:
    """Try a batch size, and agree with all other ranks on the outcome.

    Under torch.distributed every rank must call this with the same size: a size fits only if it fits
    everywhere, and the peak is the largest of all ranks.

    Args:
        probe: Runs a step of this size. Returns the peak in bytes, a `ProbeOutcome`, or None where no peak is
            known; an OOM error means that the size does not fit.
        batch_size: At least 1.
        timeout_s: A try that takes longer is given up; None waits for ever.

    Raises:
        ProbeError: If the probe raised anything else than an OOM error, on any rank, or did not end.
    """
    started = time.monotonic()
    outcome, error = _run(probe, batch_size, timeout_s)
    status = _ERROR if error is not None else _FITS if outcome is not None and outcome.fits else _OOM
    status, peak = _agree(status, outcome.peak_bytes if outcome is not None else None)
    if error is not None:
        raise error
    if status == _ERROR:
        raise ProbeError(f"batch size {batch_size} could not be tried: another rank failed, see its error")
    return ProbeOutcome(
        fits=status == _FITS,
        peak_bytes=peak if status == _FITS else None,
        seconds=time.monotonic() - started,
    )


_ERROR, _OOM, _FITS = range(3)
_UNKNOWN: Final = -1


def _run(
    probe: Probe, batch_size: int, timeout_s: float | None
) -> tuple[ProbeOutcome | None, ProbeError | None]:
    """Return the outcome, or None after an OOM error, or the error that ends the search."""
    result: list[ProbeOutcome] = []
    failure: list[tuple[bool, str]] = []

    def call() -> None:
        try:
            result.append(_outcome(probe(batch_size)))
        except Exception as error:
            # Only a word of it is kept: the traceback holds the step's tensors alive.
            failure.append((is_oom_error(error), f"{type(error).__name__}: {error}"))

    if timeout_s is None:
        call()
    else:
        thread = threading.Thread(target=call, daemon=True, name=f"probe of batch size {batch_size}")
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            return None, ProbeError(
                f"the try of batch size {batch_size} did not end within {timeout_s:g} s and was given up; "
                "does it wait for data or for another rank? If it is only slow, raise timeout_s"
            )
    if not failure:
        return result[0], None
    _free()
    is_oom, words = failure[0]
    return None, None if is_oom else ProbeError(
        f"batch size {batch_size} could not be tried, and not for lack of memory: {words}"
    )


def _outcome(value: object) -> ProbeOutcome:
    if isinstance(value, ProbeOutcome):
        return value
    if value is None:
        return ProbeOutcome(fits=True)
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return ProbeOutcome(fits=True, peak_bytes=int(value))
    raise TypeError(f"a probe returns bytes, a ProbeOutcome or None, got {value!r}")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shared(trials: list[Trial]) -> list[Trial]:
    """Return rank 0's trials on every rank: ranks that knew different ones would try different sizes.

    Args:
        trials: What this rank knows.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return trials
    values = [trials]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _agree(status: int, peak: int | None) -> tuple[int, int | None]:
    """Return the worst status and the largest peak over all ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return status, peak
    on_gpu = torch.distributed.get_backend() == "nccl"
    # One MIN: the largest peak is the smallest of its negatives.
    vote = torch.tensor(
        [status, -(_UNKNOWN if peak is None else peak)],
        dtype=torch.int64,
        device="cuda" if on_gpu else "cpu",
    )
    torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN)
    worst, largest = int(vote[0]), -int(vote[1])
    return worst, None if largest == _UNKNOWN else largest
