"""Prediction by formula, learning from measurements, and the spec's figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlmpack.errors import ConfigError
from vlmpack.memory import (
    LLAVA_7B,
    PRESETS,
    TASKS_3D,
    LinearCost,
    MemoryPredictor,
    TrainingRegime,
    analytic_cost,
    estimate,
    estimate_training_memory,
    print_training_memory,
    task_cost,
)


# ---- formulas ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "samples", "expected"),
    [
        # 0.15 + 0.12 + n * (0.28 + 0.35) * multiplier
        ("T1", 1, 0.27 + 0.63),
        ("T1", 16, 0.27 + 16 * 0.63),
        ("T2", 16, 0.27 + 16 * 0.63 * 1.85),
        ("T3", 16, 0.27 + 16 * 0.63 * 1.87),
    ],
)
def test_the_formula_of_tasks(task, samples, expected):
    assert MemoryPredictor().predict(task, samples) == pytest.approx(expected)


def test_the_multiplier_replaces_the_number_of_images():
    # 18.9 GB for 16 samples of two images; multiplying the two images again would give 37.6
    assert MemoryPredictor().predict("T2", 16) == pytest.approx(18.918)


def test_mixed_batches_add_up():
    predictor = MemoryPredictor()
    expected = 0.27 + 0.63 * (2 + 1.85 + 3 * 1.87)
    assert predictor.predict_batch({"T1": 2, "T2": 1, "T3": 3}) == pytest.approx(expected)
    assert predictor.predict_batch(["T1", "T1", "T2", "T3", "T3", "T3"]) == pytest.approx(expected)


def test_any_number_of_tasks_will_do():
    predictor = MemoryPredictor(task_cost({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}))
    assert predictor.task_types == ("a", "b", "c", "d")
    assert predictor.predict("d", 2) == pytest.approx(0.27 + 2 * 0.63 * 4)


def test_a_frozen_7b_model_costs_08_gb_a_sample_beside_its_14():
    # 8 samples of two images: 14 + 8 * (0.8 + 0.56)
    assert LLAVA_7B.predict({"samples": 8, "extra_images": 8}) == pytest.approx(14e9 + 8 * 1.36e9)


def test_the_memory_model_is_a_linear_cost_too():
    model, regime = PRESETS["nanovlm-460m"], TrainingRegime(mask="padding", holds_logits=True)
    cost = analytic_cost(model, regime, tokens_per_row=4096)
    for rows, tiles in ((1, 20), (2, 100), (4, 250)):
        exact = estimate(model, regime, rows=rows, tokens_per_row=4096, tiles=tiles).peak_requested
        assert cost.predict({"rows": rows, "tiles": tiles}) == pytest.approx(exact, rel=1e-6)


def test_wrong_costs_are_refused():
    with pytest.raises(ConfigError, match="features but"):
        LinearCost(name="x", features=("a", "b"), theta=(1.0,))
    with pytest.raises(ConfigError, match="less than nothing"):
        LinearCost(name="x", features=("a",), theta=(-1.0,))
    with pytest.raises(ConfigError, match="T9"):
        TASKS_3D.predict({"T9": 1})
    with pytest.raises(ConfigError):
        analytic_cost(PRESETS["nanovlm-460m"], TrainingRegime(), tokens_per_row=64, rows=0)


# ---- learning ----------------------------------------------------------------------------------
def test_ten_samples_a_task_bring_the_error_below_a_tenth():
    predictor = MemoryPredictor()
    truth = {"T1": 0.63 * 1.3, "T2": 0.63 * 1.85 * 0.7, "T3": 0.63 * 1.87 * 1.3}
    for number in range(1, 11):
        for task, each in truth.items():
            predictor.predict(task, number)
            predictor.record_actual_memory(task, 0.27 * 1.3 + number * each)
    for task, each in truth.items():
        assert predictor.predict(task, 8) == pytest.approx(0.27 * 1.3 + 8 * each, rel=0.01)
    factors = predictor.adjustment_factors
    assert factors["T1"] == pytest.approx(1.3, rel=0.01)
    assert factors["T2"] == pytest.approx(0.7, rel=0.01)


def test_noisy_tasks_are_predicted_within_their_stated_accuracy():
    rng = np.random.default_rng(0)
    predictor = MemoryPredictor()
    truth = {"T1": 0.63 * 0.7, "T2": 0.63 * 1.85 * 1.3, "T3": 0.63 * 1.87 * 0.7}

    def measured(task: str, samples: int) -> float:
        return (0.27 * 1.3 + samples * truth[task]) * (1 + 0.01 * rng.standard_normal())

    for number in range(1, 11):
        for task in truth:
            predictor.predict(task, number)
            predictor.record_actual_memory(task, measured(task, number))
    factors = []
    for _ in range(5):
        for task, within in (("T1", 0.05), ("T2", 0.08), ("T3", 0.10)):
            predicted = predictor.predict(task, 12)
            actual = measured(task, 12)
            assert abs(predicted - actual) <= within * actual
            predictor.record_actual_memory(task, actual)
        factors.append(predictor.adjustment_factors["T1"])
    assert max(factors) - min(factors) < 0.02


def test_accuracy_is_the_mean_relative_error_of_what_was_predicted():
    predictor = MemoryPredictor()
    assert predictor.get_calibration_accuracy() == {}
    # predicted 2 where 4 came: 50 %; predicted 3 where 2 came: 50 %; predicted 2 where 2.5 came: 20 %
    predictor.record_actual_memory("T1", 4.0, predicted=2.0)
    predictor.record_actual_memory("T1", 2.0, predicted=3.0)
    predictor.record_actual_memory("T2", 2.5, predicted=2.0)
    accuracy = predictor.get_calibration_accuracy()
    assert accuracy["T1"] == pytest.approx(0.5)
    assert accuracy["T2"] == pytest.approx(0.2)
    assert accuracy["overall"] == pytest.approx(0.4)


def test_the_documents_calibration_loop_runs():
    predictor = MemoryPredictor()
    for _ in range(3):
        predictor.predict("T1", 4)
        predictor.record_actual_memory("T1", 3.0)
    assert predictor.get_calibration_accuracy()["T1"] < 0.2


def test_a_batch_may_be_named_instead_of_predicted():
    predictor = MemoryPredictor()
    predictor.record_actual_memory("T1", 2 * predictor.cost.predict({"T1": 4}) / 1e9, batch={"T1": 4})
    assert predictor.predict("T1", 4) > 1.5 * TASKS_3D.predict({"T1": 4}) / 1e9


def test_a_measurement_without_a_prediction_is_refused():
    with pytest.raises(ValueError, match="call predict first"):
        MemoryPredictor().record_actual_memory("T1", 3.0)


@pytest.mark.parametrize("actual", [0, -1.0, math.nan, math.inf])
def test_impossible_measurements_are_refused(actual):
    predictor = MemoryPredictor()
    predictor.predict("T1")
    with pytest.raises(ConfigError):
        predictor.record_actual_memory("T1", actual)


def test_the_documents_way_is_one_factor_a_task():
    predictor = MemoryPredictor(method="ratio")
    raw = predictor.predict("T1", 4)
    predictor.record_actual_memory("T1", 1.5 * raw)
    predictor.predict("T1", 4)
    predictor.record_actual_memory("T1", 1.1 * raw)
    # the mean of 1.5 and 1.1
    assert predictor.adjustment_factors == {"T1": pytest.approx(1.3)}
    assert predictor.predict("T1", 4) == pytest.approx(1.3 * raw)
    assert predictor.predict("T2", 4) == pytest.approx(0.27 + 4 * 0.63 * 1.85)
    assert predictor.upper({"T1": 4}) == pytest.approx(1.1 * 1.3 * raw)


def test_the_upper_bound_is_above_the_prediction():
    predictor = MemoryPredictor()
    assert predictor.upper({"T1": 4}) > predictor.predict("T1", 4)


def test_unknown_methods_tasks_and_sizes_are_refused():
    with pytest.raises(ConfigError, match="method"):
        MemoryPredictor(method="magic")
    with pytest.raises(ConfigError, match="T9"):
        MemoryPredictor().predict("T9")
    with pytest.raises(ConfigError, match="at least one"):
        MemoryPredictor().predict("T1", 0)


# ---- a whole run -------------------------------------------------------------------------------
def test_a_training_runs_memory():
    result = estimate_training_memory(
        num_samples=5000, task_distribution={"T1": 0.4, "T2": 0.3, "T3": 0.3}, batch_size=16, num_epochs=3
    )
    # 270 + 16 * 630 * (0.4 + 0.3 * 1.85 + 0.3 * 1.87) MB
    assert result["per_batch_mb"] == pytest.approx(270 + 16 * 630 * (0.4 + 0.555 + 0.561))
    # sixteen samples of T3
    assert result["estimated_peak_memory_mb"] == pytest.approx(270 + 16 * 630 * 1.87)
    # 5000 / 16 = 312.5
    assert (result["num_batches"], result["total_steps"]) == (313, 939)


def test_the_two_lines_of_the_document(capsys):
    print_training_memory({"per_batch_mb": 15551.28, "estimated_peak_memory_mb": 19119.6})
    assert capsys.readouterr().out == "Per batch: 15551MB\nPeak memory: 19120MB\n"


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": 0},
        {"batch_size": 0},
        {"num_epochs": 0},
        {"task_distribution": {"T1": 0.5}},
        {"task_distribution": {"T1": 1.5, "T2": -0.5}},
        {"task_distribution": {"T9": 1.0}},
    ],
)
def test_impossible_runs_are_refused(wrong):
    right = {"num_samples": 10, "task_distribution": {"T1": 1.0}, "batch_size": 2, "num_epochs": 1}
    with pytest.raises(ConfigError):
        estimate_training_memory(**{**right, **wrong})
