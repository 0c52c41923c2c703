"""The whole training of mixed tasks from one config: components, model, loaders, run, report.

config ---> predictor, guardian, monitor                        at construction
model  ---> gradient checkpointing                              at construction
data   ---> trainer: plan, normalizer, balancing of its tasks   at `train`
run    ---> metrics.jsonl, metrics.json, report.html            in output_dir
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback

from vlmpack.batching.callbacks import MemorySafetyCallback
from vlmpack.batching.checkpointing import GradientCheckpointManager
from vlmpack.batching.collate import HeterogeneousCollator
from vlmpack.batching.guardian import OOMGuardian
from vlmpack.batching.monitor import DynamicBatchingMonitor
from vlmpack.batching.monitor_callback import MonitorCallback
from vlmpack.batching.records import SupportsSampleMetadata
from vlmpack.batching.sampler import MemoryAwareBatchSampler
from vlmpack.batching.task_gradients import TaskBalancing, TaskGradients, last_shared_block
from vlmpack.batching.trainer import DynamicBatchingTrainer
from vlmpack.errors import ConfigError
from vlmpack.memory.linear_cost import GB, TASK_MULTIPLIERS
from vlmpack.memory.predictor import MemoryPredictor

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from vlmpack.batching.config import HeterogeneousTrainingConfig
    from vlmpack.batching.metrics import EpochMetrics
    from vlmpack.batching.surgery import GradientSurgery
    from vlmpack.memory.device import MemoryBackend


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """What a run came to."""

    global_step: int
    """Optimizer steps taken, earlier processes of a resumed run included."""
    training_loss: float
    """Mean loss, as the Trainer counts it."""
    metrics: dict[str, float] = field(repr=False)
    """The Trainer's own figures."""
    eval_metrics: dict[str, float] = field(repr=False)
    """Of the last evaluation; empty without an evaluation data set."""
    epochs: tuple[EpochMetrics, ...] = field(repr=False)
    """What each epoch did."""
    report: Path
    """The HTML report."""
    metrics_file: Path
    """Everything that was recorded, as JSON."""


class DynamicBatchingTrainingPipeline:
    """Trains a model on mixed tasks, and leaves a report.

    Args:
        config: Every setting.
        model: Of transformers, or any module that takes a batch by keyword and returns a loss.
        tokenizer: For the collator; None where samples are tokenised already and `collator` is given.
        collator: Makes a micro-batch of samples; None: a `HeterogeneousCollator` of the tokenizer.
        memory_predictor: What batches cost; None: the documented formula for the tasks T1, T2 and T3, and
            for other tasks nothing, so that limits are learnt from failures.
        backend: The device whose memory is watched; None: the GPU where there is one.
        callbacks: For the Trainer, besides the monitor's.
        title: Of the report.
        quiet: No progress bar and no printed log; for a caller who shows progress otherwise.

    Raises:
        ConfigError: If settings contradict each other.
    """

    def __init__(
        self,
        config: HeterogeneousTrainingConfig,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        collator: Any = None,
        memory_predictor: MemoryPredictor | None = None,
        backend: MemoryBackend | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        title: str = "Training of mixed tasks",
        quiet: bool = False,
    ) -> None:
        if collator is None and tokenizer is None:
            raise ConfigError("give a tokenizer, which pads and tokenises, or a collator")
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.collator = collator
        self.backend = backend
        self.callbacks = list(callbacks)
        self.quiet = quiet
        self.predictor = memory_predictor
        if memory_predictor is None and set(config.task_types) <= set(TASK_MULTIPLIERS):
            self.predictor = MemoryPredictor()
        self.guardian = OOMGuardian(
            self.predictor,
            memory_margin_percent=config.memory_margin_percent,
            backend=backend,
            single_sample=config.safety.single_sample,
        )
        self.monitor = DynamicBatchingMonitor(
            Path(config.output_dir),
            title=title,
            limit_bytes=config.max_memory_mb * 1e-3 * GB,
            settings=config.model_dump(),
        )
        self.trainer: DynamicBatchingTrainer | None = None
        """The trainer of the latest run."""
        self.prepare_model()

    def prepare_model(self) -> None:
        """Turn gradient checkpointing on, if the settings say so."""
        if self.config.enable_gradient_checkpointing:
            GradientCheckpointManager.enable_gradient_checkpointing(self.model)

    def build_trainer(self, train_dataset: Any, eval_dataset: Any = None) -> DynamicBatchingTrainer:
        """Connect everything for these data.

        Args:
            train_dataset: Map-style; with `get_sample_metadata` its steps are planned by memory.
            eval_dataset: For an evaluation after each epoch; None: none.

        Raises:
            ConfigError: If the data have tasks that settings do not fit.
        """
        tasks = self._tasks(train_dataset)
        balancing = self._balancing(tasks)
        weights = {task: self.config.task_loss_weights.get(task, 1.0) for task in tasks}
        arguments = self.config.to_training_arguments(
            eval_strategy="no" if eval_dataset is None else "epoch",
            per_device_eval_batch_size=self.config.base_batch_size,
            activation_checkpointing=False,  # done, for models that the Trainer cannot do it for too
            disable_tqdm=self.quiet,
        )
        collator = self.collator
        if collator is None:
            collator = HeterogeneousCollator(tokenizer=self.tokenizer, tasks=tasks)
        trainer = DynamicBatchingTrainer(
            model=self.model,
            args=arguments,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            oom_guardian=self.guardian,
            memory_predictor=self.predictor,
            batch_size_normalizer=self.config.normalizer(arguments.world_size),
            task_loss_weights=weights if balancing is None else None,
            balancing=balancing,
            non_finite=self.config.safety.non_finite,
            batch_sampler=self._sampler(train_dataset, arguments.world_size),
            callbacks=[*self.callbacks, self._safety()],
        )
        if self.quiet:
            trainer.remove_callback(PrinterCallback)
        MonitorCallback(self.monitor, backend=self.backend).attach(trainer)
        self.trainer = trainer
        return trainer

    def create_dataloaders(self, train_dataset: Any, eval_dataset: Any = None) -> tuple[Any, Any]:
        """Return the loaders that `train` would use: steps that are not collated yet, and evaluation batches.

        Args:
            train_dataset: As for `train`.
            eval_dataset: As for `train`; its loader is None without one.
        """
        trainer = self.build_trainer(train_dataset, eval_dataset)
        evaluating = None if eval_dataset is None else trainer.get_eval_dataloader()
        return trainer.get_train_dataloader(), evaluating

    def train(
        self,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        resume_from_checkpoint: str | bool | None = None,
    ) -> TrainingResult:
        """Train, evaluate after each epoch, and write metrics and the report.

        Args:
            train_dataset: Map-style; with `get_sample_metadata` its steps are planned by memory.
            eval_dataset: None: no evaluation.
            resume_from_checkpoint: A checkpoint's folder, or True for the latest one.
        """
        trainer = self.build_trainer(train_dataset, eval_dataset)
        output = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        folder = Path(self.config.output_dir)
        evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
        return TrainingResult(
            global_step=output.global_step,
            training_loss=output.training_loss,
            metrics=dict(output.metrics),
            eval_metrics=dict(evaluated[-1]) if evaluated else {},
            epochs=tuple(self.monitor.epochs),
            report=folder / "report.html",
            metrics_file=folder / "metrics.json",
        )

    def _sampler(self, dataset: Any, num_devices: int) -> MemoryAwareBatchSampler | None:
        """Return what makes steps by memory, or None where it is not known what samples cost."""
        if self.predictor is None or not isinstance(dataset, SupportsSampleMetadata):
            return None
        parts = self.config.num_micro_batches * num_devices
        return MemoryAwareBatchSampler(
            dataset,
            self.config.base_batch_size * parts,
            self.config.max_memory_mb * parts,
            memory_predictor=self.predictor,
            diversity_weight=self.config.diversity_weight,
            memory_margin_percent=self.config.memory_margin_percent,
            seed=self.config.seed,
        )

    def _safety(self) -> MemorySafetyCallback:
        safety = self.config.safety
        return MemorySafetyCallback(
            self.guardian, interval=safety.interval, warn_at=safety.warn_at, backend=self.backend
        )

    def _tasks(self, dataset: Any) -> tuple[str, ...]:
        """Return the tasks of the data in the settings' order; all of the settings if the data do not say."""
        if not isinstance(dataset, SupportsSampleMetadata):
            return self.config.task_types
        found = {dataset.get_sample_metadata(index)["task_type"] for index in range(len(dataset))}
        known = [task for task in self.config.task_types if task in found]
        return (*known, *sorted(found - set(known)))

    def _balancing(self, tasks: tuple[str, ...]) -> TaskBalancing | None:
        surgery = self._surgery()
        balancer = self.config.balancer(tasks)
        if (balancer is None and surgery is None) or len(tasks) < 2:
            return None
        shared = last_shared_block(self.model) if surgery is None else None
        return TaskBalancing(
            TaskGradients(self.model.parameters(), tasks, shared=shared),
            balancer=balancer,
            surgery=surgery,
            weights=self.config.task_loss_weights,
        )

    def _surgery(self) -> GradientSurgery | None:
        from vlmpack.batching.surgery import GradVac, PCGrad

        if self.config.gradient_surgery == "pcgrad":
            return PCGrad(seed=self.config.seed)
        if self.config.gradient_surgery == "gradvac":
            return GradVac(seed=self.config.seed)
        return None
