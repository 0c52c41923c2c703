"""The worst batch that limits allow, and the reference document's arithmetic on it, kept and corrected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling
from vlmpack.memory.estimate import estimate
from vlmpack.memory.fit_rule import MAX_ROWS, FitRule
from vlmpack.memory.presets import PRESETS, SIGLIP_B16_512
from vlmpack.memory.regime import TrainingRegime
from vlmpack.memory.remedies import most_tiles_of_image

if TYPE_CHECKING:
    from vlmpack.memory.model_shape import ModelShape, VisionShape

REFERENCE_TILING: Final = Tiling(resize_to_max_side=True)
"""The reference pipeline's: tiles of 512, largest side 2048, every image scaled to it."""
REFERENCE_REGIME: Final = TrainingRegime(mask="padding", holds_logits=True)
"""The reference training loop: float32 weights, bfloat16 autocast, SDPA under a padding mask, AdamW."""


def worst_case_tiles_nominal(
    *, rows: int = 4, max_images: int = 18, tiling: Tiling = REFERENCE_TILING
) -> int:
    """Return rows * images * tiles of the largest image: 1,224 by default, which no row could hold.

    Args:
        rows: Packs of the batch.
        max_images: Images of a pack.
        tiling: The rule by which images become tiles.

    Raises:
        ConfigError: If a number is not positive.
    """
    _check(rows=rows, max_images=max_images)
    return rows * max_images * most_tiles_of_image(tiling)


def worst_case_tiles_feasible(
    *,
    rows: int = 4,
    max_tokens: int = 4096,
    max_images: int | None = 18,
    max_tiles_per_row: int | None = None,
    tiling: Tiling = REFERENCE_TILING,
) -> int:
    """Return the most tiles that a batch can really hold: 252 by default.

    A tile costs its image tokens and a position token, 65 in the reference model, so 4,096 positions hold
    63 tiles, whatever the images' sizes.

    Args:
        rows: Packs of the batch.
        max_tokens: Positions of a pack.
        max_images: Images of a pack; None: no limit.
        max_tiles_per_row: Tiles of a pack; None: no limit.
        tiling: The rule by which images become tiles.

    Raises:
        ConfigError: If a number is not positive.
    """
    _check(rows=rows, max_tokens=max_tokens)
    limits = [max_tokens // (tiling.tokens_per_tile + tiling.position_tokens)]
    if max_images is not None:
        limits.append(max_images * most_tiles_of_image(tiling))
    if max_tiles_per_row is not None:
        limits.append(max_tiles_per_row)
    return rows * min(limits)


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a positive integer, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class NominalVisionMemory:
    """The reference document's count of a vision encoder: one bfloat16 copy of each array, in bytes."""

    tiles: int
    """Tiles of the batch."""
    tokens: int
    """Patches of the batch."""
    attention: int
    """Attention matrices of one layer: tiles * heads * patches^2 * 2. Only eager attention keeps them."""
    qkv: int
    """Queries, keys and values of one layer: tokens * 3 * hidden * 2."""
    ffn: int
    """The MLP's inner activations of one layer, once: tokens * intermediate * 2. Two are kept."""
    layers: int
    """Layers of the encoder."""

    @property
    def layer(self) -> int:
        """Bytes of one layer."""
        return self.attention + self.qkv + self.ffn

    @property
    def total(self) -> int:
        """Bytes of all layers."""
        return self.layer * self.layers


def vit_memory_nominal(tiles: int = 1224, vision: VisionShape = SIGLIP_B16_512) -> NominalVisionMemory:
    """Return the reference document's figures: ~29, ~5 and ~7 GB, ~41 GB a layer, ~494 GB in all.

    Its GB are GiB: 28.69, 5.38, 7.17, 41.24 and 494.86. `estimate` says what a step really needs.

    Args:
        tiles: Tiles of the batch.
        vision: The vision encoder.
    """
    patches = vision.patches_per_tile
    return NominalVisionMemory(
        tiles=tiles,
        tokens=tiles * patches,
        attention=tiles * vision.heads * patches**2 * 2,
        qkv=tiles * patches * 3 * vision.hidden * 2,
        ffn=tiles * patches * vision.intermediate * 2,
        layers=vision.layers,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleLine:
    """One figure of the reference document beside what it should be."""

    claim: str
    """The figure, as written."""
    counted: str
    """What it counts."""
    exact: str
    """The same, computed."""
    verdict: str
    """What is right and wrong with it, and what the step needs."""


def worked_example(model: ModelShape | None = None) -> tuple[ExampleLine, ...]:
    """Return the reference document's worked example on nanoVLM-460M, with its errata.

    Args:
        model: Another model of the same kind; None: nanoVLM-460M.
    """
    model = model or PRESETS["nanovlm-460m"]
    return (*_count_lines(model), *_step_lines(model), _recommended_line(model))


def _count_lines(model: ModelShape) -> tuple[ExampleLine, ...]:
    """The figures that are right as arithmetic."""
    nominal, feasible = worst_case_tiles_nominal(), worst_case_tiles_feasible()
    vit = vit_memory_nominal(nominal, model.vision or SIGLIP_B16_512)
    static = 4 * model.num_parameters
    return (
        ExampleLine(
            claim="1,224 tiles",
            counted="4 packs * 18 images * 17 tiles",
            exact=f"{nominal:,}",
            verdict=f"cannot occur: a tile costs 65 tokens, so 4 packs of 4,096 hold {feasible}",
        ),
        ExampleLine(
            claim="~41 GB a layer",
            counted="attention ~29, QKV ~5, FFN ~7: one bfloat16 copy of each, in GiB",
            exact=f"{_gib(vit.attention)} + {_gib(vit.qkv)} + {_gib(vit.ffn)} = {_gib(vit.layer)} GiB",
            verdict="SDPA keeps no attention matrix, eager 6 bytes an entry; two FFN copies are kept",
        ),
        ExampleLine(
            claim="6.7 GB static",
            counted="float32 weights 1.7, gradients 1.7, AdamW 3.4",
            exact=f"{_gib(static)} + {_gib(static)} + {_gib(2 * static)} = {_gib(4 * static)} GiB",
            verdict="1.7 + 1.7 + 3.4 is 6.8; bfloat16 casts, AdamW's temporary and workspaces come on top",
        ),
    )


def _step_lines(model: ModelShape) -> tuple[ExampleLine, ...]:
    """The figures that are about a whole step, and wrong for it."""

    def peak(rows: int, tiles: int, **changes: object) -> str:
        regime = REFERENCE_REGIME.model_copy(update=changes)
        return _gib(estimate(model, regime, rows=rows, tokens_per_row=4096, tiles=tiles).peak_bytes)

    nominal, feasible = worst_case_tiles_nominal(), worst_case_tiles_feasible()
    vision = model.vision or SIGLIP_B16_512
    return (
        ExampleLine(
            claim="~494 GB",
            counted="12 layers",
            exact=f"{_gib(vit_memory_nominal(nominal, vision).total)} GiB",
            verdict=(
                f"the whole step needs {peak(4, nominal)} GiB with SDPA, "
                f"{peak(4, nominal, attention='eager')} eager, "
                f"{peak(4, nominal, checkpoint_vision=True)} with the encoder checkpointed; "
                f"the {feasible} tiles that fit the rows need {peak(4, feasible)}"
            ),
        ),
        ExampleLine(
            claim="408 tiles: ~12 GB",
            counted="4 packs * 6 images * 17 tiles",
            exact=f"{_gib(vit_memory_nominal(408, vision).layer)} GiB a layer by the same count",
            verdict=f"about one layer's share: the step needs {peak(4, 408)} GiB",
        ),
        ExampleLine(
            claim="35-45 GB at batch 2, 8 images, 1536 pixels",
            counted="2 packs * 8 images * 10 tiles = 160 tiles",
            exact=f"{peak(2, 160)} GiB",
            verdict=(
                f"the rows hold 126 tiles: {peak(2, 126)} GiB, or "
                f"{peak(2, 160, checkpoint_vision=True)} for 160 with the encoder checkpointed"
            ),
        ),
    )


def _recommended_line(model: ModelShape) -> ExampleLine:
    """The document's advice for 80 GB, derived again."""
    checkpointed = REFERENCE_REGIME.model_copy(update={"checkpoint_vision": True})

    def full_packs(regime: TrainingRegime) -> str:
        rule = FitRule.of(model, regime, "A100-80", tokens_per_row=4096)
        rows = rule.batch_budget().max_packs or 1
        point = next(p for p in rule.front(MAX_ROWS) if p.rows == rows)
        return f"{rows} packs of {point.tiles_per_row} tiles ({_gib(point.required_bytes)} GiB with reserves)"

    return ExampleLine(
        claim="80 GB: batch 2, 8 images a pack, 3 an example, 1536 pixels",
        counted="the largest batch of which every pack may be full of tiles, whatever the images",
        exact=full_packs(REFERENCE_REGIME),
        verdict=f"no limit on images is needed; with the encoder checkpointed {full_packs(checkpointed)}",
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
