"""What the reference document says of normalising, balancing, monitoring and settings, sentence by sentence.

Each entry is a sentence and a function that holds exactly if the code does as the sentence says; where the
document is wrong, the entry is of the variant that keeps it, and says so.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

from tests.unit.batching.runs import run
from vlmpack import batching
from vlmpack.batching import (
    BatchMetrics,
    DynamicBatchingMonitor,
    EffectiveBatchSizeNormalizer,
    EpochMetrics,
    GradNormBalancer,
    HeterogeneousTrainingConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = (
    "EffectiveBatchSizeNormalizer",
    "DynamicBatchingTrainer",
    "GradNormBalancer",
    "BatchMetrics",
    "EpochMetrics",
    "DynamicBatchingMonitor",
    "HeterogeneousTrainingConfig",
    "DynamicBatchingTrainingPipeline",
    "HeterogeneousTaskDataset",
)


def parameters(of: Any) -> list[str]:
    """Return the names that a callable takes, without `self`."""
    return [name for name in inspect.signature(of).parameters if name != "self"]


def fields(of: Any) -> set[str]:
    return set(of.__dataclass_fields__) | {name for name in dir(of) if not name.startswith("_")}


def normalizer() -> EffectiveBatchSizeNormalizer:
    return EffectiveBatchSizeNormalizer(16, 32, 5e-5)


def preset(name: str) -> tuple[Any, ...]:
    config = HeterogeneousTrainingConfig.preset(name)  # type: ignore[arg-type]
    return (
        config.base_batch_size,
        config.gradient_accumulation_steps,
        config.memory_margin_percent,
        config.enable_gradient_checkpointing,
        config.use_grad_norm_balancing,
    )


def assigned() -> bool:
    """The document's advanced configuration, assignment by assignment."""
    config = HeterogeneousTrainingConfig()
    values = {
        "num_epochs": 3,
        "learning_rate": 5e-5,
        "task_distribution": {"T1": 0.5, "T2": 0.25, "T3": 0.25},
        "gradient_accumulation_steps": 4,
        "use_gradient_accumulation": True,
        "max_memory_mb": 20000,
        "memory_margin_percent": 0.15,
        "use_grad_norm_balancing": True,
        "grad_norm_alpha": 1.5,
        "base_batch_size": 8,
    }
    for name, value in values.items():
        setattr(config, name, value)
    return all(getattr(config, name) == value for name, value in values.items())


def balanced_by_hand() -> bool:
    """weight *= (mean / norm)^alpha on weighted norms; here all weights are 1, so norms are as they are."""
    norms = {"T1": 1.0, "T2": 2.0, "T3": 4.0}
    mean = (1.0 + 2.0 + 4.0) / 3
    raised = {task: 1.0 * (mean / norm) ** 1.5 for task, norm in norms.items()}
    total = sum(raised.values())
    want = {task: weight * 3 / total for task, weight in raised.items()}
    got = GradNormBalancer().update(norms)
    return all(math.isclose(got[task], want[task], rel_tol=1e-14) for task in norms)


def monitored() -> DynamicBatchingMonitor:
    monitor = DynamicBatchingMonitor()
    for each in run(12):
        monitor.record_batch(each)
    monitor.end_epoch()
    return monitor


DOCUMENTED: dict[str, Callable[[], bool]] = {
    **{f"{name} can be imported": lambda name=name: name in batching.__all__ for name in NAMES},
    # ---- normalisation
    "normalizer takes base, target and rate in this order": lambda: (
        parameters(EffectiveBatchSizeNormalizer.__init__)[:3]
        == ["base_batch_size", "target_batch_size", "base_lr"]
    ),
    "grad *= base / current": lambda: normalizer().gradient_scale(24) == 16 / 24,
    "lr = base_lr * sqrt(current / base)": lambda: normalizer().scaled_lr(24) == 5e-5 * math.sqrt(24 / 16),
    "loss *= target / (current * accumulation)": lambda: normalizer().loss_scale(8, 3) == 32 / (8 * 3),
    "accumulation steps adjust to the batch": lambda: (
        [normalizer().accumulation_steps(size) for size in (4, 8, 16, 32)] == [8, 4, 2, 1]
    ),
    "effective batch size scale is batch / 16": lambda: normalizer().batch_size_scale(8) == 8 / 16,
    "equal effective batches learn alike (16 x 1 = 8 x 2 = 4 x 4 = 2 x 8)": lambda: (
        len({normalizer().apply(size, 16 // size) for size in (16, 8, 4, 2)}) == 1
    ),
    # ---- trainer
    "the trainer's documented keywords": lambda: (
        {"memory_predictor", "oom_guardian", "batch_size_normalizer", "task_loss_weights"}
        <= set(parameters(batching.DynamicBatchingTrainer.__init__))
    ),
    # ---- balancing
    "alpha is 1.5 by default": lambda: GradNormBalancer().alpha == 1.5,
    "default weights are 1 for T1, T2 and T3": lambda: (
        GradNormBalancer().weights == {"T1": 1.0, "T2": 1.0, "T3": 1.0}
    ),
    "weight *= (mean norm / norm)^alpha, normalised to the number of tasks": balanced_by_hand,
    # ---- monitoring
    "batch metrics: loss and per-task loss": lambda: {"loss", "task_losses"} <= fields(BatchMetrics),
    "batch metrics: memory allocated and reserved": lambda: (
        {"allocated_bytes", "reserved_bytes"} <= fields(BatchMetrics)
    ),
    "batch metrics: samples a second": lambda: run(1)[0].samples_per_s == 9 / 0.59,
    "batch metrics: gradient norms and task types": lambda: (
        {"grad_norm", "task_grad_norms", "task_types"} <= fields(BatchMetrics)
    ),
    "epoch metrics: average and per-task loss": lambda: (
        {"average_loss", "task_losses"} <= fields(EpochMetrics)
    ),
    "epoch metrics: peak and average memory": lambda: {"peak_bytes", "average_bytes"} <= fields(EpochMetrics),
    "epoch metrics: throughput, recoveries, time": lambda: (
        {"samples_per_s", "num_ooms", "seconds"} <= fields(EpochMetrics)
    ),
    "the monitor counts recoveries": lambda: sum(epoch.num_ooms for epoch in monitored().epochs) == 2,
    "the monitor has curves, comparison, report and JSON": lambda: all(
        callable(getattr(DynamicBatchingMonitor, name))
        for name in ("plot_training_curves", "plot_task_comparison", "generate_report", "export_json")
    ),
    # ---- configuration
    "a config needs no argument and its attributes can be assigned": assigned,
    "epochs and rate: 3 and 5e-5": lambda: (
        (HeterogeneousTrainingConfig().num_epochs, HeterogeneousTrainingConfig().learning_rate) == (3, 5e-5)
    ),
    "loss weights are initialised": lambda: (
        HeterogeneousTrainingConfig().loss_weights == {"T1": 1.0, "T2": 1.0, "T3": 1.0}
    ),
    "15 to 20 GB: 8, 4, 0.20, on, on": lambda: preset("limited") == (8, 4, 0.20, True, True),
    "25 to 30 GB: 16, 2, 0.10, off, on": lambda: preset("moderate") == (16, 2, 0.10, False, True),
    "40 GB and more: 32, 1, 0.05, off, on": lambda: preset("high") == (32, 1, 0.05, False, True),
    "the pipeline takes config, model and tokenizer": lambda: (
        parameters(batching.DynamicBatchingTrainingPipeline.__init__)[:3] == ["config", "model", "tokenizer"]
    ),
    "the pipeline trains on a training and an evaluation data set": lambda: (
        parameters(batching.DynamicBatchingTrainingPipeline.train)[:2] == ["train_dataset", "eval_dataset"]
    ),
    "the data set gives the sampler its metadata": lambda: callable(
        batching.HeterogeneousTaskDataset.get_sample_metadata
    ),
}
"""Sentence -> whether it holds."""
