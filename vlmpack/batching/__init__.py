"""Batch-size control: what a step holds, how it is split, normalised, balanced and watched.

Names are imported when they are first used: settings and samplers need neither a Trainer nor matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmpack.batching.adam_scaling import AdamSettings, scale_adam, scaled_adam
    from vlmpack.batching.agreement import Ranks
    from vlmpack.batching.balance import GradNormBalancer, compute_gradient_norm, documented_update
    from vlmpack.batching.callbacks import MemoryMonitorCallback, MemorySafetyCallback
    from vlmpack.batching.checkpointing import CheckpointSaving, GradientCheckpointManager
    from vlmpack.batching.collate import HeterogeneousBatch, HeterogeneousCollator
    from vlmpack.batching.config import HeterogeneousTrainingConfig, NormalizationConfig, SafetyConfig
    from vlmpack.batching.costs import StepCosts
    from vlmpack.batching.dataloaders import close_dataloader, recreate_dataloader, scheduled_epochs
    from vlmpack.batching.dataset import HeterogeneousTaskDataset, task_by_images
    from vlmpack.batching.detect import is_oom_error
    from vlmpack.batching.estimators import (
        estimate_batch_size_for_blocks,
        estimate_batch_size_for_max_crops,
        estimate_batch_size_for_num_blocks,
        estimate_batch_size_for_top_k,
        estimate_for_depth,
        starting_size,
    )
    from vlmpack.batching.experiment import BatchSizeExperiment
    from vlmpack.batching.guardian import OOMGuardian
    from vlmpack.batching.hyper_params import (
        ExponentialLRConfig,
        LearningRateConfig,
        OptimizerConfig,
        TrainingHyperParams,
        WarmupCosineConfig,
    )
    from vlmpack.batching.lr_coupling import BatchLRCallback, sample_counted_schedule, scaled_learning_rate
    from vlmpack.batching.metrics import BatchMetrics, EpochMetrics
    from vlmpack.batching.model_probe import ModelProbe
    from vlmpack.batching.monitor import DynamicBatchingMonitor
    from vlmpack.batching.monitor_callback import MonitorCallback
    from vlmpack.batching.noise_scale import GradientNoiseScale, noise_and_signal
    from vlmpack.batching.normalize import (
        EffectiveBatchSizeNormalizer,
        Normalization,
        adascale_gain,
        gradient_scale,
        loss_scale,
        scaled_lr,
        seesaw_batch_size,
    )
    from vlmpack.batching.pipeline import DynamicBatchingTrainingPipeline, TrainingResult
    from vlmpack.batching.prime import prime_optimizer
    from vlmpack.batching.records import (
        SampleMetadata,
        SampleShape,
        StepBatch,
        SupportsSampleMetadata,
        infer_task_type,
        legacy_sample_metadata,
        num_images,
        sample_metadata,
        worst_case_images,
    )
    from vlmpack.batching.recovery import MicroBatch, StepReport, run_step_with_recovery
    from vlmpack.batching.rollback import Rollback
    from vlmpack.batching.sampler import MemoryAwareBatchSampler
    from vlmpack.batching.schedule import BatchSizeScheduler, MicroBatches
    from vlmpack.batching.schedule_config import (
        BatchSizeConfig,
        CosineBatchSizeConfig,
        ExponentialBatchSizeConfig,
        FunctionBatchSizeConfig,
        LinearBatchSizeConfig,
        StepBatchSizeConfig,
        parse_schedule,
    )
    from vlmpack.batching.schedule_steps import BatchSizePlan, plan_batch_sizes
    from vlmpack.batching.scheduled_steps import ScheduledSteps
    from vlmpack.batching.search import BatchSizeSearch, SearchResult, search_configurations
    from vlmpack.batching.search_rules import DocumentedRule, GuidedRule, Trial
    from vlmpack.batching.search_store import SearchStore, write_results
    from vlmpack.batching.search_trials import (
        NoFeasibleBatchSize,
        NoFeasibleBatchSizeError,
        ProbeError,
        ProbeOutcome,
    )
    from vlmpack.batching.split import split_pack
    from vlmpack.batching.step_plan import RandomSteps, StepPlan
    from vlmpack.batching.surgery import GradVac, PCGrad
    from vlmpack.batching.task_gradients import TaskBalancing, TaskGradients, last_shared_block
    from vlmpack.batching.task_metrics import StepSummary
    from vlmpack.batching.testing import MemoryFault, OOMSimulator, optimizer_fault, simulated_oom
    from vlmpack.batching.trainer import DynamicBatchingTrainer

_NAMES = {
    "adam_scaling": "AdamSettings scale_adam scaled_adam",
    "agreement": "Ranks",
    "balance": "GradNormBalancer compute_gradient_norm documented_update",
    "callbacks": "MemoryMonitorCallback MemorySafetyCallback",
    "checkpointing": "CheckpointSaving GradientCheckpointManager",
    "collate": "HeterogeneousBatch HeterogeneousCollator",
    "config": "HeterogeneousTrainingConfig NormalizationConfig SafetyConfig",
    "costs": "StepCosts",
    "dataloaders": "close_dataloader recreate_dataloader scheduled_epochs",
    "dataset": "HeterogeneousTaskDataset task_by_images",
    "detect": "is_oom_error",
    "estimators": (
        "estimate_batch_size_for_blocks estimate_batch_size_for_max_crops "
        "estimate_batch_size_for_num_blocks estimate_batch_size_for_top_k estimate_for_depth "
        "starting_size"
    ),
    "experiment": "BatchSizeExperiment",
    "guardian": "OOMGuardian",
    "hyper_params": (
        "ExponentialLRConfig LearningRateConfig OptimizerConfig TrainingHyperParams WarmupCosineConfig"
    ),
    "lr_coupling": "BatchLRCallback sample_counted_schedule scaled_learning_rate",
    "metrics": "BatchMetrics EpochMetrics",
    "model_probe": "ModelProbe",
    "monitor": "DynamicBatchingMonitor",
    "monitor_callback": "MonitorCallback",
    "noise_scale": "GradientNoiseScale noise_and_signal",
    "normalize": (
        "EffectiveBatchSizeNormalizer Normalization adascale_gain gradient_scale loss_scale scaled_lr "
        "seesaw_batch_size"
    ),
    "pipeline": "DynamicBatchingTrainingPipeline TrainingResult",
    "prime": "prime_optimizer",
    "records": (
        "SampleMetadata SampleShape StepBatch SupportsSampleMetadata infer_task_type "
        "legacy_sample_metadata num_images sample_metadata worst_case_images"
    ),
    "recovery": "MicroBatch StepReport run_step_with_recovery",
    "rollback": "Rollback",
    "sampler": "MemoryAwareBatchSampler",
    "schedule": "BatchSizeScheduler MicroBatches",
    "schedule_config": (
        "BatchSizeConfig CosineBatchSizeConfig ExponentialBatchSizeConfig FunctionBatchSizeConfig "
        "LinearBatchSizeConfig StepBatchSizeConfig parse_schedule"
    ),
    "schedule_steps": "BatchSizePlan plan_batch_sizes",
    "scheduled_steps": "ScheduledSteps",
    "search": "BatchSizeSearch SearchResult search_configurations",
    "search_rules": "DocumentedRule GuidedRule Trial",
    "search_store": "SearchStore write_results",
    "search_trials": "NoFeasibleBatchSize NoFeasibleBatchSizeError ProbeError ProbeOutcome",
    "split": "split_pack",
    "step_plan": "RandomSteps StepPlan",
    "surgery": "GradVac PCGrad",
    "task_gradients": "TaskBalancing TaskGradients last_shared_block",
    "task_metrics": "StepSummary",
    "testing": "MemoryFault OOMSimulator optimizer_fault simulated_oom",
    "trainer": "DynamicBatchingTrainer",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


__all__ = [
    "AdamSettings",
    "BatchLRCallback",
    "BatchMetrics",
    "BatchSizeConfig",
    "BatchSizeExperiment",
    "BatchSizePlan",
    "BatchSizeScheduler",
    "BatchSizeSearch",
    "CheckpointSaving",
    "CosineBatchSizeConfig",
    "DocumentedRule",
    "DynamicBatchingMonitor",
    "DynamicBatchingTrainer",
    "DynamicBatchingTrainingPipeline",
    "EffectiveBatchSizeNormalizer",
    "EpochMetrics",
    "ExponentialBatchSizeConfig",
    "ExponentialLRConfig",
    "FunctionBatchSizeConfig",
    "GradNormBalancer",
    "GradVac",
    "GradientCheckpointManager",
    "GradientNoiseScale",
    "GuidedRule",
    "HeterogeneousBatch",
    "HeterogeneousCollator",
    "HeterogeneousTaskDataset",
    "HeterogeneousTrainingConfig",
    "LearningRateConfig",
    "LinearBatchSizeConfig",
    "MemoryAwareBatchSampler",
    "MemoryFault",
    "MemoryMonitorCallback",
    "MemorySafetyCallback",
    "MicroBatch",
    "MicroBatches",
    "ModelProbe",
    "MonitorCallback",
    "NoFeasibleBatchSize",
    "NoFeasibleBatchSizeError",
    "Normalization",
    "NormalizationConfig",
    "OOMGuardian",
    "OOMSimulator",
    "OptimizerConfig",
    "PCGrad",
    "ProbeError",
    "ProbeOutcome",
    "RandomSteps",
    "Ranks",
    "Rollback",
    "SafetyConfig",
    "SampleMetadata",
    "SampleShape",
    "ScheduledSteps",
    "SearchResult",
    "SearchStore",
    "StepBatch",
    "StepBatchSizeConfig",
    "StepCosts",
    "StepPlan",
    "StepReport",
    "StepSummary",
    "SupportsSampleMetadata",
    "TaskBalancing",
    "TaskGradients",
    "TrainingHyperParams",
    "TrainingResult",
    "Trial",
    "WarmupCosineConfig",
    "adascale_gain",
    "close_dataloader",
    "compute_gradient_norm",
    "documented_update",
    "estimate_batch_size_for_blocks",
    "estimate_batch_size_for_max_crops",
    "estimate_batch_size_for_num_blocks",
    "estimate_batch_size_for_top_k",
    "estimate_for_depth",
    "gradient_scale",
    "infer_task_type",
    "is_oom_error",
    "last_shared_block",
    "legacy_sample_metadata",
    "loss_scale",
    "noise_and_signal",
    "num_images",
    "optimizer_fault",
    "parse_schedule",
    "plan_batch_sizes",
    "prime_optimizer",
    "recreate_dataloader",
    "run_step_with_recovery",
    "sample_counted_schedule",
    "sample_metadata",
    "scale_adam",
    "scaled_adam",
    "scaled_learning_rate",
    "scaled_lr",
    "scheduled_epochs",
    "search_configurations",
    "seesaw_batch_size",
    "simulated_oom",
    "split_pack",
    "starting_size",
    "task_by_images",
    "worst_case_images",
    "write_results",
]
