"""Curves: a run's loss, memory, throughput and splits over its steps, and how its tasks compare.

A point of a long run is the mean of neighbouring steps, with a band from their least to their most. Needs
matplotlib, which comes with the extra `plot` and is imported when the first picture is drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from vlmpack.errors import ConfigError
from vlmpack.memory.linear_cost import GB
from vlmpack.packing.plot import FAINT, INK, figure_class

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from vlmpack.batching.metrics import BatchMetrics
    from vlmpack.batching.monitor import DynamicBatchingMonitor

HUES: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")
"""Okabe and Ito's colours, which eyes that see no red and green tell apart."""
_STYLES: Final = ("-", "--", "-.", ":")
_BAD: Final = "#c0392b"
_GRID: Final = "#e8e8e8"
_POINTS: Final = 300
"""More points than this are drawn as means of neighbours."""
_SIZE: Final = (5.6, 2.9)
"""Inches of one panel."""

Panel: TypeAlias = "tuple[str, Callable[[Axes, DynamicBatchingMonitor], None]]"
"""A title and what draws it."""


def training_curves(monitor: DynamicBatchingMonitor) -> Figure:
    """Draw loss, memory, throughput and splits over the steps, two panels a row.

    Args:
        monitor: With at least one step.

    Raises:
        ConfigError: If there is no step, or matplotlib is not installed.
    """
    return _grid(training_panels(monitor), monitor)


def task_comparison(monitor: DynamicBatchingMonitor) -> Figure:
    """Draw each task's loss, share of samples, weight and gradient norm, as far as they were recorded.

    Args:
        monitor: With at least one step that names tasks.

    Raises:
        ConfigError: If no step names a task, or matplotlib is not installed.
    """
    panels = task_panels(monitor)
    if not panels:
        raise ConfigError("no step names a task, so there is nothing to compare")
    return _grid(panels, monitor)


def training_panels(monitor: DynamicBatchingMonitor) -> list[Panel]:
    """Return the panels of `training_curves` for which there are figures."""
    batches = monitor.batches
    panels: list[Panel] = [("Loss", _draw_loss)]
    if any(each.peak_bytes or each.allocated_bytes for each in batches):
        panels.append(("Memory, GB", _draw_memory))
    if any(each.samples_per_s for each in batches):
        panels.append(("Throughput, samples a second", _draw_throughput))
    if any(each.num_micro_batches > 1 or each.num_ooms for each in batches):
        panels.append(("Micro-batches a step", _draw_splits))
    if any(each.num_samples for each in batches):
        panels.append(("Samples a step", _draw_samples))
    if any(each.learning_rate is not None for each in batches):
        panels.append(("Learning rate", _draw_rates))
    if any(each.grad_norm is not None for each in batches):
        panels.append(("Gradient norm", _draw_norm))
    return panels


def task_panels(monitor: DynamicBatchingMonitor) -> list[Panel]:
    """Return the panels of `task_comparison` for which there are figures."""
    batches = monitor.batches
    panels: list[Panel] = []
    if any(each.task_losses for each in batches):
        panels.append(("Loss of each task", lambda axes, run: _draw_tasks(axes, run, "task_losses")))
    if any(each.task_types for each in batches):
        panels.append(("Samples of each task", _draw_shares))
    if any(each.task_weights for each in batches):
        panels.append(("Loss weight of each task", lambda axes, run: _draw_tasks(axes, run, "task_weights")))
    if any(each.task_grad_norms for each in batches):
        panels.append((
            "Gradient norm of each task",
            lambda axes, run: _draw_tasks(axes, run, "task_grad_norms"),
        ))
    return panels


def draw_panel(panel: Panel, monitor: DynamicBatchingMonitor) -> Figure:
    """Return one panel as a figure, without its title.

    Args:
        panel: From `training_panels` or `task_panels`.
        monitor: Of which it is.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    figure = figure_class()(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    _frame(axes, monitor)
    panel[1](axes, monitor)
    return figure


def colours(tasks: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return a colour and a line style for each task, the same in every panel."""
    return {task: (HUES[n % len(HUES)], _STYLES[n // len(HUES) % 4]) for n, task in enumerate(tasks)}


def _grid(panels: Sequence[Panel], monitor: DynamicBatchingMonitor) -> Figure:
    if not monitor.batches:
        raise ConfigError("no step was recorded, so there is nothing to draw")
    rows = -(-len(panels) // 2)
    figure = figure_class()(figsize=(2 * _SIZE[0], rows * _SIZE[1] + 0.4), layout="constrained")
    figure.suptitle(monitor.title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    for number, (title, draw) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, number + 1)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        _frame(axes, monitor)
        draw(axes, monitor)
    return figure


def _frame(axes: Axes, monitor: DynamicBatchingMonitor) -> None:
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color("#b0b0b0")
    axes.set_xlabel("step", fontsize=9, color=FAINT, loc="right")
    _whole_numbers(axes.xaxis)
    first, last = monitor.batches[0].step, monitor.batches[-1].step
    margin = max(0.5, 0.01 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    done = 0
    for epoch in monitor.epochs[:-1] if len(monitor.epochs) <= 20 else ():
        done += epoch.num_steps
        axes.axvline(
            monitor.batches[done - 1].step + 0.5, color="#c8c8c8", linewidth=1, linestyle=(0, (2, 2))
        )


def _whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _line(
    axes: Axes,
    points: Iterable[tuple[int, float | None]],
    colour: str,
    *,
    label: str | None = None,
    style: str = "-",
    steps: bool = False,
) -> None:
    """Draw one line; points without a finite value are left out, many points become means with a band."""
    kept = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    if not kept:
        return
    x, y = np.array(kept, dtype=np.float64).T
    if len(kept) > _POINTS:
        parts = np.array_split(np.arange(len(kept)), _POINTS)
        low, high = (np.array([reduce(y[part]) for part in parts]) for reduce in (np.min, np.max))
        x, y = (np.array([values[part].mean() for part in parts]) for values in (x, y))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    marker = "o" if len(x) <= 3 else None
    axes.plot(
        x,
        y,
        style,
        color=colour,
        linewidth=1.6,
        label=label,
        marker=marker,
        markersize=4,
        drawstyle="steps-mid" if steps else "default",
    )


def _legend(axes: Axes) -> None:
    axes.legend(
        framealpha=0.8, edgecolor="none", fontsize=9, labelcolor=INK, ncols=2, loc="best", handlelength=1.6
    )


def _marks(axes: Axes, steps: Sequence[int], label: str) -> None:
    """Mark steps on the lower edge."""
    if steps:
        axes.plot(
            steps,
            [0.02] * len(steps),
            "^",
            color=_BAD,
            markersize=5,
            transform=axes.get_xaxis_transform(),
            label=f"{label}: {len(steps)}",
            clip_on=False,
        )


def _draw_loss(axes: Axes, monitor: DynamicBatchingMonitor) -> None:
    _line(axes, ((each.step, each.loss) for each in monitor.batches), HUES[0], label="training")
    done, evaluated = 0, []
    for epoch in monitor.epochs:
        done += epoch.num_steps
        if epoch.eval_loss is not None:
            evaluated.append((monitor.batches[done - 1].step, epoch.eval_loss))
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "D", color=HUES[1], markersize=5, label="evaluation")
    _marks(axes, [each.step for each in monitor.batches if not math.isfinite(each.loss)], "not finite")
    _legend(axes)


def _draw_memory(axes: Axes, monitor: DynamicBatchingMonitor) -> None:
    for name, label, hue in (("peak_bytes", "peak", 0), ("allocated_bytes", "after the step", 5)):
        points = [(each.step, getattr(each, name) / GB) for each in monitor.batches]
        if any(value for _, value in points):
            _line(axes, points, HUES[hue], label=label)
    if monitor.limit_bytes:
        axes.axhline(monitor.limit_bytes / GB, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label="limit")
    axes.set_ylim(bottom=0)
    _marks(axes, [each.step for each in monitor.batches if each.num_ooms], "steps recovered")
    _legend(axes)


def _draw_throughput(axes: Axes, monitor: DynamicBatchingMonitor) -> None:
    _line(axes, ((each.step, each.samples_per_s or None) for each in monitor.batches), HUES[2])
    axes.set_ylim(bottom=0)


def _draw_splits(axes: Axes, monitor: DynamicBatchingMonitor) -> None:
    points = ((each.step, each.num_micro_batches) for each in monitor.batches)
    _line(axes, points, HUES[3], steps=True, label="parts of a step")
    axes.set_ylim(bottom=0)
    _whole_numbers(axes.yaxis)
    _marks(axes, [each.step for each in monitor.batches if each.num_ooms], "ran out of memory")
    _legend(axes)


def _draw_samples(axes: Axes, monitor: DynamicBatchingMonitor) -> None:
    _line(axes, ((each.step, each.num_samples) for each in monitor.batches), HUES[4], steps=True)
    axes.set_ylim(bottom=0)


def _draw_rates(axes: Axes, monitor: DynamicBatchingMonitor) -> None:
    _line(axes, ((each.step, each.learning_rate) for each in monitor.batches), HUES[6], label="scheduled")
    if any(each.lr_scale is not None for each in monitor.batches):
        _line(
            axes,
            ((each.step, _acting_rate(each)) for each in monitor.batches),
            HUES[0],
            label="with the step's size",
        )
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _legend(axes)


def _acting_rate(each: BatchMetrics) -> float | None:
    if each.learning_rate is None:
        return None
    return each.learning_rate * (1.0 if each.lr_scale is None else each.lr_scale)


def _draw_norm(axes: Axes, monitor: DynamicBatchingMonitor) -> None:
    _line(axes, ((each.step, each.grad_norm) for each in monitor.batches), HUES[1])
    axes.set_ylim(bottom=0)


def _draw_tasks(axes: Axes, monitor: DynamicBatchingMonitor, name: str) -> None:
    for task, (hue, style) in colours(monitor.task_types).items():
        points = ((each.step, getattr(each, name).get(task)) for each in monitor.batches)
        _line(axes, points, hue, label=task, style=style)
    _legend(axes)


def _draw_shares(axes: Axes, monitor: DynamicBatchingMonitor) -> None:
    """Draw the tasks' shares of the samples as a stack over the steps."""
    tasks = [
        task for task in monitor.task_types if any(each.task_types.get(task) for each in monitor.batches)
    ]
    steps = np.array([each.step for each in monitor.batches], dtype=np.float64)
    counts = np.array(
        [[each.task_types.get(task, 0) for each in monitor.batches] for task in tasks], dtype=float
    )
    if len(steps) > _POINTS:
        parts = np.array_split(np.arange(len(steps)), _POINTS)
        steps = np.array([steps[part].mean() for part in parts])
        counts = np.array([[row[part].sum() for part in parts] for row in counts])
    shares = 100 * counts / np.maximum(counts.sum(axis=0), 1)
    hues = colours(monitor.task_types)
    if len(steps) == 1:
        steps, shares = np.array([steps[0] - 0.4, steps[0] + 0.4]), np.repeat(shares, 2, axis=1)
    axes.stackplot(
        steps,
        shares,
        colors=[hues[task][0] for task in tasks],
        labels=tasks,
        alpha=0.8,
        step="mid",
        linewidth=0,
    )
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter("{x:.0f}%")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        labels,
        frameon=True,
        framealpha=0.85,
        edgecolor="none",
        fontsize=9,
        labelcolor=INK,
        ncols=4,
        loc="upper left",
    )
