"""Whatever is split and wherever memory runs out: the gradient of the whole step, every sample once.

The oracle knows no batches: it adds up the samples' gradients one by one.
"""

from __future__ import annotations

import tempfile
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st

from tests.toy_training import (
    Causal,
    MeanLoss,
    Texts,
    arguments,
    collate,
    frozen_garbage,  # noqa: F401 - a fixture
    gradients,
    memory_of,
    relative,
    set_weights,
    weights,
)
from vlmpack.batching import DynamicBatchingTrainer, MemoryFault, OOMSimulator
from vlmpack.errors import OversizeError

pytestmark = pytest.mark.usefixtures("frozen_garbage")
WEIGHTS = {"T1": 0.5, "T2": 2.0, "T3": 1.0}
RATE = 0.1

# without shrinking: a failing example is small enough, and shrinking trainings takes minutes
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
faults = st.lists(
    st.builds(MemoryFault, call=st.integers(0, 12), phase=st.sampled_from(["forward", "backward"])),
    max_size=6,
)


class Recording(DynamicBatchingTrainer):
    """Notes which samples each step was made of, its weights and its gradient."""

    def _finish(self, step, inputs, report):
        keys = [shape.key for _, part in step.losses for shape in part.shapes]
        self.trained.append((keys, weights(self.model), gradients(self.model).clone()))
        return super()._finish(step, inputs, report)


def oracle(model, indices, data, task_weights, loss) -> torch.Tensor:
    """Return the gradient of a step at the model's weights, added up sample by sample."""
    model.zero_grad()
    total, summed = 0.0, torch.zeros(())
    for index in indices:
        sample = data[index]
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
        count = int((labels[:, 1:] != -100).sum())
        share = 1 if loss == "sample" else count
        if count:
            summed = summed + model(ids, labels)["loss"] * share * task_weights[sample["task_type"]]
            total += share
    (summed / total).backward()
    return gradients(model)


def worst_error(trainer, model, data, task_weights, loss) -> float:
    """Return the largest relative error of any step's gradient."""
    errors = []
    for number, (_, at, gradient) in enumerate(trainer.trained):
        set_weights(model, at)
        expected = oracle(model, trainer.step_plan.step(number), data, task_weights, loss)
        errors.append(relative(gradient, expected))
    assert errors
    return max(errors)


def run(data, *, faults, limit, loss, make, dtype=torch.float64, epochs=1, size=8, task_weights=None):
    """Return the trainer after a run under faults."""
    model = make(dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recording(
            model,
            arguments(folder, num_train_epochs=epochs, learning_rate=RATE, per_device_train_batch_size=size),
            data_collator=collate,
            train_dataset=data,
            task_loss_weights=task_weights,
            loss=loss,
        )
        trainer.trained = []
        simulator = OOMSimulator(memory_of, limit_bytes=limit, faults=faults, phase="random", seed=1)
        with simulator.attached(model):
            try:
                trainer.train()
            except OversizeError:  # one sample met two of the faults, so it counts as too large by itself
                assert len(faults) > 1
                reject()
    return trainer


@given(
    number=st.integers(1, 14),
    tasks=st.sampled_from([("T1",), ("T1", "T2"), ("T1", "T2", "T3")]),
    seed=st.integers(0, 50),
    size=st.integers(1, 9),
    faults=faults,
    limit=st.sampled_from([float("inf"), 400.0, 250.0, 200.0]),
    loss=st.sampled_from(["model", "token", "sample"]),
    make=st.sampled_from([Causal, MeanLoss]),
)
@settings(max_examples=40, phases=PHASES)
def test_in_double_precision_to_1e_12(number, tasks, seed, size, faults, limit, loss, make):
    data = Texts(number, tasks=tasks, seed=seed)
    trainer = run(
        data, faults=faults, limit=limit, loss=loss, make=make, size=size, epochs=2, task_weights=WEIGHTS
    )
    assert worst_error(trainer, make(), data, WEIGHTS, loss) < 1e-12
    for step, (keys, *_) in enumerate(trainer.trained):
        assert Counter(keys) == Counter(f"s{index}" for index in trainer.step_plan.step(step))
    trained = Counter(key for keys, *_ in trainer.trained for key in keys)
    assert trained == Counter({f"s{index}": 2 for index in range(number)})


@given(seed=st.integers(0, 50), faults=faults, limit=st.sampled_from([float("inf"), 250.0]))
@settings(max_examples=15, phases=PHASES)
def test_in_single_precision_to_1e_6(seed, faults, limit):
    data = Texts(12, tasks=("T1", "T2"), seed=seed)
    trainer = run(data, faults=faults, limit=limit, loss="model", make=Causal, dtype=torch.float32)
    error = worst_error(trainer, Causal(dtype=torch.float32), data, {"T1": 1.0, "T2": 1.0}, "model")
    assert error < 1e-6


def test_the_faults_above_do_happen():
    """Guards against passing vacuously: such limits and faults make steps fail in both phases."""
    data = Texts(14, seed=3)
    trainer = run(
        data,
        faults=[MemoryFault(call=0, phase="backward"), MemoryFault(call=2, phase="forward")],
        limit=200.0,
        loss="model",
        make=Causal,
    )
    assert trainer.guardian.num_ooms >= 3


@pytest.mark.parametrize("make", [Causal, MeanLoss])
def test_labels_that_a_model_never_predicts_are_not_counted(make):
    # the first label of each row: transformers counts it for models whose loss it does not know, 1.5 % off
    data = Texts(12, seed=4, mask_first=False)
    trainer = run(data, faults=[], limit=250.0, loss="model", make=make)
    assert worst_error(trainer, make(), data, {"T1": 1.0}, "model") < 1e-12
