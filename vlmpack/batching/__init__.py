"""Batch-size control: what a step holds, how it is split, normalised, balanced and watched.

Names are imported when they are first used: settings and samplers need neither a Trainer nor matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmpack.batching.adam_scaling import (
        AdamSettings,
        scale_adam,
        scaled_adam,
    )
    from vlmpack.batching.agreement import (
        Ranks,
    )
    from vlmpack.batching.balance import (
        GradNormBalancer,
        compute_gradient_norm,
        documented_update,
    )
    from vlmpack.batching.callbacks import (
        MemoryMonitorCallback,
        MemorySafetyCallback,
    )
    from vlmpack.batching.checkpointing import (
        CheckpointSaving,
        GradientCheckpointManager,
    )
    from vlmpack.batching.collate import (
        HeterogeneousBatch,
        HeterogeneousCollator,
    )
    from vlmpack.batching.config import (
        HeterogeneousTrainingConfig,
        NormalizationConfig,
        SafetyConfig,
    )
    from vlmpack.batching.costs import (
        StepCosts,
    )
    from vlmpack.batching.dataloaders import (
        close_dataloader,
        recreate_dataloader,
        scheduled_epochs,
    )
    from vlmpack.batching.dataset import (
        HeterogeneousTaskDataset,
        task_by_images,
    )
    from vlmpack.batching.detect import (
        is_oom_error,
    )
    from vlmpack.batching.estimators import (
        estimate_batch_size_for_blocks,
        estimate_batch_size_for_max_crops,
        estimate_batch_size_for_num_blocks,
        estimate_batch_size_for_top_k,
        estimate_for_depth,
        starting_size,
    )
    from vlmpack.batching.experiment import (
        BatchSizeExperiment,
    )
    from vlmpack.batching.guardian import (
        OOMGuardian,
    )
    from vlmpack.batching.hyper_params import (
        ExponentialLRConfig,
        LearningRateConfig,
        OptimizerConfig,
        TrainingHyperParams,
        WarmupCosineConfig,
    )
    from vlmpack.batching.lr_coupling import (
        BatchLRCallback,
        sample_counted_schedule,
        scaled_learning_rate,
    )
    from vlmpack.batching.metrics import (
        BatchMetrics,
        EpochMetrics,
    )
    from vlmpack.batching.model_probe import (
        ModelProbe,
    )
    from vlmpack.batching.monitor import (
        DynamicBatchingMonitor,
    )
    from vlmpack.batching.monitor_callback import (
        MonitorCallback,
    )
    from vlmpack.batching.noise_scale import (
        GradientNoiseScale,
        noise_and_signal,
    )
    from vlmpack.batching.normalize import (
        EffectiveBatchSizeNormalizer,
        Normalization,
        adascale_gain,
        gradient_scale,
        loss_scale,
        scaled_lr,
        seesaw_batch_size,
    )
    from vlmpack.batching.pipeline import (
        DynamicBatchingTrainingPipeline,
        TrainingResult,
    )
    from vlmpack.batching.prime import (
        prime_optimizer,
    )
    from vlmpack.batching.records import (
        SampleMetadata,
        SampleShape,
        StepBatch,
        SupportsSampleMetadata,
        infer_task_type,
        num_images,
        worst_case_images,
    )
    from vlmpack.batching.recovery import (
        MicroBatch,
        StepReport,
        run_step_with_recovery,
    )
    from vlmpack.batching.rollback import (
        Rollback,
    )
    from vlmpack.batching.sampler import (
        MemoryAwareBatchSampler,
    )
    from vlmpack.batching.schedule import (
        BatchSizeScheduler,
        MicroBatches,
    )
    from vlmpack.batching.schedule_config import (
        BatchSizeConfig,
        CosineBatchSizeConfig,
        ExponentialBatchSizeConfig,
        FunctionBatchSizeConfig,
        LinearBatchSizeConfig,
        StepBatchSizeConfig,
        parse_schedule,
    )
    from vlmpack.batching.schedule_steps import (
        BatchSizePlan,
        plan_batch_sizes,
    )
    from vlmpack.batching.scheduled_steps import (
        ScheduledSteps,
    )
    from vlmpack.batching.search import (
        BatchSizeSearch,
        SearchResult,
        search_configurations,
    )
    from vlmpack.batching.search_rules import (
        DocumentedRule,
        GuidedRule,
        Trial,
    )
    from vlmpack.batching.search_store import (
        SearchStore,
        write_results,
    )
    from vlmpack.batching.search_trials import (
        NoFeasibleBatchSize,
        NoFeasibleBatchSizeError,
        ProbeError,
        ProbeOutcome,
    )
    from vlmpack.batching.split import (
        split_pack,
    )
    from vlmpack.batching.step_plan import (
        RandomSteps,
        StepPlan,
    )
    from vlmpack.batching.surgery import (
        GradVac,
        PCGrad,
    )
    from vlmpack.batching.task_gradients import (
        TaskBalancing,
        TaskGradients,
        last_shared_block,
    )
    from vlmpack.batching.task_metrics import (
        StepSummary,
    )
    from vlmpack.batching.testing import (
        Fault,
        OOMSimulator,
        simulated_oom,
    )
    from vlmpack.batching.trainer import (
        DynamicBatchingTrainer,
    )

_HOME = {
    "AdamSettings": "adam_scaling",
    "scale_adam": "adam_scaling",
    "scaled_adam": "adam_scaling",
    "Ranks": "agreement",
    "GradNormBalancer": "balance",
    "compute_gradient_norm": "balance",
    "documented_update": "balance",
    "MemoryMonitorCallback": "callbacks",
    "MemorySafetyCallback": "callbacks",
    "CheckpointSaving": "checkpointing",
    "GradientCheckpointManager": "checkpointing",
    "HeterogeneousBatch": "collate",
    "HeterogeneousCollator": "collate",
    "HeterogeneousTrainingConfig": "config",
    "NormalizationConfig": "config",
    "SafetyConfig": "config",
    "StepCosts": "costs",
    "close_dataloader": "dataloaders",
    "recreate_dataloader": "dataloaders",
    "scheduled_epochs": "dataloaders",
    "HeterogeneousTaskDataset": "dataset",
    "task_by_images": "dataset",
    "is_oom_error": "detect",
    "estimate_batch_size_for_blocks": "estimators",
    "estimate_batch_size_for_max_crops": "estimators",
    "estimate_batch_size_for_num_blocks": "estimators",
    "estimate_batch_size_for_top_k": "estimators",
    "estimate_for_depth": "estimators",
    "starting_size": "estimators",
    "BatchSizeExperiment": "experiment",
    "OOMGuardian": "guardian",
    "ExponentialLRConfig": "hyper_params",
    "LearningRateConfig": "hyper_params",
    "OptimizerConfig": "hyper_params",
    "TrainingHyperParams": "hyper_params",
    "WarmupCosineConfig": "hyper_params",
    "BatchLRCallback": "lr_coupling",
    "sample_counted_schedule": "lr_coupling",
    "scaled_learning_rate": "lr_coupling",
    "BatchMetrics": "metrics",
    "EpochMetrics": "metrics",
    "ModelProbe": "model_probe",
    "DynamicBatchingMonitor": "monitor",
    "MonitorCallback": "monitor_callback",
    "GradientNoiseScale": "noise_scale",
    "noise_and_signal": "noise_scale",
    "EffectiveBatchSizeNormalizer": "normalize",
    "Normalization": "normalize",
    "adascale_gain": "normalize",
    "gradient_scale": "normalize",
    "loss_scale": "normalize",
    "scaled_lr": "normalize",
    "seesaw_batch_size": "normalize",
    "DynamicBatchingTrainingPipeline": "pipeline",
    "TrainingResult": "pipeline",
    "prime_optimizer": "prime",
    "SampleMetadata": "records",
    "SampleShape": "records",
    "StepBatch": "records",
    "SupportsSampleMetadata": "records",
    "infer_task_type": "records",
    "num_images": "records",
    "worst_case_images": "records",
    "MicroBatch": "recovery",
    "StepReport": "recovery",
    "run_step_with_recovery": "recovery",
    "Rollback": "rollback",
    "MemoryAwareBatchSampler": "sampler",
    "BatchSizeScheduler": "schedule",
    "MicroBatches": "schedule",
    "BatchSizeConfig": "schedule_config",
    "CosineBatchSizeConfig": "schedule_config",
    "ExponentialBatchSizeConfig": "schedule_config",
    "FunctionBatchSizeConfig": "schedule_config",
    "LinearBatchSizeConfig": "schedule_config",
    "StepBatchSizeConfig": "schedule_config",
    "parse_schedule": "schedule_config",
    "BatchSizePlan": "schedule_steps",
    "plan_batch_sizes": "schedule_steps",
    "ScheduledSteps": "scheduled_steps",
    "BatchSizeSearch": "search",
    "SearchResult": "search",
    "search_configurations": "search",
    "DocumentedRule": "search_rules",
    "GuidedRule": "search_rules",
    "Trial": "search_rules",
    "SearchStore": "search_store",
    "write_results": "search_store",
    "NoFeasibleBatchSize": "search_trials",
    "NoFeasibleBatchSizeError": "search_trials",
    "ProbeError": "search_trials",
    "ProbeOutcome": "search_trials",
    "split_pack": "split",
    "RandomSteps": "step_plan",
    "StepPlan": "step_plan",
    "GradVac": "surgery",
    "PCGrad": "surgery",
    "TaskBalancing": "task_gradients",
    "TaskGradients": "task_gradients",
    "last_shared_block": "task_gradients",
    "StepSummary": "task_metrics",
    "Fault": "testing",
    "OOMSimulator": "testing",
    "simulated_oom": "testing",
    "DynamicBatchingTrainer": "trainer",
}


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
    "Fault",
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
    "loss_scale",
    "noise_and_signal",
    "num_images",
    "parse_schedule",
    "plan_batch_sizes",
    "prime_optimizer",
    "recreate_dataloader",
    "run_step_with_recovery",
    "sample_counted_schedule",
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
