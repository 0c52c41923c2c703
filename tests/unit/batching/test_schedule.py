"""Batch-size schedules: the documented tables to the last number, and what the documents leave open."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vlmpack.batching import (
    BatchSizeScheduler,
    CosineBatchSizeConfig,
    ExponentialBatchSizeConfig,
    FunctionBatchSizeConfig,
    LinearBatchSizeConfig,
    StepBatchSizeConfig,
    parse_schedule,
    plan_batch_sizes,
)
from vlmpack.errors import ConfigError


def sizes(config, initial, epochs):
    scheduler = BatchSizeScheduler(config, initial, announce=lambda _: None)
    return [scheduler.get_batch_size(epoch) for epoch in epochs]


@pytest.mark.parametrize(
    ("initial", "step_size", "gamma", "cap", "table"),
    [
        (256, 20, 2, 2048, {0: 256, 19: 256, 20: 512, 39: 512, 40: 1024, 60: 2048, 79: 2048, 80: 2048}),
        (128, 10, 2, 1024, {0: 128, 9: 128, 10: 256, 19: 256, 20: 512, 29: 512, 30: 1024, 49: 1024}),
        (64, 15, 4, 4096, {0: 64, 14: 64, 15: 256, 29: 256, 30: 1024, 44: 1024, 45: 4096, 59: 4096}),
    ],
)
def test_the_documented_growth_tables(initial, step_size, gamma, cap, table):
    config = StepBatchSizeConfig(step_size=step_size, gamma=gamma, max_batch_size=cap)
    assert sizes(config, initial, table) == list(table.values())


@pytest.mark.parametrize(
    ("step_size", "gamma", "cap"),
    [(25, 2, 2048), (15, 2, 4096), (25, 2, None), (3, 2, None), (15, 2, 1024), (10, 2, 512), (50, 2, 4096)],
)
def test_the_recommended_configurations_follow_the_formula(step_size, gamma, cap):
    config = StepBatchSizeConfig(step_size=step_size, gamma=gamma, max_batch_size=cap)
    for epoch in (0, step_size - 1, step_size, 2 * step_size, 3 * step_size + 1):
        expected = 128
        for _ in range(epoch // step_size):
            expected *= gamma
        assert sizes(config, 128, [epoch]) == [expected if cap is None else min(expected, cap)]


def test_changes_are_printed_once_in_the_documented_words(capsys):
    config = StepBatchSizeConfig(step_size=20, gamma=2, max_batch_size=2048)
    scheduler = BatchSizeScheduler(config, 256)
    for epoch in range(100):
        scheduler.step(epoch)
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 20: Updating batch size from 256 to 512",
        "Epoch 40: Updating batch size from 512 to 1024",
        "Epoch 60: Updating batch size from 1024 to 2048",
    ]


def test_step_compares_with_the_size_it_returned_last_whatever_was_skipped():
    scheduler = BatchSizeScheduler(StepBatchSizeConfig(step_size=20, gamma=2), 256, announce=lambda _: None)
    assert scheduler.should_update(45)
    assert scheduler.should_update(45), "asking changes nothing"
    assert scheduler.step(45) == (1024, True)
    assert scheduler.step(46) == (1024, False)
    assert not scheduler.should_update(59)
    assert scheduler.step(3) == (256, True), "going back is a change too"


def test_state_goes_through_json_and_foreign_state_is_refused():
    config = StepBatchSizeConfig(step_size=20, gamma=2)
    scheduler = BatchSizeScheduler(config, 256, announce=lambda _: None)
    scheduler.step(45)
    state = json.loads(json.dumps(scheduler.state_dict()))
    resumed = BatchSizeScheduler(config, 256, announce=lambda _: None)
    resumed.load_state_dict(state)
    assert resumed.step(46) == (1024, False)
    other = BatchSizeScheduler(StepBatchSizeConfig(step_size=10, gamma=2), 256)
    with pytest.raises(ConfigError, match=r"'step_size': 20.*'step_size': 10"):
        other.load_state_dict(state)


def test_a_cap_below_the_initial_size_warns_and_follows_the_formula():
    config = StepBatchSizeConfig(step_size=20, gamma=2, max_batch_size=128)
    with pytest.warns(UserWarning, match="128 is below the initial batch size 256"):
        scheduler = BatchSizeScheduler(config, 256, announce=lambda _: None)
    assert scheduler.step(0) == (128, True)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"step_size": 20, "gamma": 1}, "gamma"),
        ({"step_size": 0, "gamma": 2}, "step_size"),
        ({"step_size": "20", "gamma": 2}, "step_size"),
        ({"step_size": True, "gamma": 2}, "step_size"),
        ({"step_size": 20, "gamma": 2.0}, "gamma"),
        ({"step_size": 20, "gamma": 2, "max_batch_size": 0}, "max_batch_size"),
        ({"step_size": 20, "gamma": 2, "maxbatch": 64}, "maxbatch"),
        ({"gamma": 2}, "step_size"),
    ],
)
def test_wrong_step_settings_are_named(settings, word):
    with pytest.raises(ValidationError, match=word):
        StepBatchSizeConfig(**settings)
    with pytest.raises(ConfigError, match=word):
        parse_schedule({"type": "step", **settings})


def test_assigning_a_wrong_value_is_refused_too():
    config = StepBatchSizeConfig(step_size=20, gamma=2)
    with pytest.raises(ValidationError, match="gamma"):
        config.gamma = 1


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "8"])
def test_wrong_sizes_are_refused(bad):
    with pytest.raises(ConfigError, match="initial_batch_size"):
        BatchSizeScheduler(StepBatchSizeConfig(step_size=1, gamma=2), bad)


@pytest.mark.parametrize("bad", [-1, True, 1.5])
def test_wrong_progress_is_refused(bad):
    scheduler = BatchSizeScheduler(StepBatchSizeConfig(step_size=1, gamma=2), 8)
    with pytest.raises(ConfigError, match="epochs must be an integer"):
        scheduler.get_batch_size(bad)


def test_ramps_pass_through_points_worked_by_hand():
    # 8 to 72 over 16: 4 a unit. With increments of 16 the size waits for whole ones: 0, 16 after 4 units, ...
    linear = LinearBatchSizeConfig(final_batch_size=72, duration=16)
    assert sizes(linear, 8, [0, 1, 4, 15, 16, 99]) == [8, 12, 24, 68, 72, 72]
    stairs = LinearBatchSizeConfig(final_batch_size=72, duration=16, increment=16)
    assert sizes(stairs, 8, [0, 3, 4, 7, 8, 15, 16]) == [8, 8, 24, 24, 40, 56, 72]
    # 8 * (128 / 8)^(p / 4): 8, 16, 32, 64, 128.
    exponential = ExponentialBatchSizeConfig(final_batch_size=128, duration=4)
    assert sizes(exponential, 8, range(6)) == [8, 16, 32, 64, 128, 128]
    # half a cosine: a quarter of the way up the gain is (1 - cos 45 degrees) / 2 = 0.1464, half way 0.5.
    cosine = CosineBatchSizeConfig(final_batch_size=1008, duration=4)
    assert sizes(cosine, 8, range(5)) == [8, 8 + math.floor(146.4), 508, 8 + math.floor(853.5), 1008]


@given(
    kind=st.sampled_from([LinearBatchSizeConfig, ExponentialBatchSizeConfig, CosineBatchSizeConfig]),
    initial=st.integers(1, 500),
    final=st.integers(1, 500),
    duration=st.integers(1, 50),
    increment=st.integers(1, 40),
)
def test_ramps_are_monotone_and_end_at_their_ends(kind, initial, final, duration, increment):
    config = kind(final_batch_size=final, duration=duration, increment=increment)
    ramp = sizes(config, initial, range(duration + 3))
    assert ramp[0] == initial
    assert ramp[duration:] == [final] * 3
    assert ramp == sorted(ramp, reverse=final < initial)
    assert all((size - initial) % increment == 0 for size in ramp[:duration])


def test_a_function_of_the_users_own_is_checked_when_it_is_asked():
    config = FunctionBatchSizeConfig(function=lambda epoch, initial: initial + 3 * epoch, max_batch_size=20)
    assert sizes(config, 8, range(6)) == [8, 11, 14, 17, 20, 20]
    broken = FunctionBatchSizeConfig(function=lambda epoch, initial: initial / 2)
    with pytest.raises(ConfigError, match=r"returned 4.0 at 0 epochs"):
        sizes(broken, 8, [0])


def test_a_schedule_comes_from_a_line_a_file_or_a_mapping(tmp_path):
    expected = StepBatchSizeConfig(step_size=20, gamma=2, max_batch_size=2048)
    (tmp_path / "schedule.yaml").write_text("type: step\nstep_size: 20\ngamma: 2\nmax_batch_size: 2048\n")
    (tmp_path / "schedule.json").write_text(expected.model_dump_json())
    assert parse_schedule("type=step, step_size=20, gamma=2, max_batch_size=2048") == expected
    assert parse_schedule(expected.model_dump_json()) == expected
    assert parse_schedule(str(tmp_path / "schedule.yaml")) == expected
    assert parse_schedule(tmp_path / "schedule.json") == expected
    assert parse_schedule(expected.model_dump()) == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("type=step,step_size=20", "gamma"),
        ("type=sine,step_size=20", "sine"),
        ("step_size=20,gamma=2", "type"),
        ("{not json", "not JSON"),
        ("nowhere.yaml", "no schedule file"),
        ("type=function", "Python only"),
        ("type=step,step_size=[", "YAML"),
    ],
)
def test_what_is_no_schedule_says_why(source, words):
    with pytest.raises(ConfigError, match=words):
        parse_schedule(source)


def test_a_list_in_a_file_is_no_schedule(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="mapping"):
        parse_schedule(tmp_path / "list.yaml")


def test_micro_batches_are_even_and_never_over_what_the_device_takes():
    scheduler = BatchSizeScheduler(StepBatchSizeConfig(step_size=1, gamma=2), 100, max_rows=48)
    # 100 rows in at most 48 at once need 3 passes, of 34, 33 and 33.
    assert scheduler.micro_batches() == (34, 3)
    assert scheduler.micro_batches(48) == (48, 1)
    assert BatchSizeScheduler(StepBatchSizeConfig(step_size=1, gamma=2), 100).micro_batches() == (100, 1)
    with pytest.raises(ConfigError, match="at least 1"):
        scheduler.micro_batches(0)


def test_a_plan_counts_every_step_of_a_growing_batch():
    # 8, 16, 32, 32 over four epochs of 101 samples: 13 + 7 + 4 + 4 steps.
    config = StepBatchSizeConfig(step_size=1, gamma=2, max_batch_size=32)
    made = plan_batch_sizes(config, 8, num_samples=101, num_epochs=4)
    assert made.epoch_starts.tolist() == [0, 13, 20, 24, 28]
    assert made.total_steps == 28
    assert made.sizes[:13].tolist() == [8] * 12 + [5]
    assert (made.total_samples, made.samples_at(13), made.samples_at(28), made.samples_at(99)) == (
        404,
        101,
        404,
        404,
    )
    assert [made.epoch_of(step) for step in (0, 12, 13, 27)] == [0, 0, 1, 3]
    dropped = plan_batch_sizes(config, 8, num_samples=101, num_epochs=4, drop_last=True)
    assert dropped.epoch_starts.tolist() == [0, 12, 18, 21, 24]
    assert dropped.total_samples == 96 * 4


def test_samples_and_tokens_move_the_size_within_an_epoch():
    samples = StepBatchSizeConfig(step_size=40, gamma=2, unit="samples")
    # 10 at 0, 10, 20, 30; 20 at 40 and 60; then 80 is 2 doublings: 40, cut to the 20 that are left.
    assert plan_batch_sizes(samples, 10, num_samples=100, num_epochs=1).sizes.tolist() == [10] * 4 + [
        20,
        20,
        20,
    ]
    tokens = StepBatchSizeConfig(step_size=40 * 4096, gamma=2, unit="tokens")
    by_tokens = plan_batch_sizes(tokens, 10, num_samples=100, num_epochs=1, tokens_per_sample=4096)
    assert by_tokens.sizes.tolist() == [10] * 4 + [20, 20, 20]
    with pytest.raises(ConfigError, match="tokens_per_sample"):
        plan_batch_sizes(tokens, 10, num_samples=100, num_epochs=1)


@given(
    initial=st.integers(1, 60),
    num_samples=st.integers(1, 300),
    num_epochs=st.integers(1, 4),
    unit=st.sampled_from(["epochs", "samples"]),
)
def test_a_plan_has_each_sample_once_an_epoch(initial, num_samples, num_epochs, unit):
    config = LinearBatchSizeConfig(final_batch_size=64, duration=3 if unit == "epochs" else 200, unit=unit)
    made = plan_batch_sizes(config, initial, num_samples=num_samples, num_epochs=num_epochs)
    per_epoch = [
        made.sizes[low:high].sum()
        for low, high in zip(made.epoch_starts, made.epoch_starts[1:], strict=False)
    ]
    assert per_epoch == [num_samples] * num_epochs
    assert (made.sizes > 0).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_samples": 0, "num_epochs": 1}, "num_samples"),
        ({"num_samples": 4, "num_epochs": True}, "num_epochs"),
        ({"num_samples": 4, "num_epochs": 1, "drop_last": True}, "no step is left"),
    ],
)
def test_plans_without_steps_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        plan_batch_sizes(StepBatchSizeConfig(step_size=1, gamma=2), 8, **settings)


def test_a_learning_rate_in_samples_ends_with_the_last_step_of_a_growing_batch():
    from vlmpack.batching import sample_counted_schedule

    made = plan_batch_sizes(StepBatchSizeConfig(step_size=1, gamma=2), 8, num_samples=101, num_epochs=4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = sample_counted_schedule(
        optimizer, "linear", samples_at=made.samples_at, total_samples=made.total_samples
    )
    for _ in range(made.total_steps):
        assert schedule.get_last_lr()[0] > 0, "not before the last step"
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [0.0]


def test_a_picture_shows_the_sizes_and_what_the_device_takes(tmp_path):
    config = StepBatchSizeConfig(step_size=20, gamma=2, max_batch_size=2048)
    scheduler = BatchSizeScheduler(config, 256, max_rows=600)
    figure = scheduler.plot(100, tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").stat().st_size > 5_000
    curve, at_once, limit = figure.axes[0].get_lines()
    assert curve.get_ydata()[[0, 20, 99]].tolist() == [256, 512, 2048]
    assert max(at_once.get_ydata()) <= 600 == limit.get_ydata()[0]
    assert scheduler.batch_size == 256, "drawing moves nothing"
    with pytest.raises(ConfigError, match="at least"):
        scheduler.plot(0)
