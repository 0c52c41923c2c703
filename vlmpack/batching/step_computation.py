"""Compute the gradient of one step from micro-batches: collate, divide by the whole step, go backward.

Everything is collated first, on the CPU: the loss of each micro-batch is divided by what the *whole step*
holds over all ranks, and that is known only from labels. Nothing is on the device before the split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vlmpack.batching.losses import check_document_starts, count_items, count_rows, row_losses
from vlmpack.errors import ConfigError, VlmpackError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmpack.batching.agreement import Ranks
    from vlmpack.batching.recovery import MicroBatch
    from vlmpack.batching.step_trainer import StepTrainer


class StepRefusedError(VlmpackError):
    """A step that no rank computes: raised on every rank at once, so that none waits for another."""


@dataclass(slots=True)
class _Prepared:
    """A micro-batch, collated."""

    inputs: dict[str, Any]
    """What the model is given."""
    batch: dict[str, Any]
    """The whole collated batch."""
    items: float
    """What it adds to the denominator."""


@dataclass(slots=True)
class TaskLoss:
    """What a task's samples lost in one step."""

    total: torch.Tensor | float = 0.0
    """Sum of its undivided losses."""
    items: float = 0.0
    """What to divide it by."""
    samples: int = 0
    """Its samples."""


@dataclass(slots=True)
class StepComputation:
    """One attempt after the other at a step; implements `StepRunner`."""

    trainer: StepTrainer
    module: torch.nn.Module
    ranks: Ranks
    originals: frozenset[int]
    """Identities of the step's items as the plan gave them; what is not among them was divided."""
    denominator: float | None = None
    """Tokens or samples of the whole step, agreed on once."""
    is_refused: bool = False
    """All ranks know that the step cannot be computed."""
    losses: list[tuple[torch.Tensor, MicroBatch]] = field(default_factory=list)
    """What each micro-batch lost, divided and weighted."""
    tasks: dict[str, TaskLoss] = field(default_factory=dict)
    """The same by task, undivided and without weights."""
    _prepared: list[_Prepared] = field(default_factory=list)
    _next: int = 0

    @property
    def num_items(self) -> float:
        """What this rank's micro-batches add to the denominator."""
        return sum(prepared.items for prepared in self._prepared)

    def begin(self, parts: Sequence[MicroBatch]) -> None:
        """Collate all parts, and agree on the denominator the first time."""
        self.losses, self.tasks, self._prepared, self._next = [], {}, [], 0
        if self.trainer.balancing is not None:
            self.trainer.balancing.begin_step()
        error: Exception | None = None
        try:
            self._prepared = [self._prepare(part) for part in parts]
        except Exception as caught:
            if self.denominator is not None:
                raise
            error = caught
        if self.denominator is None:
            self._agree(error, parts)

    def _agree(self, error: Exception | None, parts: Sequence[MicroBatch]) -> None:
        items, failed = self.ranks.total([self.num_items, float(error is not None)])
        self.is_refused = bool(failed) or not items
        if error is not None:
            raise error
        if failed:
            raise StepRefusedError("another rank could not collate its part of the step; its error says why")
        if not items:
            keys = ", ".join(shape.key for part in parts for shape in part.shapes)
            raise StepRefusedError(
                f"no label of the step is supervised on any rank (samples here: {keys}): its loss is "
                "undefined"
            )
        self.denominator = items

    def _prepare(self, part: MicroBatch) -> _Prepared:
        trainer = self.trainer
        batch = trainer.collate_items(part.items)
        if any(id(item) not in self.originals for item in part.items):
            batch = without_trailing_padding(batch)
        check_document_starts(batch, [shape.key for shape in part.shapes])
        if trainer.loss == "model":
            shifts = trainer.loss_shifts_labels(batch)
            count = float(count_items(batch, shifts=shifts, num_samples=len(part.items)))
        else:
            count = float(sum(count_rows(batch, trainer.loss)))
        return _Prepared(inputs=trainer.model_inputs(batch), batch=batch, items=count)

    def run(self, part: MicroBatch) -> None:
        """Add one part's gradient."""
        prepared = self._prepared[self._next]
        self._next += 1
        if not prepared.items:
            return  # nothing supervised: a mean over nothing would be NaN
        inputs = self.trainer._prepare_inputs(prepared.inputs)
        with self.trainer.compute_loss_context_manager():
            if self.trainer.loss == "model":
                loss = self._model_loss(inputs, prepared, part)
            else:
                loss = self._row_loss(inputs, prepared, part)
        del inputs
        if self.trainer.balancing is not None:
            self.trainer.balancing.backward({part.task_type: loss / self.ranks.world_size})
        else:
            self.trainer.accelerator.backward(loss)
        self.losses.append((loss.detach(), part))

    def _model_loss(self, inputs: dict[str, Any], prepared: _Prepared, part: MicroBatch) -> torch.Tensor:
        """The model's own loss, divided by the whole step; times the ranks, as gradients are averaged."""
        trainer, world = self.trainer, self.ranks.world_size
        assert self.denominator is not None
        divides = trainer.loss_divides_by_items
        items = torch.tensor(self.denominator, device=trainer.args.device) if divides else None
        loss: torch.Tensor = trainer.compute_loss(self.module, inputs, num_items_in_batch=items)
        if not divides:
            loss = loss * (prepared.items / self.denominator * world)
        elif not trainer.loss_counts_ranks:
            loss = loss * world
        self._record(
            part.task_type, loss.detach() * (self.denominator / world), prepared.items, len(part.items)
        )
        weight = trainer.weight_of(part.task_type)
        return loss if weight == 1.0 else loss * weight

    def _row_loss(self, inputs: dict[str, Any], prepared: _Prepared, part: MicroBatch) -> torch.Tensor:
        """A loss from the logits, each row with its task's weight.

        Raises:
            ConfigError: If rows are not samples.
        """
        assert self.denominator is not None
        labels = inputs.pop("labels")
        outputs = self.module(**inputs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        batch = {**prepared.batch, "labels": labels}
        rows = row_losses(logits, batch, self.trainer.loss)
        if len(rows.items) != len(part.items):
            raise ConfigError(
                f"loss={self.trainer.loss!r} needs one row a sample: {len(part.items)} samples made "
                f"{len(rows.items)} rows"
            )
        weights = [self.trainer.weight_of(shape.task_type) for shape in part.shapes]
        for shape, lost, items in zip(part.shapes, rows.sums.detach(), rows.items, strict=True):
            self._record(shape.task_type, lost, items, 1)
        weighted = rows.sums * rows.sums.new_tensor(weights)
        return weighted.sum() * (self.ranks.world_size / self.denominator)

    def _record(self, task: str, lost: torch.Tensor, items: float, samples: int) -> None:
        record = self.tasks.setdefault(task, TaskLoss())
        record.total = record.total + lost
        record.items += items
        record.samples += samples

    def loss(self) -> torch.Tensor:
        """Return this rank's loss of the step."""
        if not self.losses:
            return torch.zeros((), device=self.trainer.args.device)
        return torch.stack([loss for loss, _ in self.losses]).sum()

    def not_finite(self) -> MicroBatch | None:
        """Return the first micro-batch whose loss is not finite."""
        if not self.losses or bool(torch.isfinite(self.loss())):
            return None
        return next((part for loss, part in self.losses if not bool(torch.isfinite(loss))), self.losses[0][1])


def without_trailing_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut columns that are padding in every row: half a pack, padded to a whole row, would save nothing.

    Args:
        batch: With `segment_ids` [B, L]; others are returned as they are.
    """
    segments = batch.get("segment_ids")
    if not isinstance(segments, torch.Tensor) or segments.ndim != 2 or not segments.any():
        return batch
    length = int(segments.any(0).nonzero().max()) + 1
    shape = segments.shape
    return {
        name: value[:, :length] if isinstance(value, torch.Tensor) and value.shape == shape else value
        for name, value in batch.items()
    }
