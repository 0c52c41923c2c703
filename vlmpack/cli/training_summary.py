"""Training summary: a run's progress while it goes, and what it did and how its tasks compare as tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from vlmpack.batching.report_html import edge_losses
from vlmpack.memory.linear_cost import GB

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from vlmpack.batching.demo import DemoResult
    from vlmpack.batching.monitor import DynamicBatchingMonitor


class ProgressOfSteps(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Moves a progress bar by steps, with the latest loss beside it.

    Args:
        progress: That shows the bar.
        bar: The bar.
    """

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        self._progress, self._bar = progress, bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Tell the bar how long the run is."""
        self._progress.update(self._bar, total=state.max_steps, description="training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Move it."""
        self._progress.update(self._bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the loss."""
        if logs and "loss" in logs:
            self._progress.update(self._bar, description=f"training, loss {float(logs['loss']):.3f}")


def run_table(demo: DemoResult, seconds: float) -> Table:
    """Return the run's figures.

    Args:
        demo: Of a finished run.
        seconds: How long it took in all.
    """
    monitor, trainer = demo.pipeline.monitor, demo.pipeline.trainer
    run = monitor.summary()
    assert trainer is not None
    assert trainer.step_plan is not None
    planned = sum(len(trainer.step_plan.step(number)) for number in range(len(trainer.step_plan)))
    first, last = edge_losses(monitor.batches)
    evaluated = [each.eval_loss for each in demo.result.epochs if each.eval_loss is not None]
    parts = [each.num_micro_batches for each in monitor.batches]
    refused = sum(demo.dataset.num_refused.values())
    recovered = sum(each.num_ooms > 0 for each in monitor.batches)
    table = Table(
        title=Text("Trained a tiny SmolVLM on the corpus that comes with vlmpack"),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_header=False,
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    table.add_row("steps", f"{run.num_steps:,}", f"in {len(demo.result.epochs)} epochs")
    table.add_row(
        "samples",
        f"{run.num_samples:,}",
        f"of {planned:,} planned; {len(demo.dataset):,} rows are usable, {refused:,} are refused",
    )
    table.add_row("loss", f"{last:.3f}", f"from {first:.3f}")
    table.add_row("evaluation loss", f"{evaluated[-1]:.3f}", f"from {evaluated[0]:.3f}")
    table.add_row("out of memory", f"{demo.simulator.num_ooms:,}", f"times, in {recovered} of the steps")
    table.add_row("micro-batches", f"{sum(parts):,}", f"{min(parts)} to {max(parts)} a step")
    table.add_row(
        "peak memory",
        f"{run.peak_bytes / GB:.2f} GB",
        f"of {demo.simulator.limit_bytes / GB:.2f} GB pretended",
    )
    table.add_row("time", f"{seconds:.1f} s", f"{run.samples_per_s:,.0f} samples a second in steps")
    return table


def task_table(monitor: DynamicBatchingMonitor) -> Table:
    """Return each task's samples, losses and weight.

    Args:
        monitor: Of a finished run.
    """
    run = monitor.summary()
    table = Table(title="Tasks", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("task", style="cyan", no_wrap=True)
    for name in ("samples", "first loss", "last loss", "last weight"):
        table.add_column(name, justify="right")
    for task in monitor.task_types:
        losses = [each.task_losses[task] for each in monitor.batches if task in each.task_losses]
        losses = [loss for loss in losses if math.isfinite(loss)]
        weights = [each.task_weights[task] for each in monitor.batches if task in each.task_weights]
        table.add_row(
            task,
            f"{run.task_samples.get(task, 0):,}",
            f"{losses[0]:.3f}" if losses else "-",
            f"{losses[-1]:.3f}" if losses else "-",
            f"{weights[-1]:.2f}" if weights else "-",
        )
    return table
