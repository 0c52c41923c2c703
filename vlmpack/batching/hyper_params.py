"""The settings of a run with a batch-size schedule, in the documented form, and what they build."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vlmpack.batching.schedule import BatchSizeScheduler
from vlmpack.batching.schedule_config import BatchSizeConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    import torch
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", validate_assignment=True)


class LearningRateConfig(_Settings):
    """Learning rates by parameter group; a group without one of its own has `lr_nn`."""

    lr_nn: float = Field(1e-3, gt=0, description="learning rate of the network")
    lr_regression: float | None = Field(None, gt=0, description='learning rate of the group "regression"')

    def of_group(self, name: str) -> float:
        """Return the learning rate of a group.

        Args:
            name: "regression", or anything else for the network.
        """
        return self.lr_regression if name == "regression" and self.lr_regression is not None else self.lr_nn


class ExponentialLRConfig(_Settings):
    """Multiply the learning rate by `gamma` after every epoch."""

    type: Literal["exponential"] = "exponential"
    gamma: float = Field(gt=0, le=1, description="factor an epoch")

    def factor(self, epoch: float) -> float:
        """Return what the rate is multiplied by.

        Args:
            epoch: From 0; fractions within an epoch.
        """
        return float(self.gamma**epoch)


class WarmupCosineConfig(_Settings):
    """Rise for `warmup_epochs`, then fall along half a cosine until `T_max` epochs; then 0."""

    type: Literal["warmup_cosine"] = "warmup_cosine"
    warmup_epochs: int = Field(ge=0, description="epochs of the rise")
    T_max: int = Field(gt=0, description="epochs from the beginning until the rate is 0")

    @model_validator(mode="after")
    def _rises_before_it_falls(self) -> WarmupCosineConfig:
        if self.warmup_epochs >= self.T_max:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be below T_max {self.T_max}")
        return self

    def factor(self, epoch: float) -> float:
        """Return what the rate is multiplied by.

        Args:
            epoch: From 0; fractions within an epoch.
        """
        if epoch < self.warmup_epochs:
            return (epoch + 1) / (self.warmup_epochs + 1)
        share = min((epoch - self.warmup_epochs) / (self.T_max - self.warmup_epochs), 1.0)
        return (1 + math.cos(math.pi * share)) / 2


LRScheduleConfig: TypeAlias = Annotated[ExponentialLRConfig | WarmupCosineConfig, Field(discriminator="type")]
"""Any learning-rate schedule, told apart by `type`."""


class OptimizerConfig(_Settings):
    """Optimizer, learning rates, and a schedule for each parameter group."""

    name: Literal["adamw", "adam", "sgd"] = Field("adamw", description="which optimizer")
    lr: LearningRateConfig = Field(default_factory=LearningRateConfig, description="learning rates")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for AdamW")
    momentum: float = Field(0.0, ge=0, lt=1, description="for SGD")
    scheduler_nn: LRScheduleConfig | None = Field(None, description="of the network's learning rate")
    scheduler_regression: LRScheduleConfig | None = Field(None, description='of the group "regression"')

    def build(self, groups: Mapping[str, Iterable[torch.nn.Parameter]]) -> Optimizer:
        """Return the optimizer.

        Args:
            groups: Parameters by group: "nn", and "regression" where it has settings of its own.
        """
        from torch import optim

        params = [
            {"params": list(parameters), "lr": self.lr.of_group(name), "name": name}
            for name, parameters in groups.items()
        ]
        options: dict[str, Any] = {"weight_decay": self.weight_decay}
        if self.name == "sgd":
            return optim.SGD(params, momentum=self.momentum, **options)
        return (optim.AdamW if self.name == "adamw" else optim.Adam)(params, **options)

    def build_schedule(self, optimizer: Optimizer, epoch_of: Callable[[int], float]) -> LambdaLR:
        """Return the learning-rate schedule, stepped once a step.

        Args:
            optimizer: From `build`.
            epoch_of: Epochs, with fractions, after so many steps. Counted in samples it is right for any
                batch size: `lambda step: plan.samples_at(step) / num_samples` with a `BatchSizePlan`.
        """
        from torch.optim.lr_scheduler import LambdaLR

        def of(config: ExponentialLRConfig | WarmupCosineConfig | None) -> Callable[[int], float]:
            return lambda step: 1.0 if config is None else config.factor(epoch_of(step))

        return LambdaLR(
            optimizer,
            [
                of(self.scheduler_regression if group.get("name") == "regression" else self.scheduler_nn)
                for group in optimizer.param_groups
            ],
        )


class TrainingHyperParams(_Settings):
    """Epochs, batch size and its schedule, shuffling, optimizer."""

    epochs: int = Field(gt=0, description="passes over the data")
    batch_size: int = Field(gt=0, description="samples a step, at the beginning")
    batch_size_scheduler: BatchSizeConfig | None = Field(None, description="constant without one")
    optimizer_config: OptimizerConfig = Field(default_factory=OptimizerConfig, description="how to step")
    shuffle: bool = Field(True, description="a new order each epoch")

    def build_scheduler(self, **options: Any) -> BatchSizeScheduler | None:
        """Return the batch-size scheduler, or None where the size is constant.

        Args:
            **options: For `BatchSizeScheduler`, such as max_rows.
        """
        if self.batch_size_scheduler is None:
            return None
        return BatchSizeScheduler(self.batch_size_scheduler, self.batch_size, **options)
