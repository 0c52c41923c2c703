"""Draw a step's memory against its tiles, with the GPU's line. Needs matplotlib (`vlmpack[plot]`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vlmpack.errors import ConfigError
from vlmpack.memory.estimate import estimate
from vlmpack.memory.fit_rule import DEFAULT_MARGIN, FitRule, token_bound

if TYPE_CHECKING:
    from pathlib import Path

    from vlmpack.memory.gpus import Gpu
    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.regime import TrainingRegime

PARTS: Final = {
    "weights, gradients, optimizer": ("weights", "gradients", "optimizer", "workspace", "casts"),
    "vision encoder": ("vision", "connector", "inputs"),
    "language model": ("language",),
    "logits and loss": ("logits",),
    "transient": ("transient",),
}
"""The areas from the bottom to the top, and the components in them."""
COLOURS: Final = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#b8b8b8")


def draw_tiles(
    path: Path,
    model: ModelShape,
    regime: TrainingRegime,
    gpu: Gpu | str | int,
    *,
    rows: int,
    tokens_per_row: int,
    margin: float = DEFAULT_MARGIN,
    points: int = 64,
) -> None:
    """Write a picture of the peak's components against the tiles of a batch.

    Args:
        path: The picture's file; its suffix says the format.
        model: The model's sizes.
        regime: How it is trained.
        gpu: A name out of `GPUS`, or the device's bytes.
        rows: Packs of the batch.
        tokens_per_row: Positions of each.
        margin: Share of the peak that is left free, for the limit's line.
        points: Estimates along the axis.

    Raises:
        ConfigError: If matplotlib is not installed, or the model has no vision encoder.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'vlmpack[plot]'") from error
    if model.vision is None:
        raise ConfigError(f"{model.name} has no vision encoder, so there are no tiles to draw")
    rule = FitRule.of(model, regime, gpu, tokens_per_row=tokens_per_row, margin=margin)
    most = max(1, token_bound(model, rows=rows, tokens_per_row=tokens_per_row))
    tiles = sorted({most * point // points for point in range(points + 1)})
    steps = [estimate(model, rule.regime, rows=rows, tokens_per_row=tokens_per_row, tiles=n) for n in tiles]
    areas = [
        [sum(step.peak.parts[name] for name in names) / 2**30 for step in steps] for names in PARTS.values()
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(tiles, areas, labels=list(PARTS), colors=COLOURS)
    axes.axhline(rule.gpu.total_bytes / 2**30, color="black", linewidth=1)
    axes.annotate(rule.gpu.name, (most, rule.gpu.total_bytes / 2**30), ha="right", va="bottom")
    if rule.verdict(rows, 0).fits:
        limit = rule.most_tiles(rows)
        if limit.bound == "memory":
            axes.axvline(limit.tiles, color="black", linewidth=1, linestyle="--")
            axes.annotate(f" {limit.tiles} tiles", (limit.tiles, 0), va="bottom")
    axes.set_xlabel(f"tiles in a batch of {rows} x {tokens_per_row:,} tokens ({model.name})")
    axes.set_ylabel("GiB at the peak")
    axes.set_xlim(0, most)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", framealpha=1, edgecolor="none")
    figure.savefig(path, dpi=150)
