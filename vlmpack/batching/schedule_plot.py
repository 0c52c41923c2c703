"""A picture of a batch-size schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from vlmpack.batching.schedule import BatchSizeScheduler

_POINTS = 1000
_BLUE, _ORANGE, _GREY = "#1f77b4", "#d95f02", "#666666"


def plot_schedule(scheduler: BatchSizeScheduler, until: int, path: str | Path | None) -> Figure:
    """Draw the batch size over progress.

    Args:
        scheduler: Drawn from 0; its state is left alone.
        until: The end, in the schedule's unit.
        path: Where to save the picture, or None.

    Raises:
        ConfigError: If `until` is not positive or matplotlib is missing.
    """
    if until < 1:
        raise ConfigError(f"a schedule is drawn up to 1 {scheduler.config.unit} at least, got {until}")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("pictures need matplotlib: pip install 'vlmpack[plot]'") from error
    stride = max(until // _POINTS, 1)
    progress = list(range(0, until, stride))
    sizes = [scheduler.get_batch_size(at) for at in progress]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.step([*progress, until], [*sizes, sizes[-1]], where="post", color=_BLUE, linewidth=2)
    axes.set(xlabel=scheduler.config.unit, ylabel="samples a step", xlim=(0, until), ylim=(0, None))
    axes.set_title(f"{scheduler.config.type} schedule: {sizes[0]:,} to {sizes[-1]:,}", loc="left")
    for at, before, after in zip(progress[1:], sizes, sizes[1:], strict=False):
        if after != before and len(set(sizes)) <= 8:
            axes.annotate(f"{after:,}", (at, after), (4, -11), textcoords="offset points", color=_GREY)
    if scheduler.max_rows is not None:
        rows = [scheduler.micro_batches(size).micro_batch_size for size in sizes]
        axes.step([*progress, until], [*rows, rows[-1]], where="post", color=_ORANGE, label="at once")
        axes.axhline(scheduler.max_rows, color=_ORANGE, linestyle=":", label="what the device takes")
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
