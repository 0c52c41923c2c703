"""Turn any Hugging Face vision-language data set into dense, memory-safe, faithful training batches.

Names are imported when they are first used, so that `vlmpack estimate` starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmpack.budget import BatchBudget, PackBudget, SampleCost
    from vlmpack.collate import Batch, VQACollator
    from vlmpack.errors import (
        BudgetError,
        ConfigError,
        OversizeError,
        RefusalRatioError,
        SampleError,
        SourceError,
        StorageError,
        VlmpackError,
    )
    from vlmpack.families import Family, family_for, prepare_model_for_packing, verify_isolation
    from vlmpack.geometry import ImageGeometry, TileGrid, Tiling
    from vlmpack.images import DynamicResize, GlobalAndSplitImages, SplitImage
    from vlmpack.loader import ResumableLoader
    from vlmpack.memory import BatchGuard, ModelShape, TrainingRegime
    from vlmpack.offline import load_packed
    from vlmpack.packing import (
        ConstantLengthDataset,
        PackedSequence,
        PackingReport,
        PackPlan,
        StreamPacker,
        plan,
    )
    from vlmpack.pipeline import Pipeline, PipelineConfig, build_pipeline
    from vlmpack.ranks import EvenRanks, PackLoader
    from vlmpack.samples import Refusal, Sample
    from vlmpack.stages import (
        EmbeddingGrowth,
        Mixture,
        RatingMinima,
        SpooledSamples,
        TarShards,
        VQADataset,
        add_image_tokens,
    )
    from vlmpack.transfer import SharedBatches
    from vlmpack.weighting import loss_weights, step_weight_sum, weighted_loss

_HOME = {
    "BatchBudget": "budget",
    "PackBudget": "budget",
    "SampleCost": "budget",
    "Batch": "collate",
    "VQACollator": "collate",
    "BudgetError": "errors",
    "ConfigError": "errors",
    "OversizeError": "errors",
    "RefusalRatioError": "errors",
    "StorageError": "errors",
    "SampleError": "errors",
    "SourceError": "errors",
    "VlmpackError": "errors",
    "Family": "families",
    "family_for": "families",
    "prepare_model_for_packing": "families",
    "verify_isolation": "families",
    "ImageGeometry": "geometry",
    "TileGrid": "geometry",
    "Tiling": "geometry",
    "BatchGuard": "memory",
    "ModelShape": "memory",
    "TrainingRegime": "memory",
    "DynamicResize": "images",
    "GlobalAndSplitImages": "images",
    "SplitImage": "images",
    "ResumableLoader": "loader",
    "ConstantLengthDataset": "packing",
    "PackedSequence": "packing",
    "PackingReport": "packing",
    "PackPlan": "packing",
    "StreamPacker": "packing",
    "plan": "packing",
    "Pipeline": "pipeline",
    "PipelineConfig": "pipeline",
    "build_pipeline": "pipeline",
    "EvenRanks": "ranks",
    "PackLoader": "ranks",
    "load_packed": "offline",
    "Refusal": "samples",
    "Sample": "samples",
    "EmbeddingGrowth": "stages",
    "Mixture": "stages",
    "TarShards": "stages",
    "RatingMinima": "stages",
    "VQADataset": "stages",
    "SpooledSamples": "stages",
    "add_image_tokens": "stages",
    "SharedBatches": "transfer",
    "loss_weights": "weighting",
    "step_weight_sum": "weighting",
    "weighted_loss": "weighting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BatchBudget",
    "BatchGuard",
    "BudgetError",
    "ConfigError",
    "ConstantLengthDataset",
    "DynamicResize",
    "EmbeddingGrowth",
    "EvenRanks",
    "Family",
    "GlobalAndSplitImages",
    "ImageGeometry",
    "Mixture",
    "ModelShape",
    "OversizeError",
    "PackBudget",
    "PackLoader",
    "PackPlan",
    "PackedSequence",
    "PackingReport",
    "Pipeline",
    "PipelineConfig",
    "RatingMinima",
    "Refusal",
    "RefusalRatioError",
    "ResumableLoader",
    "Sample",
    "SampleCost",
    "SampleError",
    "SharedBatches",
    "SourceError",
    "SplitImage",
    "SpooledSamples",
    "StorageError",
    "StreamPacker",
    "TarShards",
    "TileGrid",
    "Tiling",
    "TrainingRegime",
    "VQACollator",
    "VQADataset",
    "VlmpackError",
    "add_image_tokens",
    "build_pipeline",
    "family_for",
    "load_packed",
    "loss_weights",
    "plan",
    "prepare_model_for_packing",
    "step_weight_sum",
    "verify_isolation",
    "weighted_loss",
]
