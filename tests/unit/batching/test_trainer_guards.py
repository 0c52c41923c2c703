"""Traps of the plain Trainer, each with the test that shows it, and what happens here instead."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback

from tests.fakes import jpeg, packs_of, row, tokenizer
from tests.toy_training import Causal, Texts, arguments, collate, relative, weights
from vlmpack import VQACollator
from vlmpack.batching import (
    DynamicBatchingTrainer,
    EffectiveBatchSizeNormalizer,
    MemoryAwareBatchSampler,
    OOMGuardian,
    StepPlan,
)
from vlmpack.errors import ConfigError
from vlmpack.memory import MemoryPredictor


# ---- a stream of packs is cut by the default loader -------------------------------------------------
class Packs(IterableDataset):
    def __init__(self) -> None:
        rows = [row(f"<image>What is it, {i}?", "A picture.", [jpeg(64, 48)]) for i in range(4)]
        self.packs = list(packs_of(rows, seq_length=120))

    def __iter__(self):
        return iter(self.packs)


class Sees(torch.nn.Module):
    """Notes the shapes that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.shapes: list[tuple[tuple[int, ...], ...]] = []

    def forward(self, input_ids, labels=None, tiles=None, tiles_per_pack=None):
        if self.training:
            self.shapes.append((tuple(input_ids.shape), tuple(tiles.shape), tuple(tiles_per_pack.shape)))
        return {"loss": self.weight * (labels != -100).sum()}


def stream_trainer(trainer_class, folder):
    data = Packs()
    assert len(data.packs) > 1
    assert max(len(pack.tiles) for pack in data.packs) > 1
    model = Sees()
    collator = VQACollator(tokenizer(), 120)
    trainer = trainer_class(
        model,
        arguments(folder, max_steps=1, per_device_train_batch_size=1, remove_unused_columns=False),
        data_collator=collator if trainer_class is not Trainer else lambda items: dict(collator(items)),
        train_dataset=data,
    )
    return trainer, model, data


def test_the_plain_trainer_cuts_the_tiles_of_a_streamed_pack(tmp_path):
    trainer, _, data = stream_trainer(Trainer, tmp_path)
    loader = trainer.get_train_dataloader()
    assert type(loader).__name__ == "DataLoaderDispatcher"
    batch = next(iter(loader)) if not _fails(loader) else None
    assert batch is None or len(batch["tiles"]) < len(data.packs[0].tiles)


def _fails(loader) -> bool:
    """Whether it does not even get so far: lists of keys cannot be concatenated."""
    try:
        next(iter(loader))
    except Exception:
        return True
    return False


def test_a_streamed_pack_arrives_whole(tmp_path):
    trainer, model, data = stream_trainer(DynamicBatchingTrainer, tmp_path)
    trainer.train()
    assert model.shapes == [((1, 120), tuple(data.packs[0].tiles.shape), (1,))]


# ---- a sampler that names a batch size loses batches under DDP -------------------------------------
class Tasks:
    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> int:
        return index

    def get_sample_metadata(self, idx: int) -> dict:
        return {"task_type": ("T1", "T2", "T3")[idx % 3], "num_images": 1}


class Named(MemoryAwareBatchSampler):
    """What the reference document's constructor suggests: the batch size as an attribute."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.batch_size = self.max_batch_size
        self.drop_last = False


def seen_by_accelerate(sampler, world: int = 2) -> Counter:
    """What accelerate makes of a batch sampler on each rank."""
    shards = [BatchSamplerShard(sampler, num_processes=world, process_index=rank) for rank in range(world)]
    plans = []
    for shard in shards:
        sampler.set_epoch(0)
        plans.append(list(shard))
    return Counter(index for plan in plans for batch in plan for index in batch)


def test_a_batch_size_attribute_makes_accelerate_lose_and_double_samples():
    # batches of 7, 6, 5 ... samples, as memory allows
    named = seen_by_accelerate(Named(Tasks(100), 8, 6000, priority="legacy"))
    assert named != Counter(range(100))
    plain = seen_by_accelerate(MemoryAwareBatchSampler(Tasks(100), 8, 6000, priority="legacy"))
    assert set(plain) == set(range(100))
    sampler = MemoryAwareBatchSampler(Tasks(100), 8, 6000, priority="legacy")
    plans = [StepPlan(sampler, rank=rank, world_size=2) for rank in range(2)]
    assert Counter(index for plan in plans for step in plan for index in step) == Counter(range(100))


# ---- epochs of different length ---------------------------------------------------------------------
class Uneven:
    """A source whose epochs have 13, 7 and 4 steps of 101 samples."""

    sizes = (8, 16, 32)
    digest = "uneven"

    def batches(self, epoch: int) -> list[list[int]]:
        size = self.sizes[epoch]
        return [list(range(at, min(at + size, 101))) for at in range(0, 101, size)]


class UnevenSampler(BatchSampler):
    """The same as a batch sampler with set_epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batch_size = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(Uneven().batches(self.epoch))

    def __len__(self) -> int:
        return len(Uneven().batches(self.epoch))


class Reads(Texts):
    """Counts what is read."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.read: Counter = Counter()

    def __getitem__(self, index: int):
        self.read[index] += 1
        return super().__getitem__(index)


def test_the_plain_trainer_counts_the_first_epochs_steps_and_the_schedule_never_ends(tmp_path):
    data = Reads(101)

    class Plain(Trainer):
        def get_train_dataloader(self):
            loader = DataLoader(data, batch_sampler=UnevenSampler(), collate_fn=collate)
            return prepare_data_loader(loader, put_on_device=False)

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
            train_dataloader.batch_sampler.set_epoch(round(state.epoch or 0))

    trainer = Plain(
        Causal(),
        arguments(tmp_path, num_train_epochs=3, lr_scheduler_type="linear"),
        train_dataset=data,
        callbacks=[Epochs()],
    )
    trainer.train()
    assert trainer.state.max_steps == 39  # 3 x 13, while the three epochs have 24 steps
    assert trainer.lr_scheduler.get_last_lr()[0] > 0


def test_a_plan_counts_every_epoch_and_the_schedule_ends(tmp_path):
    data = Reads(101)
    trainer = DynamicBatchingTrainer(
        Causal(),
        arguments(tmp_path, num_train_epochs=3, lr_scheduler_type="linear"),
        data_collator=collate,
        train_dataset=data,
        batch_sampler=Uneven(),
    )
    trainer.train()
    assert trainer.state.max_steps == trainer.state.global_step == 24
    assert set(data.read.values()) == {3}
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}


# ---- a sample's first token, predicted from the sample before it -------------------------------------
def packed_row(mask_first: bool) -> dict[str, torch.Tensor]:
    first = -100 if mask_first else 3
    return {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5]]),
        "labels": torch.tensor([[-100, 2, first, 4, 5]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
    }


@pytest.mark.parametrize("mask_first", [True, False])
def test_only_the_plain_trainer_trains_on_a_label_across_samples(tmp_path, mask_first):
    def run(trainer_class):
        trainer = trainer_class(
            Causal(),
            arguments(tmp_path, per_device_train_batch_size=1),
            data_collator=lambda items: packed_row(mask_first),
            train_dataset=Texts(1),
        )
        trainer.train()
        return weights(trainer.model)

    plain = run(Trainer)
    if mask_first:
        assert relative(run(DynamicBatchingTrainer), plain) < 1e-14
    else:
        with pytest.raises(ConfigError, match=r"row 0 \(s0\): position 2 begins a sample and has"):
            run(DynamicBatchingTrainer)


# ---- what cannot work is said ------------------------------------------------------------------------
def test_settings_that_would_undo_the_plan_are_neutralised_or_refused(tmp_path, caplog):
    args = arguments(tmp_path, auto_find_batch_size=True, gradient_accumulation_steps=4)
    trainer = DynamicBatchingTrainer(Causal(), args, data_collator=collate, train_dataset=Texts(4))
    assert "auto_find_batch_size restarts the training" in caplog.text
    assert not trainer.args.auto_find_batch_size
    assert (trainer.args.gradient_accumulation_steps, trainer.accumulation_steps) == (1, 4)
    assert (args.gradient_accumulation_steps, args.auto_find_batch_size) == (4, True)  # the user's stay
    args = arguments(tmp_path)
    args.deepspeed = {"stage": 3}
    with pytest.raises(ConfigError, match="DeepSpeed and FSDP exchange data inside of each forward pass"):
        DynamicBatchingTrainer(Causal(), args, train_dataset=Texts(4))
    with pytest.raises(ConfigError, match="training needs a train_dataset"):
        DynamicBatchingTrainer(Causal(), arguments(tmp_path)).train()


def test_nothing_is_on_the_device_before_the_split(tmp_path):
    trainer = DynamicBatchingTrainer(
        Causal(), arguments(tmp_path), data_collator=collate, train_dataset=Texts(4)
    )
    loader = trainer.get_train_dataloader()
    assert loader.device is None
    (step,) = list(loader)
    assert {type(item) for item in step.items} == {dict}  # not even collated


class Asks(Texts):
    """Texts that tell their task and images before they are read."""

    def get_sample_metadata(self, idx: int) -> dict:
        return {"task_type": self.samples[idx]["task_type"], "num_images": 1}


def test_the_documented_call_makes_memory_aware_steps_of_mixed_tasks(tmp_path):
    # remove_unused_columns is on by default, and strips the task from what the plain Trainer collates
    data = Asks(40, tasks=("T1", "T2", "T3"))
    predictor = MemoryPredictor()
    trainer = DynamicBatchingTrainer(
        model=Causal(),
        args=arguments(tmp_path, num_train_epochs=2, logging_strategy="steps", logging_steps=1),
        train_dataset=data,
        memory_predictor=predictor,
        oom_guardian=OOMGuardian(predictor),
        batch_size_normalizer=EffectiveBatchSizeNormalizer(8, 8, 0.1, lr_rule="linear"),
        task_loss_weights={"T1": 1.0, "T2": 1.0, "T3": 1.0},
        data_collator=collate,
        max_memory_mb=6000,
    )
    result = trainer.train()
    plan = trainer.step_plan
    assert isinstance(plan.source, MemoryAwareBatchSampler)
    assert result.global_step == len(plan)
    for number in range(len(plan)):
        step = list(plan.step(number))
        assert plan.source._estimate_batch_memory(step) < 6.0
    mixed = [{data.samples[index]["task_type"] for index in plan.step(number)} for number in range(len(plan))]
    assert {"T1", "T2", "T3"} in mixed
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {entry["lr_scale"] for entry in logged} == {
        len(plan.step(number)) / 8 for number in range(len(plan))
    }


def test_the_minimal_documented_call_trains(tmp_path):
    predictor = MemoryPredictor()
    trainer = DynamicBatchingTrainer(
        model=Causal(),
        args=arguments(tmp_path),
        train_dataset=Asks(8),
        memory_predictor=predictor,
        oom_guardian=OOMGuardian(),
        data_collator=collate,
    )
    assert trainer.guardian.costs.formula is predictor  # a guardian without a formula takes the trainer's
    assert trainer.train().global_step == 1
