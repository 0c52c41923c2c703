"""The drop-in Trainer: same gradients as a large batch, whatever is split; epochs, logs, resume."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import Trainer, TrainerCallback

from tests.toy_training import Causal, MeanLoss, Texts, arguments, collate, memory_of, relative, weights
from vlmpack.batching import DynamicBatchingTrainer, GradientCheckpointManager, OOMGuardian, OOMSimulator
from vlmpack.batching.testing import optimizer_fault, simulated_oom
from vlmpack.errors import ConfigError, OversizeError, VlmpackError


def trained(folder, *, model=None, simulator=None, data=None, trainer_class=DynamicBatchingTrainer, **more):
    settings = {name: more.pop(name) for name in list(more) if name in TRAINER_KWARGS}
    model = model or Causal()
    trainer = trainer_class(
        model,
        arguments(folder, **more),
        data_collator=collate,
        train_dataset=data or Texts(20),
        **settings,
    )
    simulator = simulator or OOMSimulator()
    with simulator.attached(model):
        result = trainer.train()
    return trainer, result


TRAINER_KWARGS = {"task_loss_weights", "loss", "non_finite", "oom_guardian", "callbacks", "step_size"}


def test_it_trains_as_the_plain_trainer_does_when_nothing_is_split(tmp_path):
    ours, result = trained(tmp_path, train_sampling_strategy="sequential")
    plain, expected = trained(tmp_path, train_sampling_strategy="sequential", trainer_class=Trainer)
    assert relative(weights(ours.model), weights(plain.model)) < 1e-14
    assert result.global_step == expected.global_step == 3
    assert result.training_loss == pytest.approx(expected.training_loss, rel=1e-6)


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("model", [Causal, MeanLoss])
def test_splitting_changes_nothing_but_memory(tmp_path, phase, model):
    whole, _ = trained(tmp_path, model=model())
    simulator = OOMSimulator(memory_of, limit_bytes=100 + 10 * 20, phase=phase)
    split, _ = trained(tmp_path, model=model(), simulator=simulator)
    assert simulator.num_ooms >= 1
    assert split.guardian.num_ooms == simulator.num_ooms
    assert relative(weights(split.model), weights(whole.model)) < 1e-12


def test_three_epochs_are_one_plan_and_callbacks_see_every_epoch(tmp_path):
    seen = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            seen.append(("begin", state.global_step, round(state.epoch or 0.0, 6)))

        def on_epoch_end(self, args, state, control, **kwargs):
            seen.append(("end", state.global_step, round(state.epoch, 6)))

    trainer, result = trained(tmp_path, num_train_epochs=3, callbacks=[Clock()])
    assert result.global_step == 9  # 20 samples in steps of 8: 3 an epoch
    assert seen == [
        ("begin", 0, 0.0),
        ("end", 3, 1.0),
        ("begin", 3, 1.0),
        ("end", 6, 2.0),
        ("begin", 6, 2.0),
        ("end", 9, 3.0),
    ]
    assert trainer.state.epoch == 3.0


def test_evaluation_saving_and_logging_by_epoch_happen_at_the_plans_epochs(tmp_path):
    model = Causal()
    trainer = DynamicBatchingTrainer(
        model,
        arguments(
            tmp_path,
            num_train_epochs=3,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
        ),
        data_collator=collate,
        train_dataset=Texts(20),
        eval_dataset=Texts(5, seed=1),
    )
    trainer.train()
    epochs = [entry["epoch"] for entry in trainer.state.log_history if "eval_loss" in entry]
    logged = [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry]
    assert epochs == logged == [1.0, 2.0, 3.0]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-9",
    ]


def test_steps_that_grow_over_the_epochs_keep_the_schedule_exact(tmp_path):
    # 101 samples in steps of 8, 16, 32, 32: 13 + 7 + 4 + 4 = 28 steps; every sample comes four times
    data = Counting(Texts(101))
    trainer, result = trained(
        tmp_path,
        data=data,
        num_train_epochs=4,
        step_size=lambda epoch: (8, 16, 32, 32)[epoch],
        lr_scheduler_type="linear",
    )
    assert result.global_step == 28
    assert set(data.read.values()) == {4}
    assert len(data.read) == 101
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}


class Counting:
    """Counts how often each sample is read."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset
        self.read = Counter()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        self.read[index] += 1
        return self.dataset[index]


def test_accumulation_makes_the_step_larger_not_the_loop(tmp_path):
    trainer, result = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole, expected = trained(tmp_path)
    assert result.global_step == expected.global_step == 3
    assert relative(weights(trainer.model), weights(whole.model)) < 1e-14


def test_max_steps_may_run_past_the_epochs(tmp_path):
    trainer, result = trained(tmp_path, max_steps=7)
    assert result.global_step == 7
    assert trainer.state.epoch == pytest.approx(2 + 1 / 3)


# ---- tasks -----------------------------------------------------------------------------------------
def expected_gradient(data, task_weights, *, per_sample=False):
    """The gradient of the whole data set, sample by sample: an oracle without any batching."""
    model = Causal()
    parts = []
    for sample in data.samples:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
        count = int((labels[:, 1:] != -100).sum())
        if count:
            mean = model(ids, labels)["loss"]
            weight = task_weights[sample["task_type"]]
            parts.append((mean * weight, 1) if per_sample else (mean * weight * count, count))
    total = sum(count for _, count in parts)
    (sum(loss for loss, _ in parts) / total).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("loss", ["model", "token", "sample"])
@pytest.mark.parametrize("limit", [float("inf"), 250.0])
def test_task_weights_and_every_kind_of_loss_are_exact_under_any_split(tmp_path, loss, limit):
    data = Texts(12, tasks=("T1", "T2", "T3"), seed=5)
    task_weights = {"T1": 0.5, "T2": 2.0, "T3": 1.0}
    before = weights(Causal())
    trainer, _ = trained(
        tmp_path,
        data=data,
        simulator=OOMSimulator(memory_of, limit_bytes=limit, phase="random"),
        per_device_train_batch_size=12,
        task_loss_weights=task_weights,
        loss=loss,
    )
    found = (before - weights(trainer.model)) / 0.1  # plain SGD: the step is the gradient
    assert relative(found, expected_gradient(data, task_weights, per_sample=loss == "sample")) < 1e-12
    assert bool(trainer.guardian.num_ooms) == (limit < 1e9)


def test_losses_are_logged_by_task_and_agree_with_a_forward_pass(tmp_path):
    data = Texts(8, tasks=("T1", "T2"), seed=2)
    trainer, _ = trained(tmp_path, data=data, logging_strategy="steps", logging_steps=1)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (entry["samples_T1"], entry["samples_T2"], entry["num_ooms"]) == (4, 4, 0)
    model = Causal()
    for task in ("T1", "T2"):
        with torch.no_grad():
            batch = collate([sample for sample in data.samples if sample["task_type"] == task])
            assert entry[f"loss_{task}"] == pytest.approx(float(model(**batch)["loss"]), rel=1e-6)
    assert trainer.last_step.task_samples == {"T1": 4, "T2": 4}
    assert trainer.last_step.num_samples == 8


def test_default_weights_are_documented_and_a_given_set_is_strict(tmp_path):
    trainer, _ = trained(tmp_path, data=Texts(8, tasks=("T1", "T9")))
    assert trainer.task_loss_weights == {"T1": 1.0, "T2": 1.0, "T3": 1.0}
    with pytest.raises(ConfigError, match="task 'T9' has no weight"):
        trained(tmp_path, data=Texts(8, tasks=("T1", "T9")), task_loss_weights={"T1": 1.0})


# ---- faults ----------------------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_names_its_samples(tmp_path):
    with pytest.raises(VlmpackError, match=r"step 0: the loss is not finite for samples .*skip_step"):
        trained(tmp_path, model=Poisoned())


def test_a_step_that_is_not_finite_can_be_left_out_and_is_counted(tmp_path):
    before = weights(Poisoned())
    trainer, result = trained(
        tmp_path, model=Poisoned(), non_finite="skip_step", logging_strategy="steps", logging_steps=3
    )
    assert result.global_step == 3
    assert torch.equal(weights(trainer.model), before)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["num_skipped_steps"] == 3


class Poisoned(Causal):
    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids, labels, **kwargs)
        return {**output, "loss": output["loss"] * float("nan")} if self.training else output


def test_a_step_without_any_supervised_label_is_refused(tmp_path):
    data = Texts(4)
    for sample in data.samples:
        sample["labels"] = [-100] * len(sample["labels"])
    with pytest.raises(VlmpackError, match=r"no label of the step is supervised .*s0"):
        trained(tmp_path, data=data)


def test_an_optimizer_that_runs_out_of_memory_is_fatal_and_says_what_to_do(tmp_path):
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            if any(group["lr"] for group in self.param_groups):  # priming steps at a rate of 0
                raise simulated_oom()

    model = Causal()
    trainer = DynamicBatchingTrainer(
        model,
        arguments(tmp_path),
        data_collator=collate,
        train_dataset=Texts(8),
        optimizers=(Breaks(model.parameters(), lr=0.1), None),
    )
    with pytest.raises(VlmpackError, match=r"inside of the optimizer's step 0.*Resume from the last"):
        trainer.train()


def test_the_optimizers_state_is_there_before_the_first_batch(tmp_path):
    model = Causal()
    trainer = DynamicBatchingTrainer(
        model, arguments(tmp_path, optim="adamw_torch"), data_collator=collate, train_dataset=Texts(8)
    )
    trainer.create_optimizer()
    with optimizer_fault(after=0):  # nothing is left to allocate in the step
        trainer.train()


def test_a_sample_that_does_not_fit_alone_is_named_or_left_out(tmp_path):
    data = Texts(8, longest=4)
    data.samples[3] = {"input_ids": [1] * 30, "labels": [-100] + [1] * 29, "task_type": "T1", "key": "long"}
    simulator = OOMSimulator(memory_of, limit_bytes=300)
    with pytest.raises(OversizeError, match=r"sample long does not fit in memory alone: task T1, 30 tokens"):
        trained(tmp_path, data=data, simulator=simulator)
    before = weights(Causal())
    trainer, _ = trained(
        tmp_path,
        data=data,
        simulator=OOMSimulator(memory_of, limit_bytes=300),
        oom_guardian=OOMGuardian(single_sample="isolate_and_report"),
        logging_strategy="steps",
        logging_steps=1,
    )
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["num_isolated"] == 1
    del data.samples[3]  # the step is that of the other samples, its denominator included
    expected = expected_gradient(data, {"T1": 1.0})
    assert relative((before - weights(trainer.model)) / 0.1, expected) < 1e-12


def test_checkpointing_is_turned_on_for_a_sample_that_does_not_fit_alone(tmp_path):
    model = Causal()

    def memory(inputs):
        each = 4.0 if GradientCheckpointManager.is_enabled(model) else 10.0
        return 100.0 + each * inputs["input_ids"].numel()

    data = Texts(4, longest=4)
    data.samples[3] = {"input_ids": [1] * 30, "labels": [-100] + [1] * 29, "task_type": "T1", "key": "long"}
    guardian = OOMGuardian(single_sample="checkpoint_then_retry")
    _, result = trained(
        tmp_path,
        model=model,
        data=data,
        simulator=OOMSimulator(memory, limit_bytes=300),
        oom_guardian=guardian,
    )
    assert GradientCheckpointManager.is_enabled(model)
    assert result.global_step == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "median"}, "loss must be one of"),
        ({"non_finite": "hide"}, "non_finite must be one of"),
        ({"task_loss_weights": {"T1": -1.0}}, "loss weight of task 'T1' must be a number of 0 or more"),
        ({"train_sampling_strategy": "group_by_length"}, "orders samples for fixed batches"),
        ({"step_size": 0}, "positive number of samples"),
    ],
)
def test_wrong_settings_are_named(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, **settings)


def test_a_users_own_optimizer_is_primed_too_and_a_second_run_goes_on(tmp_path):
    model = Causal()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = DynamicBatchingTrainer(
        model,
        arguments(tmp_path),
        data_collator=collate,
        train_dataset=Texts(8),
        optimizers=(optimizer, None),
    )
    trainer.create_optimizer()
    with optimizer_fault(after=0):
        trainer.train()
    moment = optimizer.state[model.head.weight]["exp_avg"].clone()
    trainer.train()
    assert not torch.equal(optimizer.state[model.head.weight]["exp_avg"], moment)
