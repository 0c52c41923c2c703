"""Predict a batch's memory from its tasks, and learn from what batches really took.

Figures here are GB of 10^9 bytes, as `torch.cuda.memory_allocated() / 1e9`; `calibrate` works in bytes.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vlmpack.errors import ConfigError
from vlmpack.memory.calibrate import CalibratedCost
from vlmpack.memory.linear_cost import GB, TASKS_3D, LinearCost

if TYPE_CHECKING:
    from collections.abc import Iterable


FIXED_MARGIN: Final = 0.1
"""What the reference document's way leaves free; the other one measures its margin."""


@dataclass(slots=True)
class _TaskRecord:
    """What a task's predictions have been worth."""

    ratio_sum: float = 0.0
    error_sum: float = 0.0
    count: int = 0


class MemoryPredictor:
    """Predicts GPU memory by a formula and corrects it by measurements.

    Every task type of the cost is a feature; any number of them will do. `method="rls"` follows all
    coefficients at once, which tells a batch's fixed part from its samples. `method="ratio"` is the
    reference document's way: one factor a task, the mean of measured / predicted.

    Args:
        cost: The formula; the default knows the tasks T1, T2 and T3.
        method: "rls" or "ratio".
        alpha: Wanted share of batches over `upper`.

    Raises:
        ConfigError: If the method is unknown.
    """

    def __init__(self, cost: LinearCost = TASKS_3D, *, method: str = "rls", alpha: float = 0.01) -> None:
        if method not in {"rls", "ratio"}:
            raise ConfigError(f"method must be 'rls' or 'ratio', got {method!r}")
        self.cost = cost
        self.method = method
        self.calibrated = CalibratedCost(cost=cost, alpha=alpha)
        self._records: dict[str, _TaskRecord] = {}
        self._last: dict[str, tuple[Mapping[str, float], float]] = {}

    @property
    def task_types(self) -> tuple[str, ...]:
        """The tasks that the formula knows."""
        return tuple(name for name in self.cost.features if name != "batch")

    def predict(self, task_type: str, num_samples: int = 1) -> float:
        """Return the GB of a batch of samples of one task.

        Args:
            task_type: A task that the formula knows.
            num_samples: Samples of the batch, at least 1.

        Raises:
            ConfigError: If the task is unknown or the number is not positive.
        """
        if num_samples < 1:
            raise ConfigError(f"a batch needs at least one sample, got {num_samples}")
        return self.predict_batch({task_type: num_samples})

    def predict_batch(self, batch: Mapping[str, float] | Iterable[str]) -> float:
        """Return the GB of a batch.

        Args:
            batch: Samples of each task, or the tasks of its samples one by one.
        """
        counts = self._counts(batch)
        predicted = self._predicted(counts)
        for task in counts:
            self._last[task] = (counts, predicted)
        return predicted

    def upper(self, batch: Mapping[str, float] | Iterable[str]) -> float:
        """Return the GB that a batch takes at most, but for a share of alpha of all batches."""
        counts = self._counts(batch)
        if self.method == "ratio":
            return self._predicted(counts) * (1 + FIXED_MARGIN)
        return self.calibrated.upper(counts) / GB

    def record_actual_memory(
        self,
        task_type: str,
        actual_memory: float,
        *,
        predicted: float | None = None,
        batch: Mapping[str, float] | Iterable[str] | None = None,
    ) -> None:
        """Learn from a measured batch.

        Args:
            task_type: The task that it is booked under.
            actual_memory: GB that it took.
            predicted: What had been predicted, where it was predicted elsewhere.
            batch: What it held; left out, the last predicted batch with this task.

        Raises:
            ConfigError: If nothing was predicted for this task yet and neither of both is given, or the
                measurement is no positive number.
        """
        if not math.isfinite(actual_memory) or actual_memory <= 0:
            raise ConfigError(f"actual_memory must be a positive number of GB, got {actual_memory!r}")
        counts = self._counts(batch) if batch is not None else None
        if counts is None and task_type in self._last:
            counts = dict(self._last[task_type][0])
            predicted = self._last[task_type][1] if predicted is None else predicted
        if predicted is None:
            if counts is None:
                raise ConfigError(
                    f"no batch of task {task_type!r} was predicted yet, so there is nothing to compare "
                    f"{actual_memory} GB with: call predict first, or give predicted= or batch="
                )
            predicted = self._predicted(counts)
        record = self._records.setdefault(task_type, _TaskRecord())
        raw = self.cost.predict(counts) / GB if counts is not None else predicted
        record.ratio_sum += actual_memory / raw
        record.error_sum += abs(predicted - actual_memory) / actual_memory
        record.count += 1
        if counts is not None:
            self.calibrated.observe(counts, actual_memory * GB)

    @property
    def adjustment_factors(self) -> dict[str, float]:
        """What each task's formula is multiplied by, as far as known."""
        if self.method == "ratio":
            return {task: record.ratio_sum / record.count for task, record in self._records.items()}
        pairs = zip(self.cost.features, self.calibrated.calibrator.theta, self.cost.theta, strict=True)
        return {name: float(now / start) for name, now, start in pairs if name != "batch" and start}

    def get_calibration_accuracy(self) -> dict[str, float]:
        """Return the mean absolute error, relative to what was measured: of each task, and "overall".

        Without a measurement the dictionary is empty.
        """
        errors = {task: record.error_sum / record.count for task, record in self._records.items()}
        total = sum(record.count for record in self._records.values())
        if total:
            errors["overall"] = sum(record.error_sum for record in self._records.values()) / total
        return errors

    def _counts(self, batch: Mapping[str, float] | Iterable[str]) -> dict[str, float]:
        counts: Mapping[str, float] = batch if isinstance(batch, Mapping) else Counter(batch)
        self.cost.vector(counts)  # raises where a task is unknown
        return dict(counts)

    def _predicted(self, counts: Mapping[str, float]) -> float:
        if self.method == "rls":
            return self.calibrated.predict(counts) / GB
        known = [self._records[task] for task in counts if task in self._records]
        tries = sum(record.count for record in known)
        factor = sum(record.ratio_sum for record in known) / tries if tries else 1.0
        return self.cost.predict(counts) * factor / GB


def estimate_training_memory(
    num_samples: int,
    task_distribution: Mapping[str, float],
    batch_size: int,
    num_epochs: int,
    *,
    cost: LinearCost = TASKS_3D,
) -> dict[str, float]:
    """Return what a training run will take, in MB of 10^6 bytes.

    `per_batch_mb` is the mean batch by the distribution; `estimated_peak_memory_mb` the worst one, made of
    the costliest task that occurs. `num_batches` and `total_steps` count the last, smaller batch.

    Args:
        num_samples: Samples of an epoch.
        task_distribution: Share of each task; the shares add up to 1.
        batch_size: Samples of a batch.
        num_epochs: Epochs.
        cost: The formula.

    Raises:
        ConfigError: If a number is not positive, or the shares are no distribution.
    """
    numbers = {"num_samples": num_samples, "batch_size": batch_size, "num_epochs": num_epochs}
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} must be positive, got {value}")
    if any(share < 0 for share in task_distribution.values()) or not math.isclose(
        sum(task_distribution.values()), 1.0, abs_tol=1e-6
    ):
        raise ConfigError(f"task_distribution must be shares that add up to 1, got {dict(task_distribution)}")
    mean = cost.predict({task: share * batch_size for task, share in task_distribution.items()})
    size = min(batch_size, num_samples)
    occurring = [task for task, share in task_distribution.items() if share > 0]
    worst = max(cost.predict({task: size}) for task in occurring)
    batches = -(-num_samples // batch_size)
    return {
        "per_batch_mb": mean / 1e6,
        "estimated_peak_memory_mb": worst / 1e6,
        "num_batches": batches,
        "total_steps": batches * num_epochs,
    }


def print_training_memory(estimates: Mapping[str, float]) -> None:
    """Write the two lines of the reference document to standard output.

    Args:
        estimates: From `estimate_training_memory`.
    """
    sys.stdout.write(f"Per batch: {estimates['per_batch_mb']:.0f}MB\n")
    sys.stdout.write(f"Peak memory: {estimates['estimated_peak_memory_mb']:.0f}MB\n")
