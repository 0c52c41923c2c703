"""Metrics: what one step and one epoch did. Plain records, which JSON and back leave as they were."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Record = TypeVar("Record", "BatchMetrics", "EpochMetrics")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchMetrics:
    """One optimizer step.

    Raises:
        ConfigError: If a count is negative.
    """

    step: int
    """Number of the step, from 1 for the first."""
    loss: float
    """The step's loss; NaN if it was not finite."""
    epoch: int = 0
    """The pass over the data, from 0."""
    task_losses: dict[str, float] = field(default_factory=dict)
    """The mean loss of each task that is present, without its weight."""
    task_types: dict[str, int] = field(default_factory=dict)
    """Samples of each task."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """The loss weight of each task."""
    allocated_bytes: int = 0
    """In tensors, after the step."""
    reserved_bytes: int = 0
    """Held by the allocator, after the step."""
    peak_bytes: int = 0
    """Most in tensors during the step."""
    seconds: float = 0.0
    """How long the step took; 0 where nobody measured."""
    num_samples: int = 0
    """Samples of the step, over all ranks."""
    num_tokens: int = 0
    """Tokens of the step that are learnt from, over all ranks; 0 where nobody counted."""
    grad_norm: float | None = None
    """Norm of the whole gradient, before clipping."""
    task_grad_norms: dict[str, float] = field(default_factory=dict)
    """Norm of each task's gradient, without its weight."""
    num_micro_batches: int = 1
    """Parts that the step was split into."""
    num_ooms: int = 0
    """Times that this step ran out of memory and was recovered."""
    learning_rate: float | None = None
    """The scheduled one."""
    lr_scale: float | None = None
    """What it was multiplied by for this step's size."""

    def __post_init__(self) -> None:
        for name in ("step", "epoch", "num_samples", "num_tokens", "num_micro_batches", "num_ooms"):
            if getattr(self, name) < 0:
                raise ConfigError(f"step {self.step}: {name} is a count, got {getattr(self, name)}")

    @property
    def samples_per_s(self) -> float:
        """Throughput; 0 where nobody measured the time."""
        return self.num_samples / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain values; a number that is not finite becomes None, which JSON has."""
        return _plain(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BatchMetrics:
        """Return the record that `to_json` made these values of; a loss of None is NaN.

        Raises:
            ConfigError: If a field is unknown or missing.
        """
        return _from_json(cls, values)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochMetrics:
    """One pass over the data. Losses are means over samples; steps without a finite loss are left out."""

    epoch: int
    """The pass over the data, from 0."""
    num_steps: int
    """Optimizer steps."""
    num_samples: int
    """Samples of all steps."""
    average_loss: float
    """Mean loss; NaN without a finite one."""
    task_losses: dict[str, float] = field(default_factory=dict)
    """Mean loss of each task."""
    task_samples: dict[str, int] = field(default_factory=dict)
    """Samples of each task."""
    peak_bytes: int = 0
    """Most memory of all steps."""
    average_bytes: float = 0.0
    """Mean of the steps' peaks."""
    samples_per_s: float = 0.0
    """All samples / all seconds in steps."""
    slowest_samples_per_s: float = 0.0
    """Throughput of the slowest step."""
    fastest_samples_per_s: float = 0.0
    """Throughput of the fastest step."""
    num_ooms: int = 0
    """Times that memory ran out and the step was recovered."""
    num_non_finite: int = 0
    """Steps without a finite loss."""
    seconds: float = 0.0
    """How long the epoch took, with loading and evaluation where that was measured."""
    eval_loss: float | None = None
    """Of the evaluation in or after this epoch, if there was one."""

    @classmethod
    def of(
        cls,
        epoch: int,
        batches: Sequence[BatchMetrics],
        *,
        seconds: float = 0.0,
        eval_loss: float | None = None,
    ) -> EpochMetrics:
        """Sum up the steps of an epoch.

        Args:
            epoch: Its number.
            batches: Its steps.
            seconds: How long it took; 0: the sum over its steps.
            eval_loss: Of an evaluation.
        """
        finite = [each for each in batches if math.isfinite(each.loss)]
        timed = [each for each in batches if each.samples_per_s > 0]
        rates = [each.samples_per_s for each in timed]
        in_steps = math.fsum(each.seconds for each in timed)
        samples: dict[str, int] = defaultdict(int)
        for each in batches:
            for task, count in each.task_types.items():
                samples[task] += count
        return cls(
            epoch=epoch,
            num_steps=len(batches),
            num_samples=sum(each.num_samples for each in batches),
            average_loss=_mean((each.loss, max(1, each.num_samples)) for each in finite),
            task_losses=_task_means(batches),
            task_samples=dict(sorted(samples.items())),
            peak_bytes=max((each.peak_bytes for each in batches), default=0),
            average_bytes=sum(each.peak_bytes for each in batches) / len(batches) if batches else 0.0,
            samples_per_s=sum(each.num_samples for each in timed) / in_steps if in_steps else 0.0,
            slowest_samples_per_s=min(rates, default=0.0),
            fastest_samples_per_s=max(rates, default=0.0),
            num_ooms=sum(each.num_ooms for each in batches),
            num_non_finite=len(batches) - len(finite),
            seconds=seconds or math.fsum(each.seconds for each in batches),
            eval_loss=eval_loss,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values; a number that is not finite becomes None."""
        return _plain(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EpochMetrics:
        """Return the record that `to_json` made these values of.

        Raises:
            ConfigError: If a field is unknown or missing.
        """
        return _from_json(cls, values)


def _mean(pairs: Iterable[tuple[float, int]]) -> float:
    """Return the mean of values with weights; NaN of none."""
    weighed = list(pairs)
    total = sum(weight for _, weight in weighed)
    return math.fsum(value * weight for value, weight in weighed) / total if total else math.nan


def _task_means(batches: Sequence[BatchMetrics]) -> dict[str, float]:
    pairs: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for each in batches:
        for task, loss in each.task_losses.items():
            if math.isfinite(loss):
                pairs[task].append((loss, max(1, each.task_types.get(task, 1))))
    return {task: _mean(values) for task, values in sorted(pairs.items())}


_NAN_WHERE_NONE = {"loss", "average_loss"}


def _plain(record: BatchMetrics | EpochMetrics) -> dict[str, Any]:
    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: finite(value) for name, value in asdict(record).items()}


def _from_json(make: Callable[..., Record], values: Mapping[str, Any]) -> Record:
    known = {each.name for each in fields(make)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"metrics have no {unknown}; they are of another version")

    def back(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: math.nan if each is None else each for key, each in value.items()}
        return math.nan if value is None and name in _NAN_WHERE_NONE else value

    try:
        return make(**{name: back(name, value) for name, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"these are no metrics: {error}") from error
