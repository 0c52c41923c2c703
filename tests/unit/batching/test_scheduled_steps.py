"""A schedule in the drop-in Trainer: steps as planned, every sample once an epoch, memory only splits."""

from __future__ import annotations

from collections import Counter

import pytest
from transformers import TrainerCallback

from tests.toy_training import Causal, Texts, arguments, collate, memory_of, relative, weights
from vlmpack.batching import (
    BatchSizeScheduler,
    DynamicBatchingTrainer,
    OOMSimulator,
    RandomSteps,
    ScheduledSteps,
    StepBatchSizeConfig,
    StepPlan,
    plan_batch_sizes,
)
from vlmpack.errors import ConfigError

CONFIG = StepBatchSizeConfig(step_size=12, gamma=2, max_batch_size=8, unit="samples")


def source(**more):
    return ScheduledSteps(CONFIG, 2, num_samples=20, num_epochs=2, seed=3, **more)


def test_steps_grow_within_an_epoch_and_hold_every_sample():
    # 2 for the first 12 samples, then 4: 12, 16; the epoch ends at 20. 4 at 20, and from 24 on 8: 24 and 32.
    made = source()
    assert [len(step) for step in made.batches(0)] == [2] * 6 + [4, 4]
    assert [len(step) for step in made.batches(1)] == [4, 8, 8]
    for epoch in (0, 1):
        assert sorted(sample for step in made.batches(epoch) for sample in step) == list(range(20))


def test_the_order_of_the_samples_does_not_depend_on_the_schedule():
    constant = RandomSteps(20, 5, seed=3)
    for epoch in (0, 1):
        grown, plain = source().batches(epoch), constant.batches(epoch)
        assert [s for step in grown for s in step] == [s for step in plain for s in step]


def test_more_epochs_than_planned_are_refused_and_other_schedules_have_other_names():
    with pytest.raises(ConfigError, match=r"planned for 2 epochs.*wants epoch 2"):
        StepPlan(source(), epochs=3)
    assert StepPlan(source(), epochs=2).epoch_ends == (8, 11)
    assert source().digest == source().digest != source(shuffle=False).digest
    assert source().digest != ScheduledSteps(CONFIG, 1, num_samples=20, num_epochs=2, seed=3).digest


@pytest.mark.parametrize("is_tight", [False, True])
def test_the_trainer_takes_the_planned_steps_whatever_memory_does(tmp_path, is_tight):
    sizes, model = [], Causal()
    steps = source()

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            sizes.append(int(steps.plan.sizes[state.global_step - 1]))

    trainer = DynamicBatchingTrainer(
        model,
        arguments(tmp_path, num_train_epochs=2),
        data_collator=collate,
        train_dataset=Texts(20),
        batch_sampler=steps,
        callbacks=[Watch()],
    )
    simulator = OOMSimulator(memory_of, limit_bytes=100 + 10 * 20 if is_tight else float("inf"))
    with simulator.attached(model):
        result = trainer.train()
    assert result.global_step == steps.plan.total_steps == 11
    assert Counter(sizes) == {2: 6, 4: 3, 8: 2}
    assert (simulator.num_ooms > 0) == is_tight
    if is_tight:
        untouched = Causal()
        DynamicBatchingTrainer(
            untouched,
            arguments(tmp_path, num_train_epochs=2),
            data_collator=collate,
            train_dataset=Texts(20),
            batch_sampler=source(),
        ).train()
        assert relative(weights(model), weights(untouched)) < 1e-12


def test_a_schedule_in_epochs_is_a_step_size_of_the_trainer(tmp_path):
    config = StepBatchSizeConfig(step_size=1, gamma=2)
    scheduler = BatchSizeScheduler(config, 4, announce=lambda _: None)
    trainer = DynamicBatchingTrainer(
        Causal(),
        arguments(tmp_path, num_train_epochs=3),
        data_collator=collate,
        train_dataset=Texts(20),
        step_size=scheduler.get_batch_size,
    )
    expected = plan_batch_sizes(config, 4, num_samples=20, num_epochs=3)
    assert trainer.train().global_step == expected.total_steps == 5 + 3 + 2
