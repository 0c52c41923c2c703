"""Run one optimizer step in micro-batches, and run it again, split finer, when memory runs out.

    plan -> run each micro-batch -> all ran: done
              | OOM
              v
    leave the except block, drop the error, roll the step back, lower the cap, clean up -> plan again

The whole step is repeated, not the micro-batch that failed: gradients of the step's beginning are None, so
going back needs no copy of them, which is memory that a full device does not have. No sample is lost, and
the gradient is the one that a larger device would have computed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from vlmpack.batching.detect import is_oom_error
from vlmpack.batching.records import SampleShape, shape_of
from vlmpack.batching.split import divide_item
from vlmpack.errors import OversizeError, VlmpackError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlmpack.batching.guardian import OOMGuardian

logger = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 50
"""Splits of one step before something else than its size must be wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """A part of a step that is computed at once."""

    items: tuple[Any, ...] = field(repr=False)
    """Samples or packs."""
    shapes: tuple[SampleShape, ...]
    """What each costs."""

    @property
    def task_type(self) -> str:
        """The task of its first item: of all, where a step is grouped by tasks."""
        return self.shapes[0].task_type


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """How a step went on this rank."""

    num_attempts: int
    """Runs of the step; 1 where nothing failed."""
    num_micro_batches: int
    """Parts of the run that succeeded."""
    isolated: tuple[SampleShape, ...] = ()
    """Samples that did not fit alone and were left out, by the policy "isolate_and_report"."""


class StepRunner(Protocol):
    """Computes the gradients of a step."""

    def begin(self, parts: Sequence[MicroBatch]) -> None:
        """Start, or start again, with nothing left of an earlier attempt.

        Args:
            parts: What `run` will be given.
        """
        ...

    def run(self, part: MicroBatch) -> None:
        """Add the gradient of one part; it may raise an OOM.

        Args:
            part: One of the parts that `begin` was given, in order.
        """
        ...


class Undo(Protocol):
    """Puts a step back to its beginning."""

    def restore(self) -> None:
        """Go back."""
        ...


def run_step_with_recovery(
    items: Sequence[Any],
    runner: StepRunner,
    *,
    guardian: OOMGuardian,
    undo: Undo,
    shapes: Sequence[SampleShape] | None = None,
    group_by_task: bool = False,
    divide: Callable[[Any], tuple[Any, Any] | None] = divide_item,
    checkpoint: Callable[[], bool] | None = None,
) -> StepReport:
    """Run a step until every item of it has run, splitting as memory demands.

    Args:
        items: Samples or packs of the step; may be none.
        runner: Computes their gradients.
        guardian: Says how to split, and learns.
        undo: Taken before the step, such as a `Rollback`.
        shapes: What each item costs; None: read off the items.
        group_by_task: Let no micro-batch hold two tasks.
        divide: Halves an item that fails alone, or returns None if it is one sample.
        checkpoint: Turns gradient checkpointing on; returns whether that changed anything. For the policy
            "checkpoint_then_retry".

    Returns:
        How it went.

    Raises:
        OversizeError: If a sample does not fit alone and the policy is to raise, or checkpointing did not
            help; names it.
        VlmpackError: If the step still fails after 50 splits.
    """
    if shapes is None:
        shapes = [shape_of(item, str(number)) for number, item in enumerate(items)]
    step = _Step(list(items), list(shapes), guardian, divide, checkpoint)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        parts = step.parts(group_by_task)
        runner.begin(parts)
        failed = next((part for part in parts if not _runs(part, runner, guardian, attempt > 1)), None)
        if failed is None:
            if attempt == 1:
                guardian.step_was_clean(step.shapes)
            return StepReport(
                num_attempts=attempt, num_micro_batches=len(parts), isolated=tuple(step.isolated)
            )
        # the error and all that its traceback held are gone by now
        undo.restore()
        guardian.failed(failed.shapes, lower_cap=not step.is_first_failure_alone(failed))
        guardian.emergency_cleanup(thorough=attempt > 1)
        step.after_failure(failed)
    raise VlmpackError(
        f"a step of {len(items)} items still runs out of memory after {MAX_ATTEMPTS} attempts, "
        f"the last one in {len(parts)} parts: something else than the batch fills the device"
    )


def _runs(part: MicroBatch, runner: StepRunner, guardian: OOMGuardian, after_failure: bool) -> bool:
    """Run one part; an OOM is swallowed here, so that its traceback dies with this frame."""
    guardian.measure()
    try:
        runner.run(part)
    except Exception as error:
        if not is_oom_error(error):
            raise
        logger.warning(
            "out of memory with %d item(s) (%s): the step is split finer. %s",
            len(part.items),
            part.shapes[0].key,
            str(error).split("\n", maxsplit=1)[0][:200],
        )
        return False
    guardian.succeeded(part.shapes, after_failure=after_failure)
    return True


@dataclass(slots=True)
class _Step:
    """The items of a step, as they are split, divided and isolated."""

    items: list[Any]
    shapes: list[SampleShape]
    guardian: OOMGuardian
    divide: Callable[[Any], tuple[Any, Any] | None]
    checkpoint: Callable[[], bool] | None
    isolated: list[SampleShape] = field(default_factory=list)
    tried_alone: set[str] = field(default_factory=set)

    def parts(self, group_by_task: bool) -> list[MicroBatch]:
        order = list(range(len(self.items)))
        groups = [order] if order else []
        if group_by_task:
            tasks = dict.fromkeys(shape.task_type for shape in self.shapes)
            groups = [[each for each in order if self.shapes[each].task_type == task] for task in tasks]
        return [
            MicroBatch(
                items=tuple(self.items[group[each]] for each in part),
                shapes=tuple(self.shapes[group[each]] for each in part),
            )
            for group in groups
            for part in self.guardian.plan([self.shapes[each] for each in group])
        ]

    def is_first_failure_alone(self, failed: MicroBatch) -> bool:
        """Return whether one sample failed for the first time: it is tried once more."""
        (item, *others), shape = failed.items, failed.shapes[0]
        return not others and shape.key not in self.tried_alone and self.divide(item) is None

    def after_failure(self, failed: MicroBatch) -> None:
        """Change the items where splitting between them cannot help."""
        if len(failed.items) > 1:
            return
        (item,), (shape,) = failed.items, failed.shapes
        at = next(number for number, each in enumerate(self.items) if each is item)
        halves = self.divide(item)
        if halves is not None:
            self.items[at : at + 1] = halves
            self.shapes[at : at + 1] = [shape_of(half, shape.key) for half in halves]
            return
        if shape.key not in self.tried_alone:  # the device was not clean: once more, by itself
            self.tried_alone.add(shape.key)
            return
        self._give_up(at, shape)

    def _give_up(self, at: int, shape: SampleShape) -> None:
        policy = self.guardian.single_sample
        if policy == "checkpoint_then_retry" and self.checkpoint is not None and self.checkpoint():
            logger.warning("sample %s does not fit alone: gradient checkpointing is on from now", shape.key)
            return
        if policy == "isolate_and_report":
            logger.warning("sample %s does not fit alone and is left out of this step", shape.key)
            self.isolated.append(shape)
            del self.items[at], self.shapes[at]
            return
        remedy = (
            "gradient checkpointing did not help"
            if policy == "checkpoint_then_retry"
            else 'use gradient checkpointing (single_sample="checkpoint_then_retry")'
        )
        raise OversizeError(
            f"sample {shape.key} does not fit in memory alone: task {shape.task_type}, "
            f"{shape.num_tokens} tokens, {shape.num_images} image(s), {shape.num_patches} patches; {remedy}, "
            f'make its images smaller, or leave it out (single_sample="isolate_and_report")'
        )
