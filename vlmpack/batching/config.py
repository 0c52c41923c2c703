"""Settings of a heterogeneous training run: strict, assignable, and turned into others' settings here alone.

config = HeterogeneousTrainingConfig()            the documented defaults
config.num_epochs = 3                             checked at once
config = HeterogeneousTrainingConfig.for_memory(24)
arguments = config.to_training_arguments("out")   for any transformers Trainer
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vlmpack.batching.balance import BalanceRule, GradNormBalancer
from vlmpack.batching.normalize import EffectiveBatchSizeNormalizer, LRRule, NormalizationMode
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import TrainingArguments

Surgery: TypeAlias = Literal["none", "pcgrad", "gradvac"]
"""What to do about tasks whose gradients point against each other."""
MemoryClass: TypeAlias = Literal["limited", "moderate", "high"]
"""How much memory a preset is for: 15 to 20, 25 to 30, from 40 GB on."""


def _fraction(value: float) -> float:
    if 1 <= value < 100:
        raise ValueError(
            f"a fraction is meant, 0 <= margin < 1: {value:g} percent is {value / 100:g}. A larger margin is "
            "safer"
        )
    if not 0 <= value < 1:
        raise ValueError(f"a fraction is meant, 0 <= margin < 1, got {value:g}")
    return value


def _distribution(shares: dict[str, float]) -> dict[str, float]:
    if not shares or any(not share >= 0 for share in shares.values()):
        raise ValueError(f"shares of at least one task are needed, none negative, got {shares}")
    if not math.isclose(math.fsum(shares.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"shares must add up to 1, they add up to {math.fsum(shares.values()):g}: {shares}")
    return shares


def _weights(weights: dict[str, float]) -> dict[str, float]:
    if any(not 0 <= weight < math.inf for weight in weights.values()):
        raise ValueError(f"loss weights must not be negative, got {weights}")
    return weights


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Margin = Annotated[float, AfterValidator(_fraction)]


class _Settings(BaseModel):
    """Strict, without unknown names, checked at every assignment."""

    model_config = ConfigDict(strict=True, extra="forbid", validate_assignment=True)


class SafetyConfig(_Settings):
    """What happens when memory runs out, or a loss is not finite."""

    single_sample: Literal["raise", "checkpoint_then_retry", "isolate_and_report"] = Field(
        "raise", description="for a sample that does not fit alone"
    )
    non_finite: Literal["raise", "skip_step"] = Field("raise", description="for a loss that is not finite")
    warn_at: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="share of the device's memory from which a warning is logged"
    )
    interval: int = Field(10, gt=0, description="steps between two looks at memory")


class NormalizationConfig(_Settings):
    """How steps of different sizes are made comparable."""

    lr_rule: LRRule = Field("sqrt", description="how the learning rate follows the size of a step")
    mode: NormalizationMode = Field(
        "step", description="one rule a quantity, or the document's three at once"
    )
    base_batch_size: int | None = Field(
        None, gt=0, description="samples for which learning_rate was chosen; None: those of a full step"
    )


class HeterogeneousTrainingConfig(_Settings):
    """Everything that a run with mixed tasks is set up with.

    `memory_margin_percent` has its documented name, but is a fraction: 0.15 leaves 15 % free.
    """

    # ---- model and run
    output_dir: str = Field("heterogeneous-training", description="folder of checkpoints, metrics, report")
    num_epochs: int = Field(3, gt=0, description="passes over the data")
    learning_rate: Positive = Field(5e-5, description="for steps of the base size")
    lr_scheduler_type: str = Field("linear", description="any schedule of transformers")
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the steps over which the rate rises"
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="clip gradients to this; 0 does not"
    )
    bf16: bool = Field(False, description="compute in bfloat16")
    seed: int = Field(0, ge=0, description="decides order, weights and dropout")

    # ---- batches
    base_batch_size: int = Field(16, gt=0, description="samples of a micro-batch at most")
    use_gradient_accumulation: bool = Field(True, description="let a step have several micro-batches")
    gradient_accumulation_steps: int = Field(4, gt=0, description="micro-batches of a full step")
    diversity_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="mix tasks (1) or fill memory (0) when a batch is chosen"
    )

    # ---- memory
    max_memory_mb: Positive = Field(20000.0, description="what the device has, in MB of 10^6 bytes")
    memory_margin_percent: Margin = Field(0.15, description="share of it that is left free, a fraction")
    enable_gradient_checkpointing: bool = Field(False, description="compute activations twice to keep fewer")
    safety: SafetyConfig = Field(default_factory=SafetyConfig)

    # ---- tasks
    task_distribution: Annotated[dict[str, float], AfterValidator(_distribution)] = Field(
        default_factory=lambda: {"T1": 0.5, "T2": 0.25, "T3": 0.25}, description="share of each task"
    )
    task_loss_weights: Annotated[dict[str, float], AfterValidator(_weights)] = Field(
        default_factory=lambda: {"T1": 1.0, "T2": 1.0, "T3": 1.0},
        description="weight of each task's loss, to begin with; tasks that are not named have 1",
    )
    use_grad_norm_balancing: bool = Field(True, description="move the weights by the tasks' gradients")
    grad_norm_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1.5, description="how strongly; below 2 for the documented rule"
    )
    grad_norm_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="average the tasks' gradient norms over steps; 0 takes the latest step alone"
    )
    balance_rule: BalanceRule = Field("legacy", description="the documented rule or the GradNorm paper's")
    gradient_surgery: Surgery = Field(
        "none", description="what to do about tasks whose gradients point against each other"
    )
    normalization: NormalizationConfig = Field(default_factory=NormalizationConfig)

    # ---- logging and saving
    save_strategy: Literal["no", "epoch"] = Field("epoch", description="when a checkpoint is written")
    logging_steps: int = Field(10, gt=0, description="steps between two lines of the log")
    report_to: list[str] = Field(default_factory=list, description="loggers of transformers, by name")

    @classmethod
    def preset(cls, name: MemoryClass, **settings: Any) -> HeterogeneousTrainingConfig:
        """Return the documented settings for a class of devices.

        Args:
            name: "limited" (15 to 20 GB), "moderate" (25 to 30 GB) or "high" (40 GB and more).
            **settings: What else to set; these win.

        Raises:
            ConfigError: If there is no such class.
        """
        if name not in MEMORY_PRESETS:
            raise ConfigError(f"there is no preset {name!r}; there are {list(MEMORY_PRESETS)}")
        return cls(**{**MEMORY_PRESETS[name], **settings})

    @classmethod
    def for_memory(cls, gpu_memory_gb: float, **settings: Any) -> HeterogeneousTrainingConfig:
        """Return the preset for a device and its size as `max_memory_mb`.

        Between the documented ranges the smaller preset is taken: 24 GB is "limited", 32 GB "moderate".

        Args:
            gpu_memory_gb: In GB of 10^9 bytes.
            **settings: What else to set; these win.

        Raises:
            ConfigError: If the device is smaller than the smallest preset's.
        """
        names = [name for name, least in _LEAST_GB.items() if gpu_memory_gb >= least]
        if not names:
            raise ConfigError(
                f"the presets begin at {_LEAST_GB['limited']:g} GB, got {gpu_memory_gb:g}: "
                "vlmpack.memory.recommend gives a batch size for any device, or says why none fits"
            )
        return cls.preset(names[-1], **{"max_memory_mb": 1000.0 * gpu_memory_gb, **settings})

    # ---- what follows from the settings ----------------------------------------------------
    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a full step."""
        return self.gradient_accumulation_steps if self.use_gradient_accumulation else 1

    @property
    def step_size(self) -> int:
        """Samples of a full step on one device."""
        return self.base_batch_size * self.num_micro_batches

    @property
    def task_types(self) -> tuple[str, ...]:
        """Every task that the settings name, in order."""
        return tuple(dict.fromkeys((*self.task_distribution, *self.task_loss_weights)))

    @property
    def loss_weights(self) -> dict[str, float]:
        """The loss weight of every task, to begin with."""
        return {task: self.task_loss_weights.get(task, 1.0) for task in self.task_types}

    def normalizer(self, num_devices: int = 1) -> EffectiveBatchSizeNormalizer:
        """Return what makes steps of different sizes comparable.

        Args:
            num_devices: That share a step; its size is over all of them.
        """
        given, whole = self.normalization, self.step_size * num_devices
        return EffectiveBatchSizeNormalizer(
            given.base_batch_size or whole,
            whole,
            self.learning_rate,
            lr_rule=given.lr_rule,
            mode=given.mode,
        )

    def balancer(self, task_types: tuple[str, ...] | None = None) -> GradNormBalancer | None:
        """Return what moves the loss weights, or None if nothing should.

        Args:
            task_types: The tasks of the data; None: those that the settings name.

        Raises:
            ConfigError: If the rule does not converge for this alpha, or a weight is zero, from where
                multiplication does not lead back.
        """
        if not self.use_grad_norm_balancing:
            return None
        weights = {task: self.task_loss_weights.get(task, 1.0) for task in task_types or self.task_types}
        return GradNormBalancer(
            tuple(weights),
            self.grad_norm_alpha,
            rule=self.balance_rule,
            norm_decay=self.grad_norm_decay,
            initial_weights=weights,
        )

    def to_training_arguments(self, output_dir: str | Path | None = None, **more: Any) -> TrainingArguments:
        """Return the settings under the names that transformers has for them.

        Args:
            output_dir: Instead of the setting.
            **more: Further arguments of TrainingArguments; these win.
        """
        import torch
        from transformers import TrainingArguments

        known = {field.name for field in fields(TrainingArguments)}
        values: dict[str, Any] = {
            "output_dir": str(output_dir or self.output_dir),
            "num_train_epochs": self.num_epochs,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.lr_scheduler_type,
            "warmup_steps": self.warmup_share,  # below 1 it is a share
            "max_grad_norm": self.max_grad_norm,
            "bf16": self.bf16,
            "seed": self.seed,
            "per_device_train_batch_size": self.base_batch_size,
            "gradient_accumulation_steps": self.num_micro_batches,
            _CHECKPOINTING if _CHECKPOINTING in known else "gradient_checkpointing": (
                self.enable_gradient_checkpointing
            ),
            "logging_steps": self.logging_steps,
            "report_to": self.report_to or "none",
            "save_strategy": self.save_strategy,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "remove_unused_columns": False,  # the tasks are columns that no model knows
            "accelerator_config": {"dispatch_batches": False},  # dispatching cuts packed batches
        }
        return TrainingArguments(**{**values, **more})


MEMORY_PRESETS: Final[Mapping[MemoryClass, Mapping[str, Any]]] = {
    "limited": {
        "base_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "memory_margin_percent": 0.20,
        "enable_gradient_checkpointing": True,
        "use_grad_norm_balancing": True,
    },
    "moderate": {
        "base_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "memory_margin_percent": 0.10,
        "enable_gradient_checkpointing": False,
        "use_grad_norm_balancing": True,
    },
    "high": {
        "base_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "memory_margin_percent": 0.05,
        "enable_gradient_checkpointing": False,
        "use_grad_norm_balancing": True,
    },
}
"""The documented settings; each makes a step of 32 samples."""

_CHECKPOINTING: Final = "activation_checkpointing"
"""Its name since transformers 5.20."""
_LEAST_GB: Final[Mapping[MemoryClass, float]] = {"limited": 15.0, "moderate": 25.0, "high": 40.0}
