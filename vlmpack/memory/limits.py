"""The inverse of the estimate: the largest batch that a GPU takes, and which batches trade off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmpack.memory.fit_rule import (
    DEFAULT_MARGIN,
    MAX_ROWS,
    FitRule,
    FrontPoint,
    TileLimit,
    Verdict,
    required_bytes,
    token_bound,
)

if TYPE_CHECKING:
    from vlmpack.budget import BatchBudget, PackBudget
    from vlmpack.memory.gpus import Gpu
    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.regime import TrainingRegime

__all__ = [
    "DEFAULT_MARGIN",
    "FitRule",
    "FrontPoint",
    "TileLimit",
    "Verdict",
    "batch_budget_for_gpu",
    "check",
    "max_tiles",
    "pack_budget_for_gpu",
    "pareto_front",
    "required_bytes",
    "token_bound",
]


def check(
    model: ModelShape,
    regime: TrainingRegime,
    gpu: Gpu | str | int,
    *,
    rows: int,
    tokens_per_row: int,
    tiles: float = 0,
    margin: float = DEFAULT_MARGIN,
    replay: bool = False,
) -> Verdict:
    """Return whether a batch fits, and by how much not.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        gpu: A name out of `GPUS`, or the device's bytes.
        rows: Packs of the batch.
        tokens_per_row: Positions of each.
        tiles: Tiles of the batch.
        margin: Share of the peak that is left free.
        replay: Ask a replay of the allocator too, which takes about a second the first time.
    """
    rule = FitRule.of(model, regime, gpu, tokens_per_row=tokens_per_row, margin=margin, replay=replay)
    return rule.verdict(rows, tiles)


def max_tiles(
    model: ModelShape,
    regime: TrainingRegime,
    gpu: Gpu | str | int,
    *,
    rows: int,
    tokens_per_row: int,
    margin: float = DEFAULT_MARGIN,
    position_tokens: int | None = None,
    replay: bool = False,
) -> TileLimit:
    """Return the most tiles that a batch of `rows` packs may hold on this GPU.

    A batch that does not fit even without a picture raises ConfigError, which says what is missing.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        gpu: A name out of `GPUS`, or the device's bytes.
        rows: Packs of the batch.
        tokens_per_row: Positions of each.
        margin: Share of the peak that is left free.
        position_tokens: Tokens before each tile that say where it lies; None: the model's own.
        replay: Ask a replay of the allocator too, which takes about a second the first time.
    """
    rule = FitRule.of(
        model,
        regime,
        gpu,
        tokens_per_row=tokens_per_row,
        margin=margin,
        position_tokens=position_tokens,
        replay=replay,
    )
    return rule.most_tiles(rows)


def pareto_front(
    model: ModelShape,
    regime: TrainingRegime,
    gpu: Gpu | str | int,
    *,
    tokens_per_row: int,
    margin: float = DEFAULT_MARGIN,
    position_tokens: int | None = None,
    max_rows: int = MAX_ROWS,
) -> tuple[FrontPoint, ...]:
    """Return the choices of (packs, tiles a pack) of which none is beaten in both.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        gpu: A name out of `GPUS`, or the device's bytes.
        tokens_per_row: Positions of each pack.
        margin: Share of the peak that is left free.
        position_tokens: Tokens before each tile that say where it lies; None: the model's own.
        max_rows: Stop at this many packs.
    """
    rule = FitRule.of(
        model,
        regime,
        gpu,
        tokens_per_row=tokens_per_row,
        margin=margin,
        position_tokens=position_tokens,
    )
    return rule.front(max_rows)


def batch_budget_for_gpu(
    model: ModelShape,
    regime: TrainingRegime,
    gpu: Gpu | str | int,
    *,
    tokens_per_row: int,
    rows: int | None = None,
    margin: float = DEFAULT_MARGIN,
    position_tokens: int | None = None,
    replay: bool = False,
) -> BatchBudget:
    """Return the largest batch that fits: packs, patches and tokens of one step on one device.

    Without `rows` it is the largest number of packs that may all be full of pictures; where not even one
    may, one pack with as many tiles as fit.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        gpu: A name out of `GPUS`, or the device's bytes.
        tokens_per_row: Positions of each pack.
        rows: Packs of the batch.
        margin: Share of the peak that is left free.
        position_tokens: Tokens before each tile that say where it lies; None: the model's own.
        replay: Ask a replay of the allocator too, which takes about a second the first time.
    """
    rule = FitRule.of(
        model,
        regime,
        gpu,
        tokens_per_row=tokens_per_row,
        margin=margin,
        position_tokens=position_tokens,
        replay=replay,
    )
    return rule.batch_budget(rows)


def pack_budget_for_gpu(
    model: ModelShape,
    regime: TrainingRegime,
    gpu: Gpu | str | int,
    *,
    tokens_per_row: int,
    rows: int = 1,
    max_images: int | None = None,
    margin: float = DEFAULT_MARGIN,
    position_tokens: int | None = None,
    replay: bool = False,
) -> PackBudget:
    """Return what each of `rows` packs may hold so that no batch of them can be too large.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        gpu: A name out of `GPUS`, or the device's bytes.
        tokens_per_row: Positions of each pack.
        rows: Packs of the batch.
        max_images: Images of a pack, for the caller's own reasons.
        margin: Share of the peak that is left free.
        position_tokens: Tokens before each tile that say where it lies; None: the model's own.
        replay: Ask a replay of the allocator too, which takes about a second the first time.
    """
    rule = FitRule.of(
        model,
        regime,
        gpu,
        tokens_per_row=tokens_per_row,
        margin=margin,
        position_tokens=position_tokens,
        replay=replay,
    )
    return rule.pack_budget(rows, max_images)
