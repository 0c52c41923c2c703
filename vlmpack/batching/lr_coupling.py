"""Couple the learning rate to the size of each step, under any scheduler, without touching the scheduler.

The rate is multiplied just before the optimizer steps and restored right after, so that the scheduler never
sees it: its state, what it logs and a resumed run are those of a fixed batch size. The Trainer clips
gradients before, on the mean of the whole step, so that clipping does not depend on the split either.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, get_scheduler

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from vlmpack.batching.normalize import EffectiveBatchSizeNormalizer

Rates = list[float | torch.Tensor]
"""The learning rate of each parameter group."""


@contextmanager
def scaled_learning_rate(optimizer: Optimizer, scale: float) -> Iterator[None]:
    """Multiply every group's learning rate while the block runs; restored to the bit, after errors too.

    Args:
        optimizer: Its `step` is called inside the block.
        scale: What the rates are multiplied by.
    """
    rates = _multiply(optimizer, scale)
    try:
        yield
    finally:
        _restore(optimizer, rates)


def _multiply(optimizer: Optimizer, scale: float) -> Rates:
    rates: Rates = []
    for group in optimizer.param_groups:
        rate = group["lr"]
        if isinstance(rate, torch.Tensor):  # captured in a CUDA graph or compiled: the tensor must stay
            rates.append(rate.clone())
            rate.mul_(scale)
        else:
            rates.append(rate)
            group["lr"] = rate * scale
    return rates


def _restore(optimizer: Optimizer, rates: Rates) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, torch.Tensor):
            group["lr"].copy_(rate)
        else:
            group["lr"] = rate


class BatchLRCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Multiplies a Trainer's learning rate by s(size of the step), for the optimizer's step alone.

    The logged `learning_rate` stays the scheduled one; `lr_scale` stands beside it where the callback was
    added by `attach`.

    Args:
        normalizer: Says s.
        step_size: Returns the samples of the step that is about to be taken, over all ranks.
    """

    def __init__(self, normalizer: EffectiveBatchSizeNormalizer, step_size: Callable[[], float]) -> None:
        self.normalizer = normalizer
        self.step_size = step_size
        self.lr_scale = 1.0
        """Of the latest step."""
        self._pending: tuple[Optimizer, Rates] | None = None

    def attach(self, trainer: Trainer) -> None:
        """Add this callback in front of all others, so that loggers see `lr_scale` too."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Multiply the rates.

        Raises:
            ConfigError: If there is no optimizer, which is so under DeepSpeed with its own one.
        """
        if optimizer is None:
            raise ConfigError("the learning rate cannot follow the batch size: the Trainer has no optimizer")
        self._undo()  # an optimizer step that raised left its rates multiplied
        self.lr_scale = self.normalizer.lr_scale(self.step_size())
        self._pending = (optimizer, _multiply(optimizer, self.lr_scale))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the rates."""
        self._undo()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put `lr_scale` beside the learning rate."""
        if logs is not None and "learning_rate" in logs:
            logs["lr_scale"] = self.lr_scale
            if state.log_history and "learning_rate" in state.log_history[-1]:
                state.log_history[-1]["lr_scale"] = self.lr_scale

    def _undo(self) -> None:
        if self._pending is not None:
            _restore(*self._pending)
            self._pending = None


def sample_counted_schedule(
    optimizer: Optimizer,
    name: str,
    *,
    samples_at: Callable[[int], int],
    total_samples: int,
    warmup_samples: int = 0,
    **specific: object,
) -> LambdaLR:
    """Return one of transformers' schedules whose progress is samples seen, not steps taken.

    Steps of different sizes then move the schedule by what they learnt from, and it reaches its end with
    the last sample, exactly. Its state is the step alone, so resuming needs nothing else.

    Args:
        optimizer: Whose rates are scheduled.
        name: As for `transformers.get_scheduler`: "linear", "cosine", "polynomial", ...
        samples_at: Samples seen after so many steps; what a plan of the steps knows in advance.
        total_samples: Samples of the whole run.
        warmup_samples: Samples over which the rate rises.
        **specific: What this schedule takes besides, for example `num_cycles`.

    Raises:
        ConfigError: If a number is out of its range, or the schedule is no function of its progress.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if total_samples < 1 or not 0 <= warmup_samples <= total_samples:
        raise ConfigError(
            f"a schedule needs 0 <= warmup_samples <= total_samples and a sample, got {warmup_samples} and "
            f"{total_samples}"
        )
    if samples_at(0) != 0:
        raise ConfigError(f"before the first step no sample was seen, but samples_at(0) is {samples_at(0)}")
    # The schedule is made for an optimizer of its own: making it sets that one's rates.
    probe = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optimizer.param_groups[0]["lr"])
    by_samples = get_scheduler(
        name,
        probe,
        num_warmup_steps=warmup_samples,
        num_training_steps=total_samples,
        scheduler_specific_kwargs=specific or None,
    )
    if not isinstance(by_samples, LambdaLR):
        raise ConfigError(f"the schedule {name!r} is no function of its progress, so it cannot count samples")
    factor = by_samples.lr_lambdas[0]
    return LambdaLR(optimizer, lambda step: factor(samples_at(step)))
