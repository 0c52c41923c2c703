"""Toy models and data for tests of training: float64 where gradients are compared to 1e-12."""

from __future__ import annotations

import gc
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TrainingArguments

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VOCAB = 13
IGNORE = -100


@pytest.fixture(scope="module")
def frozen_garbage() -> Iterator[None]:
    """Recovery collects garbage after errors, which takes 0.3 s with transformers loaded: not in tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Causal(torch.nn.Module):
    """A causal language model that takes the number of items, as transformers' own do.

    It mixes earlier positions of the same segment (`position_ids` restart), so that packing matters.
    """

    def __init__(self, *, dropout: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(VOCAB, 8, dtype=dtype)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8, dtype=dtype) for _ in range(3))
        self.head = torch.nn.Linear(8, VOCAB, dtype=dtype)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        hidden = self.embed(input_ids)
        before = torch.nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))
        if position_ids is not None:
            before = before * (position_ids != 0).unsqueeze(-1)
        hidden = hidden + 0.5 * before
        for layer in self.layers:
            hidden = self.dropout(torch.tanh(layer(hidden)))
        logits = self.head(hidden)
        output = {"logits": logits}
        if labels is not None:
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
            )
            count = (labels[:, 1:] != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
            output = {"loss": losses / count, **output}
        return output


class MeanLoss(Causal):
    """The same without loss kwargs: its loss is a mean over its own batch."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return super().forward(input_ids, labels)


class Texts:
    """Samples of different lengths, some labels masked, of several tasks; metadata on demand."""

    def __init__(
        self,
        number: int,
        *,
        tasks: Sequence[str] = ("T1",),
        seed: int = 0,
        longest: int = 9,
        mask_first: bool = True,
    ) -> None:
        rng = random.Random(seed)
        self.samples = []
        for index in range(number):
            ids = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(2, longest))]
            labels = [each if rng.random() < 0.7 else IGNORE for each in ids]
            labels[-1] = ids[-1]  # something to learn
            if mask_first:  # transformers counts it for models that it does not know
                labels[0] = IGNORE
            task = tasks[index % len(tasks)]
            self.samples.append({"input_ids": ids, "labels": labels, "task_type": task, "key": f"s{index}"})

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    length = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for row, sample in enumerate(samples):
        ids[row, : len(sample["input_ids"])] = torch.tensor(sample["input_ids"])
        labels[row, : len(sample["labels"])] = torch.tensor(sample["labels"])
    return {"input_ids": ids, "labels": labels}


def gradients(model: torch.nn.Module) -> torch.Tensor:
    """Return all gradients as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def weights(model: torch.nn.Module) -> torch.Tensor:
    """Return a copy of all parameters as one vector."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def set_weights(model: torch.nn.Module, values: torch.Tensor) -> None:
    """Set all parameters from a vector that `weights` made."""
    torch.nn.utils.vector_to_parameters(values, model.parameters())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative difference of two vectors."""
    return float((found - expected).norm() / expected.norm())


def arguments(folder: Any, **more: Any) -> TrainingArguments:
    """Return quiet arguments on the CPU: plain SGD, one epoch, no checkpoints, no clipping."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **more})


def memory_of(inputs: Any) -> float:
    """A hidden memory function: 100 bytes, and 10 for each position, padding included."""
    return 100.0 + 10.0 * inputs["input_ids"].numel()
