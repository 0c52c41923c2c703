"""Losses and samples by task, collected over the steps between two log lines."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmpack.batching.agreement import Ranks
    from vlmpack.batching.recovery import StepReport
    from vlmpack.batching.step_computation import TaskLoss


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSummary:
    """What there is to say about one step of this rank, for monitors."""

    step: int
    """Number of the step in the run, from 0."""
    epoch: int
    """The pass over the data, from 0."""
    loss: Any = field(repr=False)
    """Its loss: a tensor of no dimension, divided over the whole step and weighted."""
    task_losses: dict[str, float | Any] = field(repr=False)
    """Mean loss of each task, without weights: numbers or tensors of no dimension."""
    task_samples: dict[str, int]
    """Samples of each task."""
    task_items: dict[str, float] = field(repr=False)
    """What each task's mean loss was divided by: tokens or samples."""
    num_samples: int
    """Samples of the step over all ranks."""
    num_tokens: int
    """Positions on this rank; 0 where nobody knows."""
    report: StepReport
    """Attempts and micro-batches."""


def over_ranks(told: StepSummary, ranks: Ranks) -> StepSummary:
    """Return a step as all ranks did it together: the loss of the whole step, samples and errors added up.

    Args:
        told: This rank's; every rank calls this at the same step.
        ranks: All of them.
    """
    if ranks.world_size == 1:
        return told
    tasks = {
        task: (float(loss), told.task_items[task], told.task_samples[task])
        for task, loss in told.task_losses.items()
    }
    mine = (float(told.loss), tasks, told.num_tokens, told.report)
    everyones = [mine] * ranks.world_size
    dist.all_gather_object(everyones, mine, group=ranks.group)
    items: dict[str, float] = {}
    totals: dict[str, float] = {}
    samples: dict[str, int] = {}
    for _, theirs, _, _ in everyones:
        for task, (loss, count, number) in theirs.items():
            items[task] = items.get(task, 0.0) + count
            totals[task] = totals.get(task, 0.0) + loss * count
            samples[task] = samples.get(task, 0) + number
    reports = [report for *_, report in everyones]
    return replace(
        told,
        loss=sum(loss for loss, *_ in everyones) / ranks.world_size,
        task_losses={task: total / max(items[task], 1e-12) for task, total in totals.items()},
        task_samples=samples,
        task_items=items,
        num_tokens=sum(tokens for _, _, tokens, _ in everyones),
        report=replace(
            told.report,
            num_attempts=1 + sum(report.num_attempts - 1 for report in reports),
            num_micro_batches=max(report.num_micro_batches for report in reports),
            isolated=tuple(shape for report in reports for shape in report.isolated),
        ),
    )


@dataclass(slots=True)
class TaskMetrics:
    """Adds up steps until they are logged."""

    totals: dict[str, list[Any]] = field(default_factory=dict)
    """For each task: sum of undivided losses, what to divide by, samples."""
    num_attempts: int = 0
    """Runs of steps, failed ones too."""
    num_micro_batches: int = 0
    """Parts of the runs that succeeded."""
    num_steps: int = 0
    """Steps."""
    num_isolated: int = 0
    """Samples that were left out."""
    num_skipped: int = 0
    """Steps that were left out for their loss."""

    def add(self, tasks: Mapping[str, TaskLoss], report: StepReport) -> None:
        """Add a step that succeeded.

        Args:
            tasks: Its losses by task.
            report: How it went.
        """
        for task, lost in tasks.items():
            row = self.totals.setdefault(task, [0.0, 0.0, 0])
            row[0] = row[0] + lost.total
            row[1] += lost.items
            row[2] += lost.samples
        self.num_steps += 1
        self.num_attempts += report.num_attempts
        self.num_micro_batches += report.num_micro_batches
        self.num_isolated += len(report.isolated)

    def drain(self, ranks: Ranks) -> dict[str, float]:
        """Return the figures over all ranks for a log line, and begin anew.

        Args:
            ranks: All of them call this at the same step.
        """
        mine = {task: (float(total), items, samples) for task, (total, items, samples) in self.totals.items()}
        counts = (
            self.num_attempts - self.num_steps,
            self.num_micro_batches,
            self.num_isolated,
            self.num_skipped,
        )
        everyones = [(mine, counts)]
        if ranks.world_size > 1:
            everyones = [(mine, counts)] * ranks.world_size
            dist.all_gather_object(everyones, (mine, counts), group=ranks.group)
        logs: dict[str, float] = {}
        for task in sorted({task for tasks, _ in everyones for task in tasks}):
            rows = [tasks[task] for tasks, _ in everyones if task in tasks]
            logs[f"loss_{task}"] = sum(row[0] for row in rows) / max(sum(row[1] for row in rows), 1e-12)
            logs[f"samples_{task}"] = sum(row[2] for row in rows)
        if len(logs) == 2:  # one task: its loss is the loss
            logs = {}
        failed, micro, isolated, skipped = (sum(each[at] for _, each in everyones) for at in range(4))
        logs["num_ooms"] = failed
        logs["micro_batches_per_step"] = micro / max(self.num_steps * ranks.world_size, 1)
        if isolated:
            logs["num_isolated"] = isolated
        if skipped:
            logs["num_skipped_steps"] = skipped // ranks.world_size
        self.__init__()  # type: ignore[misc]
        return logs
