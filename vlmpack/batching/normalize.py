"""Normalise: what a batch of another size changes in gradient, loss and learning rate, and what it does not.

The reference document scales three quantities: the gradient by base / current, the learning rate by
sqrt(current / base) and the loss by target / (current * accumulation). Each is right alone, for one way of
computing the loss. Together they multiply the update by sqrt(base / current) * target / (current *
accumulation): with the step held at 32 samples, micro-batches of 4, 8, 16 and 32 give 2.0, 1.41, 1.0 and
0.71, so that the split changes the training. Here one rule acts on each quantity:

    loss            divided by what the whole step holds (tokens or samples): no further scale
    gradient        follows the loss: no further scale
    learning rate   one rule of the step's size: none, sqrt, linear, adascale or seesaw
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from vlmpack.errors import ConfigError
from vlmpack.memory.monitor import GradientAccumulationScheduler

LRRule: TypeAlias = Literal["none", "sqrt", "linear", "adascale", "seesaw"]
"""How the learning rate follows the size of the step."""

NormalizationMode: TypeAlias = Literal["step", "legacy_stack"]
"""One rule a quantity, or the reference document's three at once."""

BASE_BATCH_SIZE: Final = 16
TARGET_BATCH_SIZE: Final = 32
BASE_LR: Final = 5e-5


def gradient_scale(base_batch_size: float, current_batch_size: float) -> float:
    """Return base / current: what the document multiplies gradients by.

    Right for a loss that is *summed* over the batch and divided by the fixed base alone.

    Args:
        base_batch_size: Samples for which the settings were chosen.
        current_batch_size: Samples of this batch.

    Raises:
        ConfigError: If a size is not positive.
    """
    _check_sizes(base_batch_size=base_batch_size, current_batch_size=current_batch_size)
    return base_batch_size / current_batch_size


def scaled_lr(base_lr: float, current_batch_size: float, base_batch_size: float) -> float:
    """Return base_lr * sqrt(current / base), which suits optimizers of Adam's kind.

    Args:
        base_lr: Learning rate for the base size.
        current_batch_size: Samples of this step.
        base_batch_size: Samples for which `base_lr` was chosen.

    Raises:
        ConfigError: If a size is not positive.
    """
    _check_sizes(current_batch_size=current_batch_size, base_batch_size=base_batch_size)
    return base_lr * math.sqrt(current_batch_size / base_batch_size)


def loss_scale(target_batch_size: float, current_batch_size: float, accumulation_steps: int) -> float:
    """Return target / (current * accumulation): what the document multiplies the loss by.

    Right for micro-batches whose mean losses are added up while the step misses its target; 1 where
    current * accumulation is the target.

    Args:
        target_batch_size: Samples that a step should have.
        current_batch_size: Samples of a micro-batch.
        accumulation_steps: Micro-batches of the step.

    Raises:
        ConfigError: If a number is not positive.
    """
    _check_sizes(
        target_batch_size=target_batch_size,
        current_batch_size=current_batch_size,
        accumulation_steps=accumulation_steps,
    )
    return target_batch_size / (current_batch_size * accumulation_steps)


def adascale_gain(ratio: float, noise_scale: float, base_batch_size: float) -> float:
    """Return AdaScale's gain for a step of `ratio` times the base size: between 1 and `ratio`.

    gain = (sigma^2 + mu^2) / (sigma^2 / ratio + mu^2), where sigma^2 is the variance of the gradient of a
    base batch and mu^2 the squared norm of the true gradient (Johnson et al., "AdaScale SGD", 2020, eq. 4).
    Their quotient is noise_scale / base_batch_size, so that pure noise gives `ratio` (the linear rule) and
    no noise gives 1.

    Args:
        ratio: Step's samples / base's samples.
        noise_scale: Trace of one sample's gradient covariance / squared norm of the gradient, in samples.
        base_batch_size: Samples of the base.

    Raises:
        ConfigError: If a number is out of its range.
    """
    _check_sizes(ratio=ratio, base_batch_size=base_batch_size)
    if math.isnan(noise_scale) or noise_scale < 0:
        raise ConfigError(f"noise_scale must not be negative, got {noise_scale}")
    if math.isinf(noise_scale):
        return ratio
    quotient = noise_scale / base_batch_size
    return (quotient + 1) / (quotient / ratio + 1)


def seesaw_batch_size(base_batch_size: int, lr_ratio: float) -> int:
    """Return how far Seesaw grows the step where a schedule would have let the learning rate fall.

    Where the schedule divides the learning rate by a, Seesaw multiplies the step by a and divides the
    learning rate by sqrt(a) only (Meterez et al., "Seesaw", 2025). The second half is the sqrt rule applied
    to the scheduled rate: base(t) * sqrt(a) = base(0) / a * sqrt(a).

    Args:
        base_batch_size: Samples of the step at the schedule's highest rate.
        lr_ratio: Scheduled rate / highest rate, over 0, at most 1.

    Raises:
        ConfigError: If a number is out of its range.
    """
    _check_sizes(base_batch_size=base_batch_size)
    if not 0 < lr_ratio <= 1:
        raise ConfigError(f"lr_ratio is the share of the highest rate, 0 < ratio <= 1, got {lr_ratio}")
    return max(base_batch_size, round(base_batch_size / lr_ratio))


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """What a step of a given size is multiplied by."""

    gradient_scale: float
    """For gradients, after they are summed."""
    lr: float
    """The learning rate."""
    lr_scale: float
    """`lr` / the base rate."""
    loss_scale: float
    """For the loss of each micro-batch."""


class EffectiveBatchSizeNormalizer:
    """Keeps steps of different sizes comparable: one rule for each quantity.

    `mode="step"` expects a loss that is divided by what the whole step holds, as `DynamicBatchingTrainer`
    computes it; gradient and loss are then left alone, and the learning rate follows the *step's* size by
    `lr_rule`. `mode="legacy_stack"` applies the document's three formulas at once and warns.

    Args:
        base_batch_size: Samples for which `base_lr` was chosen.
        target_batch_size: Samples that a step should have.
        base_lr: Learning rate for the base size.
        lr_rule: "sqrt" for optimizers of Adam's kind, "linear" for SGD, "adascale" with measured gradient
            noise, "seesaw" (sqrt, for steps that grow by `seesaw_batch_size`), or "none".
        mode: "step" or "legacy_stack".

    Raises:
        ConfigError: If a setting is invalid.
    """

    def __init__(
        self,
        base_batch_size: int = BASE_BATCH_SIZE,
        target_batch_size: int = TARGET_BATCH_SIZE,
        base_lr: float = BASE_LR,
        *,
        lr_rule: LRRule = "sqrt",
        mode: NormalizationMode = "step",
    ) -> None:
        _check_sizes(base_batch_size=base_batch_size, target_batch_size=target_batch_size, base_lr=base_lr)
        if lr_rule not in get_args(LRRule):
            raise ConfigError(f"lr_rule must be one of {get_args(LRRule)}, got {lr_rule!r}")
        if mode not in get_args(NormalizationMode):
            raise ConfigError(f"mode must be one of {get_args(NormalizationMode)}, got {mode!r}")
        self.base_batch_size = base_batch_size
        self.target_batch_size = target_batch_size
        self.base_lr = base_lr
        self.lr_rule: LRRule = lr_rule
        self.mode: NormalizationMode = mode
        self.noise_scale: float | None = None
        """In samples; what "adascale" goes by. `GradientNoiseScale` measures it."""
        if mode == "legacy_stack":
            warnings.warn(
                "legacy_stack scales gradient, loss and learning rate at once: the update then depends on "
                "how a step is split; mode='step' does not have this fault",
                UserWarning,
                stacklevel=2,
            )

    def gradient_scale(self, current_batch_size: float) -> float:
        """Return base / current, as documented, whatever the mode."""
        return gradient_scale(self.base_batch_size, current_batch_size)

    def scaled_lr(self, current_batch_size: float) -> float:
        """Return base_lr * sqrt(current / base), as documented, whatever the mode and rule."""
        return scaled_lr(self.base_lr, current_batch_size, self.base_batch_size)

    def loss_scale(self, current_batch_size: float, accumulation_steps: int = 1) -> float:
        """Return target / (current * accumulation), as documented, whatever the mode."""
        return loss_scale(self.target_batch_size, current_batch_size, accumulation_steps)

    def batch_size_scale(self, batch_size: float) -> float:
        """Return batch size / base: the document's "effective batch size scale"."""
        _check_sizes(batch_size=batch_size)
        return batch_size / self.base_batch_size

    def lr_scale(self, step_size: float) -> float:
        """Return what the scheduled learning rate is multiplied by for a step of this size.

        Args:
            step_size: Samples of the whole step, over all micro-batches and ranks.

        Raises:
            ConfigError: If the size is not positive.
        """
        ratio = self.batch_size_scale(step_size)
        if self.lr_rule == "none":
            return 1.0
        if self.lr_rule == "linear":
            return ratio
        if self.lr_rule == "adascale":
            # Before anything is measured, the careful end of the range between 1 and the ratio.
            return adascale_gain(ratio, self.noise_scale or 0.0, self.base_batch_size)
        return math.sqrt(ratio)

    def apply(self, current_batch_size: float, accumulation_steps: int = 1) -> Normalization:
        """Return what a step of `accumulation_steps` micro-batches of `current_batch_size` is multiplied by.

        Args:
            current_batch_size: Samples of a micro-batch; or their mean, where they differ.
            accumulation_steps: Micro-batches of the step.

        Raises:
            ConfigError: If a number is not positive.
        """
        _check_sizes(current_batch_size=current_batch_size, accumulation_steps=accumulation_steps)
        if self.mode == "legacy_stack":
            lr = self.scaled_lr(current_batch_size)
            return Normalization(
                gradient_scale=self.gradient_scale(current_batch_size),
                lr=lr,
                lr_scale=lr / self.base_lr,
                loss_scale=self.loss_scale(current_batch_size, accumulation_steps),
            )
        scale = self.lr_scale(current_batch_size * accumulation_steps)
        return Normalization(gradient_scale=1.0, lr=self.base_lr * scale, lr_scale=scale, loss_scale=1.0)

    def accumulation_steps(self, micro_batch_size: int) -> int:
        """Return how many micro-batches make the target, the last one possibly smaller."""
        return len(self.micro_batches(micro_batch_size))

    def micro_batches(self, micro_batch_size: int) -> tuple[int, ...]:
        """Return the samples of each micro-batch; they add up to the target exactly.

        Args:
            micro_batch_size: Most samples of one.

        Raises:
            ConfigError: If it is not positive.
        """
        return GradientAccumulationScheduler(
            target_effective_batch_size=self.target_batch_size, max_micro_batch=micro_batch_size
        ).micro_batches()


def _check_sizes(**sizes: float) -> None:
    for name, value in sizes.items():
        if not value > 0 or math.isinf(value):
            raise ConfigError(f"{name} must be positive and finite, got {value!r}")
