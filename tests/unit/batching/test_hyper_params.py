"""The documented settings of a run, and the optimizer and schedules that they build."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from vlmpack.batching import (
    ExponentialLRConfig,
    LearningRateConfig,
    OptimizerConfig,
    StepBatchSizeConfig,
    TrainingHyperParams,
    WarmupCosineConfig,
)


def groups():
    return {"nn": torch.nn.Linear(2, 2).parameters(), "regression": torch.nn.Linear(2, 1).parameters()}


def test_the_documented_example_builds():
    settings = TrainingHyperParams(
        epochs=100,
        batch_size=128,
        batch_size_scheduler=StepBatchSizeConfig(step_size=20, gamma=2),
        optimizer_config=OptimizerConfig(
            lr=LearningRateConfig(lr_nn=0.001, lr_regression=0.02),
            scheduler_nn=ExponentialLRConfig(gamma=0.95),
        ),
    )
    assert settings.build_scheduler().get_batch_size(45) == 512
    optimizer = settings.optimizer_config.build(groups())
    schedule = settings.optimizer_config.build_schedule(optimizer, epoch_of=lambda step: step / 10)
    assert schedule.get_last_lr() == [0.001, 0.02]
    for _ in range(20):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.001 * 0.95**2, 0.02])


def test_without_a_schedule_the_size_is_constant():
    assert TrainingHyperParams(epochs=100, batch_size=512).build_scheduler() is None


def test_a_schedule_is_told_by_its_type_in_plain_values():
    settings = TrainingHyperParams.model_validate({
        "epochs": 10,
        "batch_size": 8,
        "batch_size_scheduler": {"type": "cosine", "final_batch_size": 32, "duration": 5},
        "optimizer_config": {"scheduler_nn": {"type": "warmup_cosine", "warmup_epochs": 10, "T_max": 100}},
    })
    assert settings.build_scheduler(max_rows=4).micro_batches(32) == (4, 8)
    assert isinstance(settings.optimizer_config.scheduler_nn, WarmupCosineConfig)


def test_warm_up_rises_in_equal_steps_and_the_cosine_ends_at_zero():
    config = WarmupCosineConfig(warmup_epochs=3, T_max=11)
    assert [config.factor(epoch) for epoch in (0, 1, 2, 3)] == [0.25, 0.5, 0.75, 1.0]
    assert config.factor(7) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert config.factor(11) == config.factor(50) == 0.0


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"epochs": 0, "batch_size": 8}, "epochs"),
        ({"epochs": 1, "batch_size": True}, "batch_size"),
        ({"epochs": 1, "batch_size": 8, "shufle": True}, "shufle"),
        ({"epochs": 1, "batch_size": 8, "batch_size_scheduler": {"type": "step", "gamma": 1}}, "gamma"),
        ({"epochs": 1, "batch_size": 8, "optimizer_config": {"name": "lion"}}, "name"),
    ],
)
def test_wrong_settings_are_named(settings, word):
    with pytest.raises(ValidationError, match=word):
        TrainingHyperParams.model_validate(settings)


def test_a_rise_longer_than_the_whole_is_refused():
    with pytest.raises(ValidationError, match="must be below T_max"):
        WarmupCosineConfig(warmup_epochs=10, T_max=10)


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_each_optimizer_has_a_rate_for_each_group(name, kind):
    optimizer = OptimizerConfig(name=name, lr=LearningRateConfig(lr_nn=0.1, lr_regression=0.2)).build(
        groups()
    )
    assert type(optimizer) is kind
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
