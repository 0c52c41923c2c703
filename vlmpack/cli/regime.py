"""The options that stand for the settings of `TrainingRegime`, and how they become one.

Names, choices and defaults repeat those of `TrainingRegime`, so that `--help` needs no pydantic; a test
compares the two. One default differs: rows are packed, as all of this library's are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmpack.memory.regime import TrainingRegime

_TYPES = "Number formats and optimizer"
_PARTS = "What is trained"
_SAVING = "What saves memory"
_KERNELS = "Attention and loss"
_DEVICE = "Device"

_Width: TypeAlias = Literal["fp32", "bf16", "fp16"]


def _option(help_text: str, panel: str, **more: Any) -> Any:
    return typer.Option(help=help_text, rich_help_panel=panel, **more)


Weights: TypeAlias = Annotated[_Width, _option("Type of the parameters.", _TYPES)]
Autocast: TypeAlias = Annotated[
    Literal["bf16", "fp16", "none"], _option("Type of matrix multiplications.", _TYPES)
]
Gradients: TypeAlias = Annotated[_Width | None, _option("Type of the gradients; the weights' own.", _TYPES)]
Optimizer: TypeAlias = Annotated[
    Literal["adamw_foreach", "adamw_fused", "adamw_8bit", "sgd", "sgd_momentum"],
    _option("foreach needs a temporary of all parameters at its step.", _TYPES),
]
OptimizerState: TypeAlias = Annotated[
    _Width | None, _option("Type of the optimizer's states; the weights' own.", _TYPES)
]
MasterWeights: TypeAlias = Annotated[
    bool, _option("Keep a float32 copy of the trainable parameters.", _TYPES)
]
Frozen: TypeAlias = Annotated[
    str | None,
    _option("Parts that are not trained, with commas: vision, connector, language.", _PARTS, metavar="PART,"),
]
LoraRank: TypeAlias = Annotated[
    int | None, _option("Rank of adapters in the language model, which is frozen but for them.", _PARTS)
]
LoraTargets: TypeAlias = Annotated[
    Literal["qv", "attention", "all"], _option("Layers that get an adapter.", _PARTS)
]
LoraDtype: TypeAlias = Annotated[_Width | None, _option("Type of the adapters; float32.", _PARTS)]
LoraDropout: TypeAlias = Annotated[bool, _option("Dropout before the adapters.", _PARTS)]
InputGradients: TypeAlias = Annotated[bool, _option("Track the embeddings although they are frozen.", _PARTS)]
CheckpointVision: TypeAlias = Annotated[
    bool, _option("Recompute the vision encoder's blocks in backward.", _SAVING)
]
CheckpointLanguage: TypeAlias = Annotated[
    bool, _option("Recompute the language model's blocks in backward.", _SAVING)
]
VisionSubBatch: TypeAlias = Annotated[
    int | None, _option("Run the vision encoder on this many tiles at a time.", _SAVING)
]
Attention: TypeAlias = Annotated[
    Literal["eager", "sdpa", "flash", "efficient", "math", "flex"],
    _option("Implementation, or SDPA's backend.", _KERNELS),
]
Mask: TypeAlias = Annotated[
    Literal["none", "padding", "packed"],
    _option("packed: all positions against all, which SDPA needs where samples share a row.", _KERNELS),
]
CrossEntropy: TypeAlias = Annotated[
    Literal["full", "chunked", "fused"], _option("All logits at once, or a chunk at a time.", _KERNELS)
]
LossChunk: TypeAlias = Annotated[int, _option("Positions of such a chunk.", _KERNELS)]
HoldsLogits: TypeAlias = Annotated[
    bool, _option("The loop keeps the last step's logits (`_, loss = model(...)`).", _KERNELS)
]
Accumulation: TypeAlias = Annotated[
    bool, _option("Gradients of earlier micro-batches are there already.", _SAVING)
]
Sharding: TypeAlias = Annotated[
    Literal["none", "zero1", "zero2", "zero3"],
    _option("What ranks share: optimizer; gradients too; weights too (FSDP).", _SAVING),
]
Shards: TypeAlias = Annotated[int, _option("Ranks that share.", _SAVING)]
ExpandableSegments: TypeAlias = Annotated[bool, _option("The allocator may grow its segments.", _DEVICE)]
WorkspaceBytes: TypeAlias = Annotated[
    int, _option("cuBLAS workspaces, where no GPU is named that has its own.", _DEVICE)
]
ContextBytes: TypeAlias = Annotated[int, _option("What CUDA takes before the first tensor.", _DEVICE)]


def regime_of(values: Mapping[str, object]) -> TrainingRegime:
    """Return the settings among a command's arguments as a checked `TrainingRegime`.

    Args:
        values: A command's arguments; those that are no setting of the regime are left out.

    Raises:
        ConfigError: If a value is invalid, in the words of the command line.
    """
    from pydantic import ValidationError

    from vlmpack.memory.regime import TrainingRegime

    known = {name: value for name, value in values.items() if name in TrainingRegime.model_fields}
    if known.get("autocast") == "none":
        known["autocast"] = None
    names = str(known.get("frozen") or "").split(",")
    known["frozen"] = tuple(name.strip() for name in names if name.strip())
    try:
        return TrainingRegime(**known)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_fault(fault["loc"], fault["msg"], fault["input"]) for fault in error.errors())
        ) from error


def _fault(place: tuple[int | str, ...], message: str, got: object) -> str:
    if not place:  # settings that contradict each other
        return message.removeprefix("Value error, ")
    what = message.removeprefix("Input should ")
    return f"--{str(place[0]).replace('_', '-')} must {what}, got {got!r}"
