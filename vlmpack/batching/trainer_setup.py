"""What `DynamicBatchingTrainer` changes before a run: arguments, the plan, the loader."""

from __future__ import annotations

import copy
import functools
import logging
from typing import TYPE_CHECKING, Any, Final

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from vlmpack.batching.records import StepBatch, StepDataset, SupportsSampleMetadata, shape_of
from vlmpack.batching.sampler import MemoryAwareBatchSampler
from vlmpack.batching.step_plan import RandomSteps, StepPlan
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vlmpack.batching.costs import Formula
    from vlmpack.batching.step_plan import StepSource

logger = logging.getLogger(__name__)

_STRATEGIES: Final = ("random", "sequential")
"""`train_sampling_strategy` that a plan can follow; others are asked for by `batch_sampler`."""


def own_arguments(args: TrainingArguments | None) -> tuple[TrainingArguments, int]:
    """Return a copy of the arguments for a loop in which every item is a step, and the steps' accumulation.

    Args:
        args: The user's; they are left as they are.

    Raises:
        ConfigError: If they ask for what cannot be split into micro-batches here.
    """
    args = TrainingArguments("tmp_trainer") if args is None else copy.copy(args)
    if args.deepspeed or args.fsdp:
        raise ConfigError(
            "DeepSpeed and FSDP exchange data inside of each forward pass, so ranks cannot split their steps "
            "on their own: use the plain Trainer with micro-batches that the memory model plans"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process (DataParallel): start one process each by torchrun"
        )
    accumulation = args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    if args.auto_find_batch_size:
        logger.warning("auto_find_batch_size restarts the training after an OOM; it is off: steps are split")
        args.auto_find_batch_size = False
    return args, accumulation


def make_source(
    dataset: Any,
    args: TrainingArguments,
    *,
    step_size: int | Callable[[int], int],
    formula: Formula,
    memory_aware: bool,
    max_memory_mb: float | None,
) -> StepSource:
    """Return what the steps hold: batches of mixed tasks by memory, or samples in random order.

    Args:
        dataset: Map-style.
        args: Seed, order and whether a smaller last step is dropped.
        step_size: Samples of a step over all ranks, or a function of the epoch.
        formula: What batches cost.
        memory_aware: Take a `MemoryAwareBatchSampler`.
        max_memory_mb: Its limit, over all ranks and micro-batches.

    Raises:
        ConfigError: If the arguments ask for an order that a plan cannot give.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    strategy = str(getattr(args, "train_sampling_strategy", "random"))
    if strategy not in _STRATEGIES:
        raise ConfigError(
            f"train_sampling_strategy={strategy!r} orders samples for fixed batches; here batch_sampler= "
            f"gives the steps, or one of {_STRATEGIES}"
        )
    shuffle = strategy == "random"
    if memory_aware:
        if callable(step_size):
            raise ConfigError("memory-aware steps have one largest size: step_size must be a number")
        return MemoryAwareBatchSampler(
            dataset, step_size, max_memory_mb, shuffle, memory_predictor=formula, seed=seed
        )
    return RandomSteps(
        len(dataset), step_size, shuffle=shuffle, seed=seed, drop_last=args.dataloader_drop_last
    )


def make_plan(source: StepSource, args: TrainingArguments, costs: Sequence[float] | None) -> StepPlan:
    """Return the plan of the whole run for this rank.

    Args:
        source: What the steps hold.
        args: Epochs or steps, rank and world size.
        costs: Of each sample, to load ranks evenly.
    """
    return StepPlan(
        source,
        epochs=args.num_train_epochs,
        max_steps=args.max_steps if args.max_steps > 0 else None,
        rank=args.process_index,
        world_size=args.world_size,
        costs=costs,
    )


def planned_loader(dataset: Any, plan: StepPlan, args: TrainingArguments) -> Any:
    """Return a loader whose items are steps; rank-aware already, and not moved to the device.

    Args:
        dataset: Map-style.
        plan: This rank's.
        args: Workers and memory pinning.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    workers = args.dataloader_num_workers
    options: dict[str, Any] = {}
    if workers:
        options = {
            "prefetch_factor": args.dataloader_prefetch_factor,
            "persistent_workers": args.dataloader_persistent_workers,
            "worker_init_fn": functools.partial(seed_worker, num_workers=workers, rank=args.process_index),
            "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None),
        }
    loader: DataLoader[StepBatch] = DataLoader(
        StepDataset(dataset),  # type: ignore[arg-type]
        batch_sampler=plan,
        collate_fn=as_it_is,  # type: ignore[arg-type]  # a step comes from __getitems__
        num_workers=workers,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    return as_one_rank(loader)


def streaming_loader(dataset: IterableDataset[Any], args: TrainingArguments, step_size: int) -> Any:
    """Return a loader over a stream, in steps of a fixed number of items, on one rank.

    The Trainer's own loader would hand a stream to accelerate's dispatcher, which cuts every tensor of a
    packed batch to the rows of the first one.

    Args:
        dataset: A stream.
        args: Its `max_steps` says how long the run is, unless the stream has a length.
        step_size: Items of a step.

    Raises:
        ConfigError: If there are several ranks, which could run out of data at different steps.
    """
    if args.world_size > 1:
        raise ConfigError(
            f"a stream cannot be planned over {args.world_size} ranks without losing or doubling samples: "
            "use a data set with a length, such as ConstantLengthDataset.index()"
        )
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=step_size,
        collate_fn=_Steps(),
        num_workers=args.dataloader_num_workers,
        drop_last=args.dataloader_drop_last,
    )
    return as_one_rank(loader)


def as_one_rank(loader: DataLoader[Any]) -> Any:
    """Wrap a loader for accelerate without letting it shard, dispatch or move what it gives."""
    return prepare_data_loader(
        loader, num_processes=1, process_index=0, put_on_device=False, dispatch_batches=False
    )


def as_it_is(step: StepBatch) -> StepBatch:
    """Return the step: it is collated when it is split."""
    return step


class _Steps:
    """Makes steps of a stream's items; keys count items in this process."""

    def __init__(self) -> None:
        self._items = self._numbers()

    @staticmethod
    def _numbers() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    def __call__(self, items: Sequence[Any]) -> StepBatch:
        shapes = tuple(shape_of(item, str(next(self._items))) for item in items)
        return StepBatch(items=tuple(items), shapes=shapes)


def sample_costs(dataset: Any, source: StepSource, formula: Formula) -> list[float] | None:
    """Return what each sample costs, if the data set tells before it is read.

    Args:
        dataset: Map-style.
        source: A memory-aware sampler has read the metadata already.
        formula: What batches cost.
    """
    from vlmpack.batching.costs import StepCosts
    from vlmpack.batching.records import shape_from_metadata

    if isinstance(source, MemoryAwareBatchSampler):
        shapes = source.shapes
    elif isinstance(dataset, SupportsSampleMetadata):
        shapes = [
            shape_from_metadata(dataset.get_sample_metadata(index), str(index))
            for index in range(len(dataset))
        ]
    else:
        return None
    return StepCosts(formula).items(shapes)
