"""Short training runs on packs, and what is read off them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainingArguments

from vlmpack.integrations.transformers import PackedTrainer

if TYPE_CHECKING:
    from pathlib import Path


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step, as the optimizer gets it."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.steps.append(gradient_of(model))


def gradient_of(model: torch.nn.Module) -> torch.Tensor:
    """Return the gradient of all weights, 0 where there is none."""
    return torch.cat([
        (torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten().detach().clone()
        for weight in model.parameters()
    ])


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    """Return all weights in one row."""
    return torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Return arguments for plain gradient descent without a schedule, in silence."""
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            **settings,
        },
    )


class Watched(PackedTrainer):
    """Writes down the samples of each step, and the batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keys: list[list[str]] = []
        self.batches: list[Any] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, weight_sum = super().get_batch_samples(*args, **kwargs)
        self.batches += batches
        self.keys.append([key for batch in batches for row in batch["keys"] for key in row])
        return batches, weight_sum


def train(
    folder: Path, model: torch.nn.Module, data: object, collator: object, **settings: Any
) -> tuple[Watched, list[torch.Tensor]]:
    """Return the trainer after a run, and the gradient of each step."""
    own = {name: settings.pop(name) for name in ("loss_weighting", "eval_dataset") if name in settings}
    resume = settings.pop("resume", None)
    gradients = Gradients()
    trainer = Watched(
        model,
        arguments(folder, **settings),
        train_dataset=data,
        data_collator=collator,
        callbacks=[gradients],
        **own,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, gradients.steps


def losses(trainer: PackedTrainer) -> list[float]:
    """Return the logged loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Without:
    """A collator without one of its arguments."""

    def __init__(self, collate: Any, *names: str) -> None:
        self.collate, self.names = collate, names
        self.loss_weighting = collate.loss_weighting

    def __call__(self, packed: Any) -> Any:
        batch = self.collate(packed)
        return {name: batch[name] for name in batch if name not in self.names}
