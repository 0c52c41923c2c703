"""The whole way for volumes of three tasks: metadata, sampler, collator, trainer, evaluation, OOMs."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from tests.toy_training import Causal, Texts, arguments, collate, relative, weights
from vlmpack.batching import DynamicBatchingTrainer, HeterogeneousCollator, OOMGuardian, OOMSimulator
from vlmpack.errors import VlmpackError
from vlmpack.memory import TASKS_3D, CalibratedCost, FakeMemory, LinearCost


class Volumes:
    """One or two volumes of different depth a sample."""

    def __init__(self, number: int, told_tokens: int | None = None) -> None:
        rng = torch.Generator().manual_seed(1)
        self.samples = []
        for index in range(number):
            task = ("T1", "T2", "T3")[index % 3]
            images = [
                torch.rand(1, 3, 3, 2 + index % 3, generator=rng) for _ in range(1 if task == "T1" else 2)
            ]
            self.samples.append({"images": images, "input_ids": [1 + index % 5, 2, 3], "task_type": task})
        self.told_tokens = told_tokens

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.samples[index]

    def get_sample_metadata(self, idx: int) -> dict:
        sample = self.samples[idx]
        found = {"task_type": sample["task_type"], "num_images": len(sample["images"])}
        return found if self.told_tokens is None else {**found, "num_tokens": self.told_tokens}


class Sees(Causal):
    """Adds the mean of a sample's volumes to its text; it uses the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = torch.nn.Linear(1, 8, dtype=torch.float64)

    def forward(self, pixel_values, image_mask, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        each = pixel_values.double().flatten(2).sum(2) * image_mask
        seen = torch.tanh(self.vision(each.sum(1, keepdim=True) / 30))
        hidden = torch.tanh(self.layers[1](self.embed(input_ids) + seen[:, None]))
        logits = self.head(hidden)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses / count, "logits": logits}


def run(folder, limit: float, **settings):
    model = Sees()
    trainer = DynamicBatchingTrainer(
        model,
        arguments(folder, num_train_epochs=2, eval_strategy="epoch", per_device_train_batch_size=12),
        data_collator=HeterogeneousCollator(),
        train_dataset=Volumes(30),
        eval_dataset=Volumes(6),
        task_loss_weights={"T1": 1.0, "T2": 2.0, "T3": 0.5},
        **settings,
    )
    simulator = OOMSimulator(
        lambda inputs: 10.0 * inputs["image_mask"].numel(), limit_bytes=limit, phase="backward"
    )
    with simulator.attached(model):
        trainer.train()
    return trainer, simulator


def test_volumes_of_three_tasks_train_and_evaluate_and_oom_changes_nothing(tmp_path):
    formula = {"memory_predictor": TASKS_3D, "max_memory_mb": 30_000}
    whole, free = run(tmp_path, float("inf"), **formula)
    split, tight = run(tmp_path, 50.0, **formula)
    assert (free.num_ooms, tight.num_ooms > 0) == (0, True)
    assert relative(weights(split.model), weights(whole.model)) < 1e-12
    losses = [entry["eval_loss"] for entry in split.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_metadata_that_lies_about_costs_is_recovered_from_and_learned(tmp_path):
    formula = LinearCost(name="tokens", features=("batch", "tokens"), theta=(1.0, 1.0))
    model = Sees()
    simulator = OOMSimulator(lambda inputs: 1.0 + 10.0 * len(inputs["input_ids"]), limit_bytes=60.0)
    trainer = DynamicBatchingTrainer(
        model,
        arguments(tmp_path, num_train_epochs=4, per_device_train_batch_size=15),
        data_collator=HeterogeneousCollator(),
        train_dataset=Volumes(30, told_tokens=1),  # the truth is 3, and each costs 10
        oom_guardian=OOMGuardian(CalibratedCost(formula), backend=simulator.backend),
        memory_aware=False,
    )
    simulator.backend.total = 60
    with simulator.attached(model):
        result = trainer.train()
    assert result.global_step == 8
    assert 0 < simulator.num_ooms <= 6
    assert trainer.guardian.costs.predict({"tokens": 5.0}) == pytest.approx(51, rel=0.2)


def test_sixteen_bit_autocast_is_split_too(tmp_path):
    def train(limit):
        model = Causal(dtype=torch.float32)
        trainer = DynamicBatchingTrainer(
            model, arguments(tmp_path, bf16=True), data_collator=collate, train_dataset=Texts(16)
        )
        simulator = OOMSimulator(lambda inputs: float(inputs["input_ids"].numel()), limit_bytes=limit)
        with simulator.attached(model):
            trainer.train()
        return weights(model), simulator.num_ooms

    whole, none = train(float("inf"))
    split, some = train(30.0)
    assert none == 0 < some
    assert relative(split, whole) < 1e-3


def test_ending_an_epoch_early_would_end_the_run_and_is_refused(tmp_path):
    class Impatient(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    trainer = DynamicBatchingTrainer(
        Causal(),
        arguments(tmp_path, num_train_epochs=2),
        data_collator=collate,
        train_dataset=Texts(20),
        callbacks=[Impatient()],
    )
    with pytest.raises(VlmpackError, match="should_epoch_stop would end the whole run at step 1 of 6"):
        trainer.train()


def test_a_device_with_less_than_the_formulas_fixed_part_still_tries_one_by_one(tmp_path, caplog):
    guardian = OOMGuardian(TASKS_3D, backend=FakeMemory(total=10**8))  # 0.27 GB are fixed
    trainer, _ = run(tmp_path, float("inf"), oom_guardian=guardian, memory_aware=False)
    assert trainer.last_step.report.num_micro_batches == trainer.last_step.num_samples == 6
    said = [record for record in caplog.records if "does not even leave room" in record.message]
    assert len(said) == 1
