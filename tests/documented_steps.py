"""What the reference documents say of batches, memory safety and the trainer, sentence by sentence.

Each entry is a sentence and a function that holds exactly if the code does as the sentence says; where the
document is wrong, the entry is of the variant that keeps it, and says so.
"""

from __future__ import annotations

import inspect
import math
import tempfile
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from tests.fakes import tokenizer
from tests.toy_training import Causal, Texts, arguments, collate, relative, weights
from vlmpack.batching import (
    DynamicBatchingTrainer,
    GradientCheckpointManager,
    HeterogeneousBatch,
    HeterogeneousCollator,
    MemoryAwareBatchSampler,
    MemoryMonitorCallback,
    MemorySafetyCallback,
    OOMGuardian,
    SampleShape,
    legacy_sample_metadata,
    worst_case_images,
)
from vlmpack.memory import TASKS_3D, FakeMemory, MemoryPredictor

if TYPE_CHECKING:
    from collections.abc import Callable


class MockDataset:
    """The document's: so many samples of three tasks. Counts what is asked of it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.asked = 0
        self.read = 0

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, idx: int) -> dict[str, Any]:
        self.read += 1
        task = ("T1", "T2", "T3")[idx % 3]
        images = [torch.ones(1, 4, 4, 2 + idx % 2) for _ in range(1 if task == "T1" else 2)]
        return {"images": images, "input_ids": [1, 2, 3][: 1 + idx % 3], "task_type": task, "subject": idx}

    def get_sample_metadata(self, idx: int) -> dict[str, Any]:
        self.asked += 1
        task = ("T1", "T2", "T3")[idx % 3]
        return {"task_type": task, "num_images": 1 if task == "T1" else 2}


def parameters(of: Any) -> dict[str, Any]:
    return {name: each.default for name, each in inspect.signature(of).parameters.items() if name != "self"}


def example_test() -> bool:
    sampler = MemoryAwareBatchSampler(dataset=MockDataset(100), batch_size=8, max_memory_mb=30000)
    return all(sampler._estimate_batch_memory(batch) < 30 for batch in sampler)


def plans_before_reading() -> bool:
    dataset = MockDataset(50)
    batches = list(MemoryAwareBatchSampler(dataset)) + list(MemoryAwareBatchSampler(dataset))
    return (dataset.read, dataset.asked, len(batches) > 2) == (0, 100, True)


def legacy_priority() -> bool:
    """An empty batch takes the first sample; then, with weight 0.5, the rarest task that comes first."""
    sampler = MemoryAwareBatchSampler(MockDataset(9), priority="legacy", shuffle=False)
    return sampler.construct_batch([0, 3, 1, 4, 2]) == [0, 1, 2, 3, 4]


def collated(number: int = 6) -> HeterogeneousBatch:
    dataset = MockDataset(number)
    return HeterogeneousCollator(tokenizer=tokenizer())([dataset[index] for index in range(number)])


def custom_dataloader() -> bool:
    dataset = MockDataset(20)
    sampler = MemoryAwareBatchSampler(dataset=dataset, batch_size=16, max_memory_mb=30000, shuffle=True)
    collator = HeterogeneousCollator(tokenizer=tokenizer())
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collator)  # type: ignore[arg-type]
    return sum(batch.num_samples for batch in loader) == 20


def guardian(total_gb: float = 10) -> OOMGuardian:
    return OOMGuardian(TASKS_3D, backend=FakeMemory(total=int(total_gb * 1e9)))


def shapes(number: int) -> list[SampleShape]:
    return [SampleShape(key=str(at), task_type="T1", num_images=1) for at in range(number)]


def margin_recipe() -> bool:
    """The document calls it reducing the margin; it is raised, and less memory is used."""
    guarded = guardian()
    before = guarded.limit_bytes
    guarded.memory_margin_percent = 0.20
    return math.isclose(before, 9e9) and math.isclose(guarded.limit_bytes, 8e9)


def safety_callback() -> bool:
    memory, guarded = FakeMemory(total=100), guardian()
    callback = MemorySafetyCallback(guarded, interval=2, warn_at=0.5, backend=memory)
    memory.use(60)
    guarded.failed(shapes(1))
    for step in range(1, 5):
        callback.on_step_end(None, SimpleNamespace(global_step=step), None)  # type: ignore[arg-type]
    return (callback.num_warnings, callback.num_ooms) == (2, 1)


def checkpointing() -> bool:
    model = Causal()
    is_static = isinstance(
        inspect.getattr_static(GradientCheckpointManager, "enable_gradient_checkpointing"), staticmethod
    )
    GradientCheckpointManager.enable_gradient_checkpointing(model)
    return is_static and GradientCheckpointManager.is_enabled(model)


def trained(**settings: Any) -> tuple[torch.Tensor, Any]:
    model = Causal()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DynamicBatchingTrainer(
            model, arguments(folder, **settings), data_collator=collate, train_dataset=Texts(32)
        )
        result = trainer.train()
    return weights(model), result


def accumulation_means_the_same() -> bool:
    whole, _ = trained(per_device_train_batch_size=16, gradient_accumulation_steps=1)
    others = [
        trained(per_device_train_batch_size=size, gradient_accumulation_steps=16 // size)[0]
        for size in (8, 4, 2, 1)
    ]
    return all(relative(other, whole) < 1e-12 for other in others)


def default_weights() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        trainer = DynamicBatchingTrainer(Causal(), arguments(folder), train_dataset=Texts(2))
    return trainer.task_loss_weights == {"T1": 1.0, "T2": 1.0, "T3": 1.0}


FIELDS = ("pixel_values", "image_mask", "task_types", "task_ids", "input_ids", "attention_mask", "labels")
CONSTRUCTOR = (
    "model",
    "args",
    "train_dataset",
    "memory_predictor",
    "oom_guardian",
    "batch_size_normalizer",
    "task_loss_weights",
)

DOCUMENTED_STEPS: dict[str, Callable[[], bool]] = {
    # ---- batches
    "MemoryAwareBatchSampler(dataset, batch_size=16, max_memory_mb, shuffle=True)": lambda: (
        list(parameters(MemoryAwareBatchSampler))[:4] == ["dataset", "batch_size", "max_memory_mb", "shuffle"]
        and parameters(MemoryAwareBatchSampler)["batch_size"] == 16
        and parameters(MemoryAwareBatchSampler)["shuffle"] is True
    ),
    "max_memory_mb may be left out": lambda: len(MemoryAwareBatchSampler(MockDataset(9), batch_size=16)) == 1,
    "diversity weight adjustable, 0.5 by default": lambda: (
        MemoryAwareBatchSampler(MockDataset(3)).diversity_weight == 0.5
        and MemoryAwareBatchSampler(MockDataset(3), diversity_weight=0.2).diversity_weight == 0.2
    ),
    "priority by memory fit and diversity, as written: priority='legacy'": legacy_priority,
    "metadata is read once, memory predicted before any sample is": plans_before_reading,
    "every batch of 100 samples stays below 30 GB": example_test,
    "usable as DataLoader(batch_sampler=..., collate_fn=...)": custom_dataloader,
    "HeterogeneousCollator(tokenizer=...)": lambda: "tokenizer" in parameters(HeterogeneousCollator),
    "pixel_values (batch, max_images, C, H, W, D)": lambda: (
        tuple(collated().pixel_values.shape) == (6, 2, 1, 4, 4, 3)  # type: ignore[union-attr]
    ),
    "image_mask says which positions hold an image": lambda: (
        collated().image_mask.sum(1).tolist() == [1, 2, 2, 1, 2, 2]  # type: ignore[union-attr]
    ),
    "1 to 3 images a sample": lambda: (
        tuple(
            HeterogeneousCollator()([
                {"images": [torch.ones(1, 2, 2)] * number, "task_type": "T1"} for number in (1, 2, 3)
            ]).pixel_values.shape  # type: ignore[union-attr]
        )
        == (3, 3, 1, 2, 2)
    ),
    "tasks and metadata are preserved": lambda: (
        collated().task_types == ("T1", "T2", "T3") * 2
        and [each["subject"] for each in collated().metadata] == list(range(6))
    ),
    "HeterogeneousBatch has the documented fields": lambda: (
        set(FIELDS) <= set(HeterogeneousBatch.__dataclass_fields__)
    ),
    "text is padded to one length": lambda: tuple(collated().input_ids.shape) == (6, 3),  # type: ignore[union-attr]
    "get_sample_metadata as written, its slip included": lambda: (
        legacy_sample_metadata({"subject_id": ["a", "b"]}) == {"task_type": "T3", "num_images": 1}
    ),
    "most images of a data set as written, letters counted": lambda: (
        worst_case_images([{"subject_id": "sub-0001"}], legacy=True) == 8
    ),
    # ---- memory safety
    "preflight check": lambda: guardian().preflight(shapes(13)) and not guardian().preflight(shapes(14)),
    "emergency cleanup": lambda: guardian().emergency_cleanup() is None,  # type: ignore[func-returns-value]
    "automatic batch-size reduction": lambda: guardian().reduce_batch_size(16) == 11,
    "safe batch-size estimation": lambda: guardian().safe_batch_size(shapes(1)[0]) == 13,
    "safety margin 10 % by default": lambda: OOMGuardian().memory_margin_percent == 0.10,
    "guardian.memory_margin_percent = 0.20": margin_recipe,
    "MemorySafetyCallback is a Trainer's callback": lambda: issubclass(MemorySafetyCallback, TrainerCallback),
    "it looks at intervals, warns, and tracks OOMs": safety_callback,
    "GradientCheckpointManager.enable_gradient_checkpointing(model), static": checkpointing,
    "MemoryMonitorCallback() is a Trainer's callback": lambda: isinstance(
        MemoryMonitorCallback(), TrainerCallback
    ),
    # ---- trainer
    "DynamicBatchingTrainer extends Trainer": lambda: issubclass(DynamicBatchingTrainer, Trainer),
    "its documented keywords": lambda: set(CONSTRUCTOR) <= set(parameters(DynamicBatchingTrainer)),
    "task weights of 1 by default": default_weights,
    "trainer.train() returns a training result": lambda: trained()[1].global_step == 4,
    "16 x 1 = 8 x 2 = 4 x 4 = 2 x 8 = 1 x 16": accumulation_means_the_same,
    "a MemoryPredictor is what it is given": lambda: (
        OOMGuardian(MemoryPredictor()).costs.cost is MemoryPredictor().cost
    ),
}
