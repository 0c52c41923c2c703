"""The GPU memory of a training step: estimated from sizes, inverted into budgets, calibrated at run time.

Nothing here needs torch or numba to be imported; what measures a real step loads torch when it is used.
"""

from __future__ import annotations

from vlmpack.memory.calibrate import CalibratedCost, ConformalMargin, RecursiveCalibrator
from vlmpack.memory.device import (
    CudaMemory,
    FakeMemory,
    MemoryBackend,
    MemoryReading,
    ProcessMemory,
    get_gpu_memory,
    get_gpu_memory_info,
    log_memory_usage,
)
from vlmpack.memory.estimate import MemoryEstimate, Phase, estimate
from vlmpack.memory.gpus import GPUS, Gpu, find_gpu
from vlmpack.memory.guard import BatchGuard
from vlmpack.memory.limits import (
    FrontPoint,
    TileLimit,
    Verdict,
    batch_budget_for_gpu,
    check,
    max_tiles,
    pack_budget_for_gpu,
    pareto_front,
)
from vlmpack.memory.linear_cost import LLAVA_7B, TASKS_3D, LinearCost, analytic_cost, task_cost
from vlmpack.memory.model_shape import ConnectorShape, LanguageShape, ModelShape, VisionShape
from vlmpack.memory.monitor import GradientAccumulationScheduler, MemoryMonitor, MemoryRecord
from vlmpack.memory.predictor import MemoryPredictor, estimate_training_memory, print_training_memory
from vlmpack.memory.presets import PRESETS
from vlmpack.memory.recommend import (
    GPU_PRESETS,
    IMAGE_MULTIPLIER_TABLE,
    SCENARIO_PRESETS,
    BatchPreset,
    Recommendation,
    get_recommended_config,
    recommend,
    recommendation_table,
    to_training_arguments,
)
from vlmpack.memory.regime import TrainingRegime
from vlmpack.memory.remedies import Remedy, remedies
from vlmpack.memory.replay import Replayed, replay
from vlmpack.memory.worst_case import (
    vit_memory_nominal,
    worked_example,
    worst_case_tiles_feasible,
    worst_case_tiles_nominal,
)

__all__ = [
    "GPUS",
    "GPU_PRESETS",
    "IMAGE_MULTIPLIER_TABLE",
    "LLAVA_7B",
    "PRESETS",
    "SCENARIO_PRESETS",
    "TASKS_3D",
    "BatchGuard",
    "BatchPreset",
    "CalibratedCost",
    "ConformalMargin",
    "ConnectorShape",
    "CudaMemory",
    "FakeMemory",
    "FrontPoint",
    "Gpu",
    "GradientAccumulationScheduler",
    "LanguageShape",
    "LinearCost",
    "MemoryBackend",
    "MemoryEstimate",
    "MemoryMonitor",
    "MemoryPredictor",
    "MemoryReading",
    "MemoryRecord",
    "ModelShape",
    "Phase",
    "ProcessMemory",
    "Recommendation",
    "RecursiveCalibrator",
    "Remedy",
    "Replayed",
    "TileLimit",
    "TrainingRegime",
    "Verdict",
    "VisionShape",
    "analytic_cost",
    "batch_budget_for_gpu",
    "check",
    "estimate",
    "estimate_training_memory",
    "find_gpu",
    "get_gpu_memory",
    "get_gpu_memory_info",
    "get_recommended_config",
    "log_memory_usage",
    "max_tiles",
    "pack_budget_for_gpu",
    "pareto_front",
    "print_training_memory",
    "recommend",
    "recommendation_table",
    "remedies",
    "replay",
    "task_cost",
    "to_training_arguments",
    "vit_memory_nominal",
    "worked_example",
    "worst_case_tiles_feasible",
    "worst_case_tiles_nominal",
]
