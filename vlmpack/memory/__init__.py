"""The GPU memory of a training step: estimated from sizes, inverted into budgets, calibrated at run time.

Nothing here needs torch or numba to be imported; what measures a real step loads torch when it is used.
"""

from __future__ import annotations

from vlmpack.memory.estimate import MemoryEstimate, Phase, estimate
from vlmpack.memory.gpus import GPUS, Gpu, find_gpu
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
from vlmpack.memory.model_shape import ConnectorShape, LanguageShape, ModelShape, VisionShape
from vlmpack.memory.presets import PRESETS
from vlmpack.memory.regime import TrainingRegime

__all__ = [
    "GPUS",
    "PRESETS",
    "ConnectorShape",
    "FrontPoint",
    "Gpu",
    "LanguageShape",
    "MemoryEstimate",
    "ModelShape",
    "Phase",
    "TileLimit",
    "TrainingRegime",
    "Verdict",
    "VisionShape",
    "batch_budget_for_gpu",
    "check",
    "estimate",
    "find_gpu",
    "max_tiles",
    "pack_budget_for_gpu",
    "pareto_front",
]
