"""The monitor on a Trainer: any Trainer for losses and times, `DynamicBatchingTrainer` for every step."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from vlmpack.batching.metrics import BatchMetrics
from vlmpack.batching.task_metrics import over_ranks

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from vlmpack.batching.monitor import DynamicBatchingMonitor
    from vlmpack.batching.task_metrics import StepSummary
    from vlmpack.memory.device import MemoryBackend, MemoryReading


class MonitorCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Feeds a monitor from a Trainer's events, and the Trainer's log from the monitor.

    What the Trainer logs goes to its `report_to` loggers with the monitor's figures beside it. Of a
    `DynamicBatchingTrainer` every step is recorded; a step's numbers are read when the next one is done, so
    that the device is not waited for. Of any other Trainer a record is made at each log, of the steps since
    the one before.

    Args:
        monitor: Records.
        backend: What memory is read from; None: the GPU, or this process without one.
        report: Write metrics.json and report.html at the end, if the monitor has a folder.
    """

    def __init__(
        self,
        monitor: DynamicBatchingMonitor,
        *,
        backend: MemoryBackend | None = None,
        report: bool = True,
    ) -> None:
        self.monitor = monitor
        self.report = report
        self._backend = backend
        self._trainer: Trainer | None = None
        self._since = time.perf_counter()
        self._last_step = 0
        self._epoch = 0
        self._rate: float | None = None
        self._waiting: tuple[int, StepSummary, BatchMetrics] | None = None

    def attach(self, trainer: Trainer) -> None:
        """Add this callback in front of all others, so that loggers see what it adds to the log.

        Args:
            trainer: Watched from its next step on.
        """
        self._trainer = trainer
        trainer.callback_handler.callbacks.insert(0, self)

    # ---- events ----------------------------------------------------------------------------
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on where the run resumes; a run from the beginning sets the folder's metrics aside."""
        if state.is_world_process_zero:
            self.monitor.rewind(state.global_step)
        self._last_step = state.global_step
        self._since = time.perf_counter()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note which epoch begins."""
        self._epoch = math.floor((state.epoch or 0.0) + 1e-6)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of a step whose figures the Trainer tells."""
        if self._tells_steps:
            self._since = time.perf_counter()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Note the scheduled learning rate."""
        rates = lr_scheduler.get_last_lr() if hasattr(lr_scheduler, "get_last_lr") else ()
        self._rate = float(rates[0]) if rates else None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the step before, and keep this one until its numbers are there."""
        if not self._tells_steps:
            return
        trainer: Any = self._trainer
        told = trainer.last_step
        # Of a step that was left out, on all ranks alike, the trainer says nothing.
        is_told = told is not None and told.step + 1 == state.global_step
        told = over_ranks(told, trainer.ranks) if is_told else None
        if not state.is_world_process_zero:
            return
        self._flush()
        if told is not None:
            self._waiting = (state.global_step, told, self._measured(state.global_step, told))
        else:
            self.monitor.record_batch(self._left_out(state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record what is known by now; add the figures to the log."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        if self._tells_steps:
            self._flush(grad_norm=logs.get("grad_norm"))
        elif not self.monitor.batches or self.monitor.batches[-1].step < state.global_step:
            self.monitor.record_batch(self._since_last_log(args, state, logs))
            self._last_step, self._since = state.global_step, time.perf_counter()
        figures = self.monitor.latest()
        for target in (logs, state.log_history[-1] if state.log_history else {}):
            for name, value in figures.items():
                target.setdefault(name, value)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the evaluation's loss."""
        if state.is_world_process_zero and metrics and "eval_loss" in metrics:
            self._flush()
            self.monitor.record_evaluation(float(metrics["eval_loss"]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the epoch and write the files."""
        if not state.is_world_process_zero:
            return
        self._flush()
        self.monitor.close()
        if self.report and self.monitor.folder is not None and self.monitor.batches:
            self.monitor.export_json()
            self.monitor.generate_report()

    # ---- records ---------------------------------------------------------------------------
    @property
    def _tells_steps(self) -> bool:
        return hasattr(self._trainer, "last_step")

    def _read(self) -> MemoryReading:
        if self._backend is None:
            from vlmpack.memory.device import default_backend

            self._backend = default_backend()
        reading = self._backend.read()
        self._backend.reset_peak()
        return reading

    def _measured(self, step: int, told: StepSummary) -> BatchMetrics:
        """Return what is known of a step without waiting for the device."""
        reading = self._read()
        # A trainer that measures each micro-batch resets the peak in between.
        guardian = getattr(self._trainer, "guardian", None)
        peak = max(reading.peak, guardian.take_peak() if guardian is not None else 0)
        normalizer = getattr(self._trainer, "batch_size_normalizer", None)
        balancing = getattr(self._trainer, "balancing", None)
        return BatchMetrics(
            step=step,
            epoch=told.epoch,
            loss=math.nan,
            task_types=dict(told.task_samples),
            task_weights=balancing.weights if balancing is not None else {},
            task_grad_norms=dict(balancing.grad_norms) if balancing is not None else {},
            allocated_bytes=reading.allocated,
            reserved_bytes=reading.reserved,
            peak_bytes=peak,
            seconds=time.perf_counter() - self._since,
            num_samples=told.num_samples,
            num_tokens=told.num_tokens,
            num_micro_batches=told.report.num_micro_batches,
            num_ooms=told.report.num_attempts - 1,
            learning_rate=self._rate,
            lr_scale=normalizer.lr_scale(told.num_samples) if normalizer is not None else None,
        )

    def _left_out(self, step: int) -> BatchMetrics:
        """Return the record of a step without a finite loss."""
        plan = getattr(self._trainer, "step_plan", None)
        before = self.monitor.batches[-1].epoch if self.monitor.batches else 0
        return BatchMetrics(
            step=step,
            epoch=before if plan is None else plan.epoch_of(step - 1),
            loss=math.nan,
            num_samples=0 if plan is None else len(plan.step(step - 1)),
            seconds=time.perf_counter() - self._since,
            learning_rate=self._rate,
        )

    def _flush(self, *, grad_norm: float | None = None) -> None:
        """Record the step that waits."""
        if self._waiting is None:
            return
        step, told, metrics = self._waiting
        self._waiting = None
        self.monitor.record_batch(
            replace(
                metrics,
                loss=float(told.loss),
                task_losses={task: float(loss) for task, loss in told.task_losses.items()},
                grad_norm=grad_norm,
            )
        )
        self._last_step = step

    def _since_last_log(
        self, args: TrainingArguments, state: TrainerState, logs: dict[str, float]
    ) -> BatchMetrics:
        reading = self._read()
        steps = state.global_step - self._last_step
        each = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return BatchMetrics(
            step=state.global_step,
            epoch=self._epoch,
            loss=float(logs["loss"]),
            allocated_bytes=reading.allocated,
            reserved_bytes=reading.reserved,
            peak_bytes=reading.peak,
            seconds=time.perf_counter() - self._since,
            num_samples=steps * each,
            grad_norm=logs.get("grad_norm"),
            learning_rate=logs.get("learning_rate"),
            num_micro_batches=args.gradient_accumulation_steps,
        )
