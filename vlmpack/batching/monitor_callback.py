"""The monitor on a Trainer: any Trainer for losses and times, `DynamicBatchingTrainer` for everything."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from vlmpack.batching.metrics import BatchMetrics

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from vlmpack.batching.monitor import DynamicBatchingMonitor
    from vlmpack.memory.device import MemoryBackend


class MonitorCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Feeds a monitor from a Trainer's events, and the Trainer's log from the monitor.

    What the Trainer logs goes to its `report_to` loggers with the monitor's figures beside it, if the
    callback was added by `attach`. A `DynamicBatchingTrainer` records its steps itself; with any other
    Trainer a record is made at each log, of the steps since the one before.

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
        self._since = time.perf_counter()
        self._last_step = 0
        self._epoch = 0

    def attach(self, trainer: Trainer) -> None:
        """Add this callback in front of all others, so that loggers see what it adds to the log."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on where the run resumes; a run from the beginning replaces what is in the folder."""
        if state.is_world_process_zero:
            self.monitor.rewind(state.global_step)
        self._last_step = state.global_step
        self._since = time.perf_counter()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note which epoch begins."""
        self._epoch = math.floor((state.epoch or 0.0) + 1e-6)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the steps since the last log, unless the Trainer did; add the figures to the log."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        recorded = self.monitor.batches[-1].step if self.monitor.batches else 0
        if recorded < state.global_step:
            self.monitor.record_batch(self._record(args, state, logs))
        self._last_step, self._since = state.global_step, time.perf_counter()
        figures = self.monitor.latest()
        for target in (logs, state.log_history[-1] if state.log_history else {}):
            for name, value in figures.items():
                target.setdefault(name, value)

    def _record(self, args: TrainingArguments, state: TrainerState, logs: dict[str, float]) -> BatchMetrics:
        if self._backend is None:
            from vlmpack.memory.device import default_backend

            self._backend = default_backend()
        reading = self._backend.read()
        self._backend.reset_peak()
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
            self.monitor.record_evaluation(float(metrics["eval_loss"]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the epoch and write the files."""
        if not state.is_world_process_zero:
            return
        self.monitor.close()
        if self.report and self.monitor.folder is not None and self.monitor.batches:
            self.monitor.export_json()
            self.monitor.generate_report()
