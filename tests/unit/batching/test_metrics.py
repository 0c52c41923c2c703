from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.batching.runs import run
from vlmpack.batching import BatchMetrics, EpochMetrics
from vlmpack.errors import ConfigError


def test_an_epoch_is_the_sum_of_its_steps_by_hand():
    batches = [
        BatchMetrics(
            step=1,
            loss=2.0,
            task_losses={"a": 1.0, "b": 4.0},
            task_types={"a": 2, "b": 1},
            num_samples=3,
            seconds=1.0,
            peak_bytes=10,
            num_ooms=1,
        ),
        BatchMetrics(
            step=2,
            loss=4.0,
            task_losses={"a": 4.0},
            task_types={"a": 1},
            num_samples=1,
            seconds=2.0,
            peak_bytes=30,
        ),
        BatchMetrics(step=3, loss=math.nan, task_types={"b": 2}, num_samples=2, seconds=1.0, peak_bytes=20),
    ]
    epoch = EpochMetrics.of(4, batches, eval_loss=1.5)
    assert epoch.average_loss == (2.0 * 3 + 4.0 * 1) / 4  # by samples; the step without a loss left out
    assert epoch.task_losses == {"a": (1.0 * 2 + 4.0 * 1) / 3, "b": 4.0}
    assert epoch.task_samples == {"a": 3, "b": 3}
    assert (epoch.epoch, epoch.num_steps, epoch.num_samples) == (4, 3, 6)
    assert (epoch.peak_bytes, epoch.average_bytes) == (30, 20.0)
    assert epoch.samples_per_s == 6 / 4.0
    assert (epoch.slowest_samples_per_s, epoch.fastest_samples_per_s) == (0.5, 3.0)
    assert (epoch.num_ooms, epoch.num_non_finite, epoch.seconds, epoch.eval_loss) == (1, 1, 4.0, 1.5)


def test_an_epoch_of_nothing_is_defined():
    empty = EpochMetrics.of(0, [])
    assert (empty.num_steps, empty.samples_per_s, empty.peak_bytes) == (0, 0.0, 0)
    assert math.isnan(empty.average_loss)


def same(a, b):
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


@given(
    st.floats(),
    st.dictionaries(st.text(min_size=1, max_size=3), st.floats(), max_size=3),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
def test_records_survive_json_which_has_no_nan(loss, task_losses, grad_norm):
    record = BatchMetrics(step=3, loss=loss, task_losses=task_losses, grad_norm=grad_norm)
    text = json.dumps(record.to_json(), allow_nan=False)
    back = BatchMetrics.from_json(json.loads(text))
    finite = loss if math.isfinite(loss) else math.nan
    assert same(back.loss, finite)
    assert back.grad_norm == grad_norm
    assert set(back.task_losses) == set(task_losses)
    for task, value in task_losses.items():
        assert same(back.task_losses[task], value if math.isfinite(value) else math.nan)


def test_a_whole_run_survives_json():
    batches = run()
    assert [BatchMetrics.from_json(json.loads(json.dumps(each.to_json()))) for each in batches] == batches
    epoch = EpochMetrics.of(0, batches)
    assert EpochMetrics.from_json(json.loads(json.dumps(epoch.to_json()))) == epoch


def test_records_of_another_version_and_negative_counts_are_refused():
    with pytest.raises(ConfigError, match=r"metrics have no \['speed'\]"):
        BatchMetrics.from_json({"step": 1, "loss": 1.0, "speed": 3})
    with pytest.raises(ConfigError, match="these are no metrics"):
        BatchMetrics.from_json({"step": 1})
    with pytest.raises(ConfigError, match="num_samples is a count, got -1"):
        BatchMetrics(step=1, loss=1.0, num_samples=-1)


def test_throughput_is_zero_where_nobody_measured():
    assert BatchMetrics(step=1, loss=1.0, num_samples=8).samples_per_s == 0.0
    assert BatchMetrics(step=1, loss=1.0, num_samples=8, seconds=0.5).samples_per_s == 16.0
