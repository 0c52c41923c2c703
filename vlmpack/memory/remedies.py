"""What to do about a batch that does not fit: each remedy, what it saves, and how far it reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from vlmpack.memory.estimate import estimate
from vlmpack.memory.fit_rule import DEFAULT_MARGIN, FitRule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmpack.geometry import Tiling
    from vlmpack.memory.gpus import Gpu
    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.regime import TrainingRegime

SUB_BATCHES: Final = (512, 256, 128, 64, 32, 16, 8)
"""Tiles that the vision encoder may take at a time, from fast to frugal."""
LEAST_SAVING: Final = 0.001
"""Share of the peak that a change has to save to be worth a line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """One change and what it buys."""

    name: str
    """What to do."""
    cost: str
    """What it costs."""
    peak_bytes: int
    """The peak with it."""
    saved_bytes: int
    """What it takes off the peak."""
    fits: bool
    """Whether the batch fits with it alone."""
    max_tiles: int
    """Tiles of the batch with it, as far as tokens allow; 0 where not even text fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    name: str
    cost: str
    settings: dict[str, Any]
    rows: int
    tiles: float


class _Setting(Protocol):
    """Makes a change of the regime."""

    def __call__(self, name: str, cost: str, **settings: Any) -> _Change: ...


def remedies(
    model: ModelShape,
    regime: TrainingRegime,
    gpu: Gpu | str | int,
    *,
    rows: int,
    tokens_per_row: int,
    tiles: float,
    tiling: Tiling | None = None,
    images: int | None = None,
    margin: float = DEFAULT_MARGIN,
) -> tuple[Remedy, ...]:
    """Return what can be done about a batch, the largest saving first; useless changes are left out.

    Args:
        model: The model's sizes.
        regime: How it is trained now.
        gpu: A name out of `GPUS`, or the device's bytes.
        rows: Packs of the batch.
        tokens_per_row: Positions of each.
        tiles: Tiles of the batch.
        tiling: The rule by which images become tiles, to count a smaller largest side.
        images: Images of the batch, to count one fewer a pack.
        margin: Share of the peak that is left free.
    """
    rule = FitRule.of(model, regime, gpu, tokens_per_row=tokens_per_row, margin=margin)
    now = estimate(model, rule.regime, rows=rows, tokens_per_row=tokens_per_row, tiles=tiles).peak_bytes
    found: list[Remedy] = []
    piecewise = now
    for change in _changes(model, rule.regime, rows, tiles, tiling, images):
        changed = rule.with_regime(rule.regime.model_copy(update=change.settings))
        step = estimate(
            model, changed.regime, rows=change.rows, tokens_per_row=tokens_per_row, tiles=change.tiles
        )
        if step.peak_bytes > (1 - LEAST_SAVING) * now:
            continue
        if "vision_sub_batch" in change.settings:  # smaller pieces only where they help further
            if step.peak_bytes > (1 - LEAST_SAVING) * piecewise:
                continue
            piecewise = step.peak_bytes
        text = changed.verdict(change.rows, 0)
        found.append(
            Remedy(
                name=change.name,
                cost=change.cost,
                peak_bytes=step.peak_bytes,
                saved_bytes=now - step.peak_bytes,
                fits=changed.verdict(change.rows, change.tiles).fits,
                max_tiles=changed.most_tiles(change.rows).tiles if text.fits else 0,
            )
        )
    return tuple(sorted(found, key=lambda remedy: -remedy.saved_bytes))


def _changes(
    model: ModelShape,
    regime: TrainingRegime,
    rows: int,
    tiles: float,
    tiling: Tiling | None,
    images: int | None,
) -> Iterator[_Change]:
    def setting(name: str, cost: str, **settings: Any) -> _Change:
        return _Change(name=name, cost=cost, settings=settings, rows=rows, tiles=tiles)

    if model.vision is not None and "vision" not in regime.frozen:
        yield from _vision_changes(regime, tiles, setting)
    yield from _language_changes(regime, setting)
    yield from _type_changes(regime, setting)
    if rows > 1:
        fewer = tiles * (rows - 1) / rows
        yield _Change(name="one pack less", cost="smaller steps", settings={}, rows=rows - 1, tiles=fewer)
    yield from _load_changes(rows, tiles, tiling, images)


def _language_changes(regime: TrainingRegime, setting: _Setting) -> Iterator[_Change]:
    if not regime.checkpoint_language:
        yield setting("checkpoint the language model", "a third more time in it", checkpoint_language=True)
    if regime.cross_entropy == "full":
        yield setting("loss in chunks", "the logits are computed twice", cross_entropy="chunked")
        yield setting("fused loss", "needs a kernel for it", cross_entropy="fused")
    if regime.attention == "eager":
        yield setting("SDPA instead of eager attention", "nothing", attention="sdpa")
    if regime.mask != "none" and regime.attention in {"sdpa", "efficient", "math"}:
        yield setting("flash attention on sequence lengths", "needs the flash package", attention="flash")
    if regime.lora_rank is None and "language" not in regime.frozen:
        yield setting("adapters of rank 16 in the language model", "trains less", lora_rank=16)


def _type_changes(regime: TrainingRegime, setting: _Setting) -> Iterator[_Change]:
    if regime.optimizer == "adamw_foreach":
        yield setting("fused AdamW", "nothing", optimizer="adamw_fused")
    if regime.optimizer != "adamw_8bit" and regime.optimizer.startswith("adamw"):
        yield setting("8-bit AdamW", "needs bitsandbytes; states lose precision", optimizer="adamw_8bit")
    if regime.weights == "fp32":
        yield setting("bfloat16 weights", "updates lose precision", weights="bf16", autocast=None)


def _vision_changes(regime: TrainingRegime, tiles: float, setting: _Setting) -> Iterator[_Change]:
    if not regime.checkpoint_vision:
        yield setting("checkpoint the vision encoder", "a third more time in it", checkpoint_vision=True)
    for size in SUB_BATCHES:
        if size < tiles and size < (regime.vision_sub_batch or tiles):
            yield setting(
                f"vision encoder on {size} tiles at a time",
                "a third more time in it, smaller kernels",
                vision_sub_batch=size,
            )
    frozen = (*regime.frozen, "vision")
    yield setting("freeze the vision encoder", "trains less", frozen=frozen)


def _load_changes(rows: int, tiles: float, tiling: Tiling | None, images: int | None) -> Iterator[_Change]:
    smaller = tiling.smaller() if tiling is not None else None
    if tiling is not None and smaller is not None and tiles:
        share = most_tiles_of_image(smaller) / most_tiles_of_image(tiling)
        yield _Change(
            name=f"largest side {smaller.max_side} instead of {tiling.max_side}",
            cost="coarser pictures",
            settings={},
            rows=rows,
            tiles=int(tiles * share),
        )
    if images and images > rows and tiles:
        yield _Change(
            name="one image less a pack",
            cost="less filled packs",
            settings={},
            rows=rows,
            tiles=int(tiles * (images - rows) / images),
        )


def most_tiles_of_image(tiling: Tiling) -> int:
    """Return the tiles of an image at the largest side, the global tile included: 17 for 2048 and 512."""
    grid = tiling.max_grid_side**2
    return grid + (1 if tiling.global_tile and grid > 1 else 0)
