"""A run that is stopped anywhere goes on to the same weights, bit for bit, with what it had learned."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Trainer, TrainerCallback

from tests.toy_training import Causal, Texts, arguments, collate, memory_of, weights
from vlmpack.batching import DynamicBatchingTrainer, OOMGuardian, OOMSimulator
from vlmpack.errors import ConfigError
from vlmpack.memory import CalibratedCost, FakeMemory, LinearCost

FORMULA = LinearCost(name="tokens", features=("batch", "tokens"), theta=(50.0, 2.0))
"""Far too low: the truth is 100 and 10 a position, so the first steps run out of memory."""


class Stop(TrainerCallback):
    """Saves and ends the run after a step, as a job that is taken away would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class Keys(DynamicBatchingTrainer):
    """Notes the samples of each step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.steps = [*getattr(self, "steps", []), inputs.keys]
        return super().training_step(model, inputs, num_items_in_batch)


def trainer_for(folder, *, stop=None, epochs=2, dropout=0.0, calibrated=True, workers=0, **more):
    model = Causal(dropout=dropout)
    simulator = OOMSimulator(memory_of, limit_bytes=390, phase="backward")
    guardian = OOMGuardian(
        CalibratedCost(FORMULA) if calibrated else None, backend=FakeMemory(total=390) if calibrated else None
    )
    if calibrated:
        guardian._backend = simulator.backend
    trainer = Keys(
        model,
        arguments(
            folder,
            num_train_epochs=epochs,
            optim="adamw_torch",
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            learning_rate=0.01,
            dataloader_num_workers=workers,
            **more,
        ),
        data_collator=collate,
        train_dataset=Texts(20, tasks=("T1", "T2"), seed=6),
        oom_guardian=guardian,
        callbacks=[Stop(stop)] if stop else [],
    )
    return trainer, simulator


def run(folder, *, resume=None, **settings):
    trainer, simulator = trainer_for(folder, **settings)
    with simulator.attached(trainer.model):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_stopped_at_any_step_it_ends_with_the_same_bits(tmp_path, whole, stop):
    assert whole.guardian.num_ooms > 0
    first = run(tmp_path, stop=stop)
    rest = run(tmp_path, resume=str(tmp_path / f"checkpoint-{stop}"))
    assert first.steps + rest.steps == whole.steps
    assert torch.equal(weights(rest.model), weights(whole.model))
    assert rest.guardian.state_dict() == whole.guardian.state_dict()
    assert rest.state.global_step == whole.state.global_step == 6


def test_dropout_goes_on_with_the_saved_random_numbers(tmp_path):
    whole = run(tmp_path / "whole", dropout=0.3)
    run(tmp_path / "first", dropout=0.3, stop=3)
    rest = run(tmp_path / "first", dropout=0.3, resume=str(tmp_path / "first" / "checkpoint-3"))
    assert torch.equal(weights(rest.model), weights(whole.model))


def test_the_checkpoint_keeps_plan_cap_and_calibration_as_plain_json(tmp_path):
    run(tmp_path, stop=2)
    state = json.loads((tmp_path / "checkpoint-2" / "dynamic_batching_0.json").read_text())
    assert set(state) == {"plan", "guardian", "balancing"}
    assert state["guardian"]["num_ooms"] > 0
    assert state["guardian"]["costs"]["calibrator"]["num_observations"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 3}, "its place means nothing"),
        ({"seed": 9}, "its place means nothing"),
        ({"per_device_train_batch_size": 4}, "its place means nothing"),
        ({"ignore_data_skip": True}, "would train on the plan's first steps again"),
    ],
)
def test_another_plan_is_refused(tmp_path, settings, message):
    run(tmp_path, stop=2)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)


def test_a_checkpoint_of_the_plain_trainer_is_refused(tmp_path):
    plain = Trainer(
        Causal(),
        arguments(tmp_path, optim="adamw_torch"),
        data_collator=collate,
        train_dataset=Texts(20),
        callbacks=[Stop(1)],
    )
    plain.train()
    with pytest.raises(ConfigError, match="it is of another trainer"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-1"))


@pytest.mark.slow
def test_workers_change_neither_order_nor_bits(tmp_path, whole):
    rest = run(tmp_path, workers=2)
    assert rest.steps == whole.steps
    assert torch.equal(weights(rest.model), weights(whole.model))
