"""The part of `DynamicBatchingTrainer` that computes a step: collate, weigh, split, recover, agree."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from vlmpack.batching.agreement import Ranks
from vlmpack.batching.checkpointing import GradientCheckpointManager
from vlmpack.batching.collate import HeterogeneousBatch, HeterogeneousCollator
from vlmpack.batching.guardian import OOMGuardian
from vlmpack.batching.label_shift import shifts_labels
from vlmpack.batching.losses import LossKind
from vlmpack.batching.prime import prime_optimizer
from vlmpack.batching.records import StepBatch
from vlmpack.batching.recovery import StepReport, run_step_with_recovery
from vlmpack.batching.rollback import Rollback
from vlmpack.batching.split import divide_item
from vlmpack.batching.step_computation import StepComputation
from vlmpack.batching.task_metrics import StepSummary, TaskMetrics
from vlmpack.batching.trainer_setup import own_arguments
from vlmpack.collate import VQACollator
from vlmpack.errors import ConfigError, VlmpackError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import TrainingArguments

    from vlmpack.batching.agreement import Verdict
    from vlmpack.batching.costs import Formula
    from vlmpack.batching.normalize import EffectiveBatchSizeNormalizer
    from vlmpack.batching.step_plan import StepPlan
    from vlmpack.batching.task_gradients import TaskBalancing

logger = logging.getLogger(__name__)

DEFAULT_TASK_WEIGHTS: Final = {"T1": 1.0, "T2": 1.0, "T3": 1.0}
"""The documented default; other tasks count 1 as well, as long as no weights are given."""
NonFiniteLoss: TypeAlias = Literal["raise", "skip_step"]
"""What to do with a step whose loss is not finite."""


class StepTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed here
    """A Trainer whose items are whole steps; `DynamicBatchingTrainer` plans them.

    Args:
        model: As for `Trainer`.
        args: As for `Trainer`; they are copied.
        memory_predictor: What batches cost.
        oom_guardian: Splits and recovers; None: one of the predictor.
        batch_size_normalizer: Couples the learning rate to the step's size.
        task_loss_weights: What each task's loss is multiplied by.
        balancing: Balances the tasks' gradients.
        loss: "model", "token" or "sample".
        non_finite: "raise" or "skip_step".
        divide: Halves an item that does not fit alone.
        **trainer: Everything else that `Trainer` takes.

    Raises:
        ConfigError: If a setting is invalid.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        memory_predictor: Formula = None,
        oom_guardian: OOMGuardian | None = None,
        batch_size_normalizer: EffectiveBatchSizeNormalizer | None = None,
        task_loss_weights: Mapping[str, float] | None = None,
        balancing: TaskBalancing | None = None,
        loss: LossKind = "model",
        non_finite: NonFiniteLoss = "raise",
        divide: Callable[[Any], tuple[Any, Any] | None] = divide_item,
        **trainer: Any,
    ) -> None:
        _check(loss, non_finite, task_loss_weights)
        args, accumulation = own_arguments(args)
        self.accumulation_steps = accumulation
        """What `gradient_accumulation_steps` was: the loop itself sees whole steps."""
        self.formula = memory_predictor
        self.guardian = OOMGuardian(memory_predictor) if oom_guardian is None else oom_guardian
        if oom_guardian is not None and memory_predictor is not None:
            oom_guardian.adopt(memory_predictor)
        self.task_loss_weights = dict(
            DEFAULT_TASK_WEIGHTS if task_loss_weights is None else task_loss_weights
        )
        self._weights_are_given = task_loss_weights is not None
        self.balancing = balancing
        self.loss: LossKind = loss
        self.non_finite: NonFiniteLoss = non_finite
        self.step_plan: StepPlan | None = None
        """The plan of the run, once it has begun."""
        self.task_metrics = TaskMetrics()
        self.last_step: StepSummary | None = None
        """The latest step, for monitors."""
        self.batch_size_normalizer = batch_size_normalizer
        self._divide = divide
        self._lr_samples: float = 1
        self._shifts: bool | None = None
        self._forward: Mapping[str, inspect.Parameter] | None = None
        super().__init__(model, args, **trainer)
        if batch_size_normalizer is not None:
            from vlmpack.batching.lr_coupling import BatchLRCallback

            BatchLRCallback(batch_size_normalizer, lambda: self._lr_samples).attach(self)
        self.ranks = Ranks(self.args.device)

    # ---- collation ---------------------------------------------------------------------------------
    @property
    def _collates_itself(self) -> bool:
        return isinstance(self.data_collator, HeterogeneousCollator | VQACollator)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """Return the collator; ours takes images and tasks, which are no columns of the model's."""
        if self._collates_itself:
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset if self._collates_itself else super()._remove_unused_columns(dataset, description)

    def collate_items(self, items: Sequence[Any]) -> dict[str, Any]:
        """Return a micro-batch's collated batch.

        Args:
            items: Its samples or packs.
        """
        return dict(self._get_collator_with_removed_columns(self.data_collator)(list(items)))

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a batch the model takes.

        Args:
            batch: Collated; keys of samples and the like stay behind.
        """
        if self._forward is None:  # once: looking through wrappers takes longer than a small forward pass
            self._forward = inspect.signature(self.accelerator.unwrap_model(self.model).forward).parameters
        forward = self._forward
        takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in forward.values())
        return {
            name: value
            for name, value in batch.items()
            if name in forward or name in self.label_names or (takes_all and isinstance(value, torch.Tensor))
        }

    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(dict(inputs) if isinstance(inputs, HeterogeneousBatch) else inputs)

    # ---- the loss ----------------------------------------------------------------------------------
    def loss_shifts_labels(self, batch: Mapping[str, Any]) -> bool:
        """Return whether the model's loss predicts a label from the position before it.

        Trainer knows it of transformers' own causal losses; any other model is asked once.

        Args:
            batch: A collated one.
        """
        if self._shifts is None:
            known = bool(getattr(self, "_loss_shifts_labels", False)) or self.label_smoother is not None
            module = self.accelerator.unwrap_model(self.model)
            asked = functools.partial(self._undivided_loss, module)
            self._shifts = known or shifts_labels(module, batch, asked)
        return self._shifts if self._shifts is not None else True

    def _undivided_loss(self, module: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        one = torch.tensor(1, device=self.args.device) if self.loss_divides_by_items else None
        inputs = self._prepare_inputs(self.model_inputs(batch))
        with self.compute_loss_context_manager():
            loss: torch.Tensor = self.compute_loss(module, inputs, num_items_in_batch=one)
        return loss

    @property
    def loss_divides_by_items(self) -> bool:
        """Whether the loss is divided by the number of items that it is told; else it is a mean."""
        return bool(self.model_accepts_loss_kwargs) or self.compute_loss_func is not None

    @property
    def loss_counts_ranks(self) -> bool:
        """Whether `compute_loss` multiplies by the number of ranks, since gradients are averaged."""
        return bool(self.args.average_tokens_across_devices)

    def weight_of(self, task: str) -> float:
        """Return what a task's loss is multiplied by.

        Args:
            task: Its name.

        Raises:
            ConfigError: If weights were given and it has none.
        """
        if self._weights_are_given and task not in self.task_loss_weights:
            raise ConfigError(
                f"task {task!r} has no weight in task_loss_weights, which has "
                f"{self.task_loss_weights}: add it"
            )
        return self.task_loss_weights.get(task, 1.0)

    # ---- the step ----------------------------------------------------------------------------------
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer, and its state at once: an OOM in its step could not be undone."""
        optimizer = super().create_optimizer(*args, **kwargs)
        prime_optimizer(getattr(optimizer, "optimizer", optimizer))  # accelerate's wrapper holds the real one
        return optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute the gradient of one step, however often it has to be split.

        Args:
            model: As the Trainer wraps it.
            inputs: A `StepBatch`.
            num_items_in_batch: Not used; the step counts its own.

        Returns:
            The step's loss.

        Raises:
            VlmpackError: If a sample does not fit alone, a loss is not finite, or another rank failed.
        """
        assert isinstance(inputs, StepBatch), "the loader's items are steps"
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        module = model.module if isinstance(model, DistributedDataParallel) else model
        originals = frozenset(map(id, inputs.items))
        step = StepComputation(trainer=self, module=module, ranks=self.ranks, originals=originals)
        parameters = [each for each in module.parameters() if each.requires_grad]
        report, error = self._attempt(step, inputs, module, parameters)
        if step.is_refused and error is not None:
            raise error
        culprit = step.not_finite() if error is None else None
        verdict = self.ranks.vote(
            parameters,
            failed=error is not None,
            not_finite=culprit is not None,
            num_items=step.num_items,
        )
        if error is not None:
            raise error
        assert report is not None
        if verdict.num_failed:
            raise VlmpackError(f"{verdict.num_failed} other rank(s) cannot go on; their error says why")
        if verdict.num_not_finite or not verdict.num_items:
            return self._without_gradient(step, parameters, verdict, inputs)
        self._exchange(step, parameters, verdict, model, inputs, report)
        return self._finish(step, inputs, report)

    def _attempt(
        self,
        step: StepComputation,
        inputs: StepBatch,
        module: torch.nn.Module,
        parameters: list[torch.nn.Parameter],
    ) -> tuple[StepReport | None, Exception | None]:
        """Run the step until it succeeds; an error is returned, as the other ranks have to hear of it."""
        tasks = {shape.task_type for shape in inputs.shapes}
        try:
            report = run_step_with_recovery(
                inputs.items,
                step,
                guardian=self.guardian,
                undo=Rollback(module, parameters=parameters, scaler=self.accelerator.scaler),
                shapes=inputs.shapes,
                group_by_task=len(tasks) > 1 and (self.loss == "model" or self.balancing is not None),
                divide=self._divide,
                checkpoint=lambda: GradientCheckpointManager.enable_gradient_checkpointing(module),
            )
        except Exception as error:
            return None, error
        return report, None

    def _exchange(
        self,
        step: StepComputation,
        parameters: list[torch.nn.Parameter],
        verdict: Verdict,
        model: Any,
        inputs: StepBatch,
        report: StepReport,
    ) -> None:
        """Average gradients over ranks; the denominator follows what was really trained on."""
        assert step.denominator is not None
        scale = step.denominator / verdict.num_items * self._legacy_scale(report, inputs)
        if self.balancing is not None:
            self._balance(step)
            if scale != 1.0:
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)
        else:
            self.ranks.average_gradients(parameters, verdict.has_gradient, scale)
        if isinstance(model, DistributedDataParallel) and model.broadcast_buffers:
            self.ranks.broadcast_buffers(model.module)

    @property
    def _stacks_scales(self) -> bool:
        return self.batch_size_normalizer is not None and self.batch_size_normalizer.mode == "legacy_stack"

    def _legacy_scale(self, report: StepReport, inputs: StepBatch) -> float:
        """Return the reference document's product of gradient and loss scale, where it was asked for."""
        if not self._stacks_scales or not report.num_micro_batches:
            return 1.0
        assert self.batch_size_normalizer is not None
        number = report.num_micro_batches
        scales = self.batch_size_normalizer.apply(len(inputs) / number, number)
        return scales.gradient_scale * scales.loss_scale

    def _balance(self, step: StepComputation) -> None:
        assert self.balancing is not None
        names = list(self.balancing.gradients.task_types)
        mine = [step.tasks.get(task) for task in names]
        flat = [float(each.total) if each else 0.0 for each in mine]
        flat += [each.items if each else 0.0 for each in mine]
        summed = self.ranks.total(flat)
        pairs = list(zip(names, summed[: len(names)], summed[len(names) :], strict=True))
        losses = {task: total / items for task, total, items in pairs if items}
        held = sum(items for _, _, items in pairs)
        shares = {task: items / held for task, _, items in pairs if items}
        self.balancing.finish_step(self.state.global_step, losses, shares)

    def _finish(self, step: StepComputation, inputs: StepBatch, report: StepReport) -> torch.Tensor:
        loss = step.loss()
        self.task_metrics.add(step.tasks, report)
        plan = self.step_plan
        number = self.state.global_step
        num_samples = len(plan.step(number)) if plan is not None else len(inputs)
        if self._stacks_scales:
            self._lr_samples = max(1.0, len(inputs) / max(report.num_micro_batches, 1))
        else:
            self._lr_samples = num_samples
        self.last_step = StepSummary(
            step=number,
            epoch=inputs.epoch,
            loss=loss,
            task_losses={task: lost.total / max(lost.items, 1e-12) for task, lost in step.tasks.items()},
            task_samples={task: lost.samples for task, lost in step.tasks.items()},
            task_items={task: lost.items for task, lost in step.tasks.items()},
            num_samples=num_samples,
            num_tokens=sum(shape.num_tokens for shape in inputs.shapes),
            report=report,
        )
        return loss

    def _without_gradient(
        self,
        step: StepComputation,
        parameters: list[torch.nn.Parameter],
        verdict: Verdict,
        inputs: StepBatch,
    ) -> torch.Tensor:
        """Stop or leave the step out, on all ranks alike.

        Raises:
            VlmpackError: If the policy is to raise.
        """
        culprit = step.not_finite()
        where = culprit.shapes if culprit is not None else ()
        message = (
            f"step {self.state.global_step}: the loss is not finite"
            + (f" for samples {', '.join(f'{s.key} ({s.task_type})' for s in where)}" if where else "")
            + f", on {verdict.num_not_finite} rank(s)"
        )
        if verdict.num_not_finite and self.non_finite == "raise":
            raise VlmpackError(
                f"{message}. Look at these samples, lower the learning rate, or say non_finite='skip_step'"
            )
        reason = message if verdict.num_not_finite else "every sample of the step is isolated"
        logger.warning("%s: the step is left out", reason)
        for parameter in parameters:
            parameter.grad = None
        self.task_metrics.num_skipped += 1
        self._lr_samples = max(1, len(inputs))
        return torch.zeros((), device=self.args.device)


def _check(loss: str, non_finite: str, weights: Mapping[str, float] | None) -> None:
    if loss not in get_args(LossKind):
        raise ConfigError(f"loss must be one of {get_args(LossKind)}, got {loss!r}")
    if non_finite not in get_args(NonFiniteLoss):
        raise ConfigError(f"non_finite must be one of {get_args(NonFiniteLoss)}, got {non_finite!r}")
    for task, weight in (weights or {}).items():
        if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ConfigError(
                f"the loss weight of task {task!r} must be a number of 0 or more, got {weight!r}"
            )
