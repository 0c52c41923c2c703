"""A drop-in for `transformers.Trainer` whose steps are planned once and split as memory demands.

    plan (StepPlan)          one item of the loader = the samples of one optimizer step, not yet collated
    training_step            split by predicted cost, forward and backward, split finer after an OOM
    vote, average            ranks agree, then gradients are exchanged once
    the Trainer's own loop   clipping, optimizer, schedule, logging, evaluation, checkpoints: unchanged

The plan is one pass over all epochs, so that the Trainer's count of steps is exact; epochs begin and end for
callbacks, logs, evaluation and saving where the plan says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from vlmpack.batching.detect import is_oom_error
from vlmpack.batching.records import StepBatch, SupportsSampleMetadata
from vlmpack.batching.split import divide_item
from vlmpack.batching.step_trainer import NonFiniteLoss, StepTrainer
from vlmpack.batching.trainer_setup import (
    make_plan,
    make_source,
    planned_loader,
    sample_costs,
    streaming_loader,
)
from vlmpack.errors import ConfigError, VlmpackError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from vlmpack.batching.costs import Formula
    from vlmpack.batching.guardian import OOMGuardian
    from vlmpack.batching.losses import LossKind
    from vlmpack.batching.normalize import EffectiveBatchSizeNormalizer
    from vlmpack.batching.step_plan import StepSource
    from vlmpack.batching.task_gradients import TaskBalancing

STATE_NAME: Final = "dynamic_batching_{rank}.json"
"""What a checkpoint keeps besides the Trainer's own files, for each rank."""


class DynamicBatchingTrainer(StepTrainer):
    """Trains like `Trainer`, with steps that are planned, split by memory and never lost.

    Everything that `Trainer` takes is taken. A step holds per_device_train_batch_size x
    gradient_accumulation_steps samples of each rank, and its loss is divided by what the whole step holds, so
    that neither the split nor an OOM changes the gradient.

    Args:
        model: As for `Trainer`.
        args: As for `Trainer`; they are copied.
        data_collator: Collates a micro-batch: a `HeterogeneousCollator`, a `VQACollator`, or any other.
        train_dataset: Map-style (planned over all ranks and epochs), or a stream (one rank, with max_steps).
        eval_dataset: As for `Trainer`.
        memory_predictor: What batches cost: a `MemoryPredictor`, `CalibratedCost` or `LinearCost`.
        oom_guardian: Splits and recovers; None: one of the predictor.
        batch_size_normalizer: Couples the learning rate to the step's size; None: not coupled.
        task_loss_weights: What each task's loss is multiplied by; a task that is not in it is an error. None:
            1 for any task.
        balancing: Balances the tasks' gradients instead of fixed weights; a `TaskBalancing`.
        batch_sampler: Says what steps hold, instead of samples in random order.
        memory_aware: Make steps by a `MemoryAwareBatchSampler`; None: where the data set has
            `get_sample_metadata`, and a predictor is given.
        max_memory_mb: Its limit for one micro-batch; None: the device's, or 30,000 without a GPU.
        step_size: Samples of a step over all ranks, or a function of the epoch (a schedule).
        loss: "model" (its own), or "token" or "sample" computed from logits; see `losses`.
        non_finite: For a loss that is not finite: "raise" with the samples, or "skip_step", counted.
        divide: Halves an item that does not fit alone; packs are cut between samples.
        **trainer: Everything else that `Trainer` takes.

    Raises:
        ConfigError: If a setting is invalid, or the arguments ask for what cannot be split here.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        memory_predictor: Formula = None,
        oom_guardian: OOMGuardian | None = None,
        batch_size_normalizer: EffectiveBatchSizeNormalizer | None = None,
        task_loss_weights: Mapping[str, float] | None = None,
        balancing: TaskBalancing | None = None,
        batch_sampler: StepSource | None = None,
        memory_aware: bool | None = None,
        max_memory_mb: float | None = None,
        step_size: int | Callable[[int], int] | None = None,
        loss: LossKind = "model",
        non_finite: NonFiniteLoss = "raise",
        divide: Callable[[Any], tuple[Any, Any] | None] = divide_item,
        **trainer: Any,
    ) -> None:
        self._batch_sampler = batch_sampler
        self._memory_aware = memory_aware
        self._max_memory_mb = max_memory_mb
        self._step_size = step_size
        self._is_in_optimizer = False
        self._is_between_epochs = False
        self.control: Any = None
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            memory_predictor=memory_predictor,
            oom_guardian=oom_guardian,
            batch_size_normalizer=batch_size_normalizer,
            task_loss_weights=task_loss_weights,
            balancing=balancing,
            loss=loss,
            non_finite=non_finite,
            divide=divide,
            **trainer,
        )
        self.callback_handler.callbacks.insert(0, _PlanClock(self))

    # ---- plan and loader ---------------------------------------------------------------------------
    def get_train_dataloader(self) -> Any:
        """Return a loader whose items are whole steps.

        Raises:
            ConfigError: If there is no data set, or it cannot be planned.
        """
        if self.train_dataset is None:
            raise ConfigError("training needs a train_dataset")
        size = self._step_size
        if size is None:
            size = self.args.per_device_train_batch_size * self.accumulation_steps * self.args.world_size
        if isinstance(self.train_dataset, IterableDataset):
            if callable(size):
                raise ConfigError("a stream has steps of one size: step_size must be a number")
            return streaming_loader(self.train_dataset, self.args, size)
        memory_aware = self._memory_aware
        if memory_aware is None:
            has_metadata = isinstance(self.train_dataset, SupportsSampleMetadata)
            memory_aware = has_metadata and self.formula is not None and not callable(size)
        parts = self.accumulation_steps * self.args.world_size
        source = self._batch_sampler or make_source(
            self.train_dataset,
            self.args,
            step_size=size,
            formula=self.formula,
            memory_aware=memory_aware,
            max_memory_mb=None if self._max_memory_mb is None else self._max_memory_mb * parts,
        )
        costs = sample_costs(self.train_dataset, source, self.formula) if self.args.world_size > 1 else None
        self.step_plan = make_plan(source, self.args, costs)
        return planned_loader(self.train_dataset, self.step_plan, self.args)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any, *rest: Any) -> Any:
        """Return the run's sizes: one pass over the plan."""
        if self.step_plan is None:
            return super().set_initial_training_values(args, dataloader, *rest)
        total = len(self.step_plan)
        examples = len(self.train_dataset)
        trained = int(examples * self.step_plan.progress(total))
        size = self.get_total_train_batch_size(args)
        return (1, total, examples, trained, size, total, total)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return the next step; what its loss is divided by is counted when it is collated."""
        steps = [step for _, step in zip(range(num_batches), epoch_iterator, strict=False)]
        return steps, None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, save and evaluate; and let an epoch of the plan end and the next one begin for callbacks."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._refuse_to_end_an_epoch()
        plan, done = self.step_plan, self.state.global_step
        if plan is None or self._is_between_epochs or done not in plan.epoch_ends or done >= len(plan):
            return
        if self.control.should_training_stop:
            return
        self._is_between_epochs = True
        try:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
        finally:
            self._is_between_epochs = False

    def _refuse_to_end_an_epoch(self) -> None:
        """Stop where a callback wants to leave an epoch early: the loop knows one, which is the whole run.

        Raises:
            VlmpackError: If it does, before the last step.
        """
        plan, done = self.step_plan, self.state.global_step
        if plan is None or not self.control.should_epoch_stop or self.control.should_training_stop:
            return
        if done not in plan.epoch_ends:
            raise VlmpackError(
                f"a callback's should_epoch_stop would end the whole run at step {done} of {len(plan)}: the "
                "plan is one pass over all epochs. Plan fewer samples by batch_sampler, or end the run by "
                "should_training_stop"
            )

    # ---- logs and checkpoints ----------------------------------------------------------------------
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with each task's loss and samples and the step's splits beside a training loss."""
        if "loss" in logs:
            logs = {**logs, **self.task_metrics.drain(self.ranks)}
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 6 x tokens x parameters of a step."""
        if not isinstance(inputs, StepBatch):
            return int(super().floating_point_ops(inputs))
        if not hasattr(self.model, "num_parameters"):
            return 0
        tokens = sum(shape.num_tokens for shape in inputs.shapes)
        return int(6 * tokens * self.model.num_parameters(exclude_embeddings=True))

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        (tokens,) = self.ranks.total([sum(shape.num_tokens for shape in inputs.shapes)])
        self.state.num_input_tokens_seen += int(tokens)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "plan": self.step_plan.digest if self.step_plan is not None else None,
            "guardian": self.guardian.state_dict(),
            "balancing": None if self.balancing is None else self.balancing.state_dict(),
        }
        path = folder / STATE_NAME.format(rank=self.args.process_index)
        path.write_text(json.dumps(state), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_own_state(Path(checkpoint))

    def _load_own_state(self, folder: Path) -> None:
        """Go on with the saved plan, cap and calibration; other numbers of ranks may resume.

        Raises:
            ConfigError: If the checkpoint is not of such a run, is of another plan, or its place would not
                be skipped to.
        """
        path = folder / STATE_NAME.format(rank=self.args.process_index)
        if not path.exists():
            path = folder / STATE_NAME.format(rank=0)
        if not path.exists():
            raise ConfigError(
                f"{folder} has no {STATE_NAME.format(rank=0)}: it is of another trainer, whose samples came "
                "in another order; samples would be lost and doubled"
            )
        if self.args.ignore_data_skip:
            raise ConfigError("ignore_data_skip would train on the plan's first steps again; leave it off")
        state = json.loads(path.read_text(encoding="utf-8"))
        if self.step_plan is not None and state["plan"] is not None:
            self.step_plan.check_digest(state["plan"])
        self.guardian.load_state_dict(state["guardian"])
        if self.balancing is not None and state["balancing"] is not None:
            self.balancing.load_state_dict(state["balancing"])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `Trainer.train`.

        Raises:
            VlmpackError: If the optimizer's step runs out of memory: its state may be half written.
        """
        self._is_in_optimizer = False
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            if not (self._is_in_optimizer and is_oom_error(error)):
                raise
            raise VlmpackError(
                f"memory ran out inside of the optimizer's step {self.state.global_step}: parameters and "
                "state may be half updated, so it cannot be repeated. Resume from the last checkpoint, with "
                "a larger memory_margin_percent, a fused or 8-bit optimizer, or smaller micro-batches"
            ) from error


class _PlanClock(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Tells the Trainer's state the plan's epoch, and its trainer where in a step the loop is."""

    def __init__(self, trainer: DynamicBatchingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.step_plan is not None:
            state.num_train_epochs = len(self.trainer.step_plan.epoch_ends)
            state.epoch = self.trainer.step_plan.progress(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._is_in_optimizer = True

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._is_in_optimizer = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.step_plan is not None:
            state.epoch = self.trainer.step_plan.progress(state.global_step)
