from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from vlmpack.batching import (
    BatchLRCallback,
    EffectiveBatchSizeNormalizer,
    sample_counted_schedule,
    scaled_learning_rate,
)
from vlmpack.errors import ConfigError

STEPS = 12
SIZES = [4, 16, 7, 32, 1, 9, 16, 64, 3, 5, 8, 11]
SCHEDULES = ("linear", "cosine", "constant", "inverse_sqrt", "polynomial")


class Line(torch.nn.Module):
    """One weight whose gradient is 1, so that an SGD step moves it by the learning rate."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x.double().mean()).sum()}


class Watch(TrainerCallback):
    """Notes the weight after each step."""

    def __init__(self):
        self.weights = [0.0]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.weight.item())


def base_rates(name: str, lr: float = 0.1) -> list[float]:
    """What the schedule gives for a fixed batch size, from a scheduler of its own."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def train(folder, name, callback, model=None):
    watch = Watch()
    model = model or Line()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=0.1,
        lr_scheduler_type=name,
        warmup_steps=3,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)}] * STEPS
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[watch])
    if callback is not None:
        callback.attach(trainer)
    trainer.train()
    return watch.weights, trainer


@pytest.mark.parametrize("rule", ["sqrt", "linear"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_update_is_the_scheduled_rate_times_the_steps_scale(tmp_path, name, rule):
    normalizer = EffectiveBatchSizeNormalizer(16, 32, 0.1, lr_rule=rule)
    taken = iter(SIZES)
    weights, trainer = train(tmp_path, name, BatchLRCallback(normalizer, lambda: next(taken)))
    power = {"sqrt": 0.5, "linear": 1.0}[rule]
    expected = [rate * (size / 16) ** power for rate, size in zip(base_rates(name), SIZES, strict=True)]
    moved = [before - after for before, after in pairwise(weights)]
    assert any(expected)
    for got, want in zip(moved, expected, strict=True):
        assert math.isclose(got, want, rel_tol=1e-12, abs_tol=1e-15)
    # the scheduler never saw the scale
    assert trainer.lr_scheduler.last_epoch == STEPS
    logged = [line for line in trainer.state.log_history if "learning_rate" in line]
    assert [line["lr_scale"] for line in logged] == pytest.approx([(s / 16) ** power for s in SIZES])


def test_the_scheduler_and_the_logged_rates_are_those_of_a_fixed_batch_size(tmp_path):
    _, plain = train(tmp_path / "a", "cosine", None)
    normalizer = EffectiveBatchSizeNormalizer(16, 32, 0.1)
    _, coupled = train(tmp_path / "b", "cosine", BatchLRCallback(normalizer, lambda: 64))
    assert coupled.lr_scheduler.state_dict() == plain.lr_scheduler.state_dict()
    rates = [
        [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
        for trainer in (plain, coupled)
    ]
    assert rates[0] == rates[1]


def test_rates_come_back_to_the_bit_even_after_an_error():
    optimizer = torch.optim.SGD([
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.3)
    ])

    def failing_step():
        with scaled_learning_rate(optimizer, 1 / 3):
            assert [group["lr"] for group in optimizer.param_groups] == [0.1 * (1 / 3), 0.3 * (1 / 3)]
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        failing_step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = torch.optim.Adam(
        [torch.nn.Parameter(torch.zeros(1))], lr=rate, capturable=False, foreach=False
    )
    group = optimizer.param_groups[0]
    held = group["lr"]
    with scaled_learning_rate(optimizer, 0.5):
        assert group["lr"] is held
        assert held.item() == 0.05
    assert group["lr"] is held
    assert held.item() == 0.1


def test_a_step_that_failed_does_not_leave_its_scale_behind():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    callback = BatchLRCallback(EffectiveBatchSizeNormalizer(16, 32, 0.1, lr_rule="linear"), lambda: 32)
    for _ in range(3):  # the optimizer raised: no on_optimizer_step
        callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        assert optimizer.param_groups[0]["lr"] == 0.2
    callback.on_optimizer_step(None, None, None)
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(ConfigError, match="no optimizer"):
        callback.on_pre_optimizer_step(None, None, None)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_a_sample_counted_schedule_follows_samples_and_ends_exactly(name):
    seen = [0]
    for size in SIZES:
        seen.append(seen[-1] + size)
    total, warmup = seen[-1], 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = sample_counted_schedule(
        optimizer, name, samples_at=seen.__getitem__, total_samples=total, warmup_samples=warmup
    )
    # the oracle: a schedule that is stepped once a sample
    single = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    by_one = get_scheduler(name, single, num_warmup_steps=warmup, num_training_steps=total)
    for size in SIZES:
        assert schedule.get_last_lr() == by_one.get_last_lr()
        optimizer.step()
        schedule.step()
        for _ in range(size):
            single.step()
            by_one.step()
    end = 1e-7 if name == "polynomial" else 0.0  # lr_end of transformers' polynomial schedule
    assert schedule.get_last_lr()[0] == pytest.approx(end, abs=1e-17)
    assert schedule.get_last_lr() == by_one.get_last_lr()


def test_a_sample_counted_schedule_resumes_from_the_step_alone():
    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, sample_counted_schedule(
            optimizer, "cosine", samples_at=lambda step: step * step, total_samples=100
        )

    optimizer, schedule = make()
    for _ in range(4):
        optimizer.step()
        schedule.step()
    again_optimizer, again = make()
    again.load_state_dict(schedule.state_dict())
    for one, two in ((optimizer, schedule), (again_optimizer, again)):
        one.step()
        two.step()
    assert again.get_last_lr() == schedule.get_last_lr()


def test_schedules_that_cannot_count_samples_are_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match="warmup_samples"):
        sample_counted_schedule(optimizer, "linear", samples_at=int, total_samples=10, warmup_samples=11)
    with pytest.raises(ConfigError, match="samples_at\\(0\\) is 1"):
        sample_counted_schedule(optimizer, "linear", samples_at=lambda step: step + 1, total_samples=10)
    with pytest.raises(ConfigError, match="no function of its progress"):
        sample_counted_schedule(optimizer, "reduce_lr_on_plateau", samples_at=int, total_samples=10)
