"""Batches of mixed tasks that fit in memory, from metadata alone: usable as `DataLoader(batch_sampler=...)`.

A batch grows by the sample of the highest priority that fits, until nothing fits or it has its size:

    bestfit   (1 - w) * (used + cost) / limit + w * diversity      the fuller the better: the default
    legacy    (1 - w) * (limit - used) / limit + w * diversity     as documented: the first term is the same
                                                                   for every candidate and decides nothing

diversity = 1 - (samples of the task in the batch) / (most samples of any task in it). `bestfit` builds the
largest batches first; their order is shuffled afterwards. Planning takes O(tasks x log N) a sample.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch.utils.data import Sampler

from vlmpack.batching.costs import Formula, StepCosts
from vlmpack.batching.records import SampleShape, SupportsSampleMetadata, shape_from_metadata
from vlmpack.errors import ConfigError, OversizeError
from vlmpack.kernels.task_batches import best_fit_tasks, first_position_tasks
from vlmpack.memory.device import CudaMemory
from vlmpack.memory.linear_cost import GB, TASKS_3D

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from vlmpack.memory.device import MemoryBackend

    Int64s = npt.NDArray[np.int64]

logger = logging.getLogger(__name__)

Priority: TypeAlias = Literal["bestfit", "legacy"]
"""How the next sample of a batch is chosen."""
Oversize: TypeAlias = Literal["raise", "isolate", "drop"]
"""What to do with a sample that is over the limit alone: raise, give it a batch of its own, or leave it out;
the last two are counted and logged."""
DEFAULT_MEMORY_MB: Final = 30_000
"""The documented limit, where there is no device to ask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskItems:
    """Samples as the planner sees them. N samples."""

    cost_N: Int64s  # noqa: N815
    """int64 [N] bytes that each adds to a batch."""
    task_N: Int64s  # noqa: N815
    """int64 [N] its task, from 0."""

    def batches(
        self,
        position_N: Int64s,
        *,
        fixed: int,
        limit: int,
        max_batch: int,
        weight: float,
        priority: Priority,
    ) -> list[Int64s]:
        """Return batches of sample numbers in the order in which they are built.

        Args:
            position_N: int64 [N], a permutation: ties go to the lowest position.
            fixed: Bytes of a batch whatever it holds.
            limit: Bytes that it may take; every sample fits alone.
            max_batch: Samples at most.
            weight: Of diversity.
            priority: "bestfit" or "legacy".
        """
        keys = (-position_N, self.cost_N, self.task_N) if priority == "bestfit" else (position_N, self.task_N)
        order = np.lexsort(keys)
        tasks = self.task_N[order]
        starts = np.searchsorted(tasks, np.arange(int(self.task_N.max(initial=-1)) + 2)).astype(np.int64)
        members, ends = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
        kernel = best_fit_tasks if priority == "bestfit" else first_position_tasks
        number = kernel(
            np.ascontiguousarray(self.cost_N[order]),
            np.ascontiguousarray(position_N[order]),
            starts,
            fixed,
            limit,
            max_batch,
            float(weight),
            members,
            ends,
        )
        return np.split(order[members], ends[: number - 1]) if number else []


class MemoryAwareBatchSampler(Sampler[list[int]]):
    """Lists of samples that stay under a memory limit and mix tasks.

    Iterating gives one epoch; the next iteration gives the next epoch, in another order. Batches have
    different sizes, so the instance has no `batch_size` (it is None): accelerate would drop the odd ones
    under DDP. What was asked for is `max_batch_size`.

    Args:
        dataset: Knows its samples: `get_sample_metadata(index)`.
        batch_size: Samples of a batch at most.
        max_memory_mb: What a batch may take, in MB of 10^6 bytes; None: the GPU's memory, or 30,000 without a
            GPU. The margin is left free of either.
        shuffle: Another order in each epoch.
        memory_predictor: What batches cost, as it stands now; the default knows the tasks T1, T2 and T3.
        diversity_weight: Share of diversity in the priority, 0 to 1.
        priority: "bestfit" or "legacy".
        oversize: For a sample over the limit alone: "raise", "isolate" or "drop".
        memory_margin_percent: Share of the limit that is left free, a fraction.
        seed: Of the order.
        backend: The device to ask for its size.

    Raises:
        ConfigError: If a setting is invalid, or the data set has no metadata.
        OversizeError: If a sample is over the limit and the policy is to raise; names it.
    """

    def __init__(
        self,
        dataset: SupportsSampleMetadata,
        batch_size: int = 16,
        max_memory_mb: float | None = None,
        shuffle: bool = True,
        *,
        memory_predictor: Formula = TASKS_3D,
        diversity_weight: float = 0.5,
        priority: Priority = "bestfit",
        oversize: Oversize = "raise",
        memory_margin_percent: float = 0.10,
        seed: int = 0,
        backend: MemoryBackend | None = None,
    ) -> None:
        _check(batch_size, max_memory_mb, diversity_weight, priority, oversize, memory_margin_percent)
        if not isinstance(dataset, SupportsSampleMetadata):
            raise ConfigError(
                f"{type(dataset).__name__} cannot be sampled by memory: it needs __len__ and "
                "get_sample_metadata(idx) -> {'task_type': ..., 'num_images': ...}"
            )
        self.max_batch_size = batch_size
        self.batch_size = None
        """None, on purpose; see `max_batch_size`."""
        self.shuffle = shuffle
        self.diversity_weight = diversity_weight
        self.priority: Priority = priority
        self.seed = seed
        self.epoch = 0
        """The epoch that the next iteration gives."""
        self.limit_bytes = _limit(max_memory_mb, backend) * (1 - memory_margin_percent)
        """What a batch may take, the margin already taken off."""
        self.costs = StepCosts(memory_predictor)
        self.shapes = [
            shape_from_metadata(dataset.get_sample_metadata(index), str(index))
            for index in range(len(dataset))
        ]
        """What is known of each sample."""
        self._fixed = math.ceil(self.costs.fixed)
        self._items = _items(self.costs, self.shapes)
        self.oversized = self._find_oversized(oversize)
        """Samples over the limit alone."""
        self._oversize: Oversize = oversize
        self._planned: tuple[int, list[list[int]]] | None = None

    def _find_oversized(self, oversize: Oversize) -> tuple[int, ...]:
        over = np.flatnonzero(self._items.cost_N > math.floor(self.limit_bytes) - self._fixed).tolist()
        if over:
            shape, cost = self.shapes[over[0]], self._items.cost_N[over[0]] + self._fixed
            message = (
                f"{len(over)} sample(s) are over the limit alone, the first is {shape.key}: "
                f"task {shape.task_type}, {shape.num_images} image(s), {cost / GB:.2f} GB > "
                f"{self.limit_bytes / GB:.2f} GB"
            )
            if oversize == "raise":
                raise OversizeError(
                    f'{message}. Raise max_memory_mb, use smaller images, or say oversize="isolate" or "drop"'
                )
            logger.warning(
                "%s: %s", message, "each gets its own batch" if oversize == "isolate" else "left out"
            )
        return tuple(over)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration gives.

        Args:
            epoch: From 0.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.batches(self.epoch)
        self.epoch += 1
        yield from batches

    def __len__(self) -> int:
        return len(self.batches(self.epoch))

    def batches(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch: a pure function of data, settings, seed and epoch.

        Args:
            epoch: From 0.
        """
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return self._planned[1]

    def _plan(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch, 1])
        number = len(self.shapes)
        position = rng.permutation(number) if self.shuffle else np.arange(number)
        kept = np.setdiff1d(np.arange(number), np.array(self.oversized, np.int64))
        built = self._build(kept, position[kept])
        if self._oversize == "isolate":
            built += [[index] for index in self.oversized]
        return [built[at] for at in rng.permutation(len(built))] if self.shuffle else built

    def _build(self, indices: Int64s, position: Int64s) -> list[list[int]]:
        chosen = TaskItems(cost_N=self._items.cost_N[indices], task_N=self._items.task_N[indices])
        batches = chosen.batches(
            position.astype(np.int64),
            fixed=self._fixed,
            limit=math.floor(self.limit_bytes),
            max_batch=self.max_batch_size,
            weight=self.diversity_weight,
            priority=self.priority,
        )
        return [indices[batch].tolist() for batch in batches]

    def construct_batch(self, available_indices: Sequence[int]) -> list[int]:
        """Return the batch that is built first of these samples; ties go to the earlier one.

        Args:
            available_indices: Samples that fit alone, each once.
        """
        indices = np.array(available_indices, np.int64)
        built = self._build(indices, np.arange(len(indices))) if len(indices) else []
        return built[0] if built else []

    def _estimate_batch_memory(self, batch: Sequence[int]) -> float:
        """Return the GB that a batch is predicted to take."""
        return self.costs.predict(self.costs.counts(self.shapes[index] for index in batch)) / GB

    @property
    def digest(self) -> str:
        """A name for the plan: equal for equal data, settings and seed."""
        hashed = hashlib.sha256(self._items.cost_N.tobytes() + self._items.task_N.tobytes())
        settings = (self._fixed, self.limit_bytes, self.max_batch_size, self.diversity_weight)
        hashed.update(repr((settings, self.priority, self._oversize, self.shuffle, self.seed)).encode())
        return hashed.hexdigest()[:16]


def _items(costs: StepCosts, shapes: Sequence[SampleShape]) -> TaskItems:
    names = {task: number for number, task in enumerate(dict.fromkeys(shape.task_type for shape in shapes))}
    return TaskItems(
        cost_N=np.ceil(np.array(costs.items(shapes), np.float64)).astype(np.int64),
        task_N=np.array([names[shape.task_type] for shape in shapes], np.int64),
    )


def _limit(max_memory_mb: float | None, backend: MemoryBackend | None) -> float:
    if max_memory_mb is not None:
        return max_memory_mb * 1e6
    if backend is None and torch.cuda.is_available():
        backend = CudaMemory()
    total = backend.read().total if backend is not None else 0
    return float(total) if total else DEFAULT_MEMORY_MB * 1e6


def _check(
    batch_size: Any, max_memory_mb: Any, weight: float, priority: str, oversize: str, margin: float
) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be a positive integer, got {batch_size!r}")
    if max_memory_mb is not None and not max_memory_mb > 0:
        raise ConfigError(f"max_memory_mb must be positive, got {max_memory_mb!r}")
    if not 0 <= weight <= 1:
        raise ConfigError(f"diversity_weight is a share, 0 to 1, got {weight!r}")
    if not 0 <= margin < 1:
        raise ConfigError(f"memory_margin_percent is a fraction, 0 <= margin < 1, got {margin!r}")
    if priority not in get_args(Priority):
        raise ConfigError(f"priority must be one of {get_args(Priority)}, got {priority!r}")
    if oversize not in get_args(Oversize):
        raise ConfigError(f"oversize must be one of {get_args(Oversize)}, got {oversize!r}")
