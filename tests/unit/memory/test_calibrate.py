"""Learning in worlds whose memory function the predictor cannot see: error, failures, utilisation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks import memory_worlds
from vlmpack.errors import ConfigError
from vlmpack.memory import CalibratedCost, ConformalMargin, LinearCost, RecursiveCalibrator
from vlmpack.memory.calibrate import quantile_factor

COST = LinearCost(name="test", features=("batch", "a", "b"), theta=(2e9, 1e9, 3e9))


# ---- least squares -----------------------------------------------------------------------------
def test_exact_measurements_are_learned_in_as_many_batches_as_features():
    calibrator = RecursiveCalibrator(cost=COST)
    truth = {"batch": 3e9, "a": 0.6e9, "b": 3.6e9}
    for a, b in ((1, 0), (0, 5), (7, 2), (3, 3)):
        calibrator.observe({"a": a, "b": b}, truth["batch"] + a * truth["a"] + b * truth["b"])
    assert calibrator.predict({"a": 10, "b": 10}) == pytest.approx(3e9 + 6e9 + 36e9, rel=0.01)


def test_least_squares_equals_the_weighted_batch_solution():
    # an independent oracle: ridge regression about the prior, each row weighted by its size and its age
    rng = np.random.default_rng(0)
    calibrator = RecursiveCalibrator(cost=COST)
    rows, sizes = [], []
    for _ in range(40):
        counts = {"a": int(rng.integers(1, 9)), "b": int(rng.integers(1, 9))}
        size = float(3e9 + counts["a"] * 1.2e9 + counts["b"] * 2.5e9) * (1 + 0.01 * rng.standard_normal())
        calibrator.observe(counts, size)
        rows.append(COST.vector(counts))
        sizes.append(size)
    phi, y = np.array(rows), np.array(sizes)
    age = 0.995 ** np.arange(40, 0, -1)[:, None]
    # the newest row has weight 1 / (forgetting * noise^2), and each older one is discounted once more
    weight = age[:, 0] / (0.995 * (0.01 * y) ** 2) / 0.995 * 0.995
    prior = np.array(COST.theta)
    precision = np.diag(0.995**40 / (0.6 * prior) ** 2)
    left = precision + phi.T @ (weight[:, None] * phi)
    right = precision @ prior + phi.T @ (weight * y)
    assert calibrator.theta == pytest.approx(np.linalg.solve(left, right), rel=1e-6)


def test_a_static_part_is_not_learned():
    cost = LinearCost(name="static", features=("a",), theta=(1e9,), static_bytes=10e9)
    calibrator = RecursiveCalibrator(cost=cost)
    for n in (1, 2, 3):
        calibrator.observe({"a": n}, 10e9 + 2e9 * n)
    assert calibrator.theta[0] == pytest.approx(2e9, rel=0.01)


@pytest.mark.parametrize("actual", [0.0, -1.0, math.nan, math.inf])
def test_impossible_measurements_are_refused(actual):
    with pytest.raises(ConfigError):
        RecursiveCalibrator(cost=COST).observe({"a": 1}, actual)


@pytest.mark.parametrize("wrong", [{"forgetting": 0.0}, {"forgetting": 1.1}, {"spread": 0.0}])
def test_impossible_calibrators_are_refused(wrong):
    with pytest.raises(ConfigError):
        RecursiveCalibrator(cost=COST, **wrong)


# ---- margin ------------------------------------------------------------------------------------
def test_the_factor_is_a_quantile():
    ratios = [1.0, 1.1, 1.2, 1.3, 1.4]
    # rank 0.5 * 6 = 3: the third
    assert quantile_factor(ratios, 0.5) == pytest.approx(1.2)
    # rank 0.75 * 6 = 4.5: between the fourth and the fifth
    assert quantile_factor(ratios, 0.25) == pytest.approx(1.35)


def test_beyond_the_largest_ratio_the_factor_grows():
    ratios = [1.0, 1.1, 1.2, 1.3, 1.4]
    # rank 6: one more than there are, times the gap of 0.2 to the median
    assert quantile_factor(ratios, 0.0) == pytest.approx(1.6)
    assert quantile_factor(ratios, -0.5) > quantile_factor(ratios, 0.0)
    assert quantile_factor(ratios, 0.99) == 1.0


def test_failures_raise_the_factor_and_successes_lower_it_slowly():
    margin = ConformalMargin(alpha=0.05)
    for ratio in np.linspace(0.98, 1.02, 50):
        margin.observe(float(ratio))
    before = margin.factor
    margin.observe(1.0, failed=True)
    assert margin.factor > before
    level = margin.level
    margin.observe(1.0)
    # one failure weighs as much as (1 - alpha) / alpha = 19 successes
    assert (margin.level - level) * 19 == pytest.approx(0.5 * 0.05 * 0.95)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 0.5, 5])
def test_an_alpha_that_is_no_small_share_is_refused(alpha):
    with pytest.raises(ConfigError):
        ConformalMargin(alpha=alpha)


# ---- together ----------------------------------------------------------------------------------
def test_parts_of_a_failed_batch_do_not_pay_for_it():
    cost = CalibratedCost(cost=COST, alpha=0.05)
    for n in range(1, 40):
        cost.observe({"a": n % 5 + 1, "b": n % 7}, cost.predict({"a": n % 5 + 1, "b": n % 7}))
    cost.observe_failure({"a": 5, "b": 5}, 22e9)
    level = cost.margin.level
    cost.observe({"a": 2, "b": 3}, cost.predict({"a": 2, "b": 3}), part=True)
    assert cost.margin.level == level
    assert cost.num_failures == 1


def test_an_unknown_batch_gets_a_wide_bound():
    cost = CalibratedCost(cost=COST)
    assert cost.upper({"a": 5, "b": 5}) > 1.5 * cost.predict({"a": 5, "b": 5})


def test_a_failure_before_anything_is_known_teaches_the_coefficients():
    cost = CalibratedCost(cost=COST)
    before = cost.predict({"a": 5, "b": 5})
    cost.observe_failure({"a": 5, "b": 5}, 1.5 * before)
    assert cost.predict({"a": 5, "b": 5}) > 1.2 * before


def test_a_state_goes_on_where_it_was():
    first = CalibratedCost(cost=COST)
    for n in range(1, 30):
        first.observe({"a": n % 5, "b": n % 3 + 1}, 1e9 * (3 + n % 5 + 3 * (n % 3)))
    second = CalibratedCost(cost=COST)
    second.load_state_dict(first.state_dict())
    for cost in (first, second):
        cost.observe({"a": 3, "b": 1}, 9e9)
        cost.observe_failure({"a": 9, "b": 9}, 30e9)
    assert second.upper({"a": 4, "b": 2}) == first.upper({"a": 4, "b": 2})
    assert second.num_failures == first.num_failures


def test_a_state_of_something_else_is_refused():
    cost = CalibratedCost(cost=COST)
    with pytest.raises(ConfigError):
        cost.load_state_dict({"theta": [1.0]})
    other = CalibratedCost(cost=LinearCost(name="x", features=("a",), theta=(1.0,)))
    with pytest.raises(ConfigError, match="coefficients"):
        cost.load_state_dict(other.state_dict())


# ---- worlds ------------------------------------------------------------------------------------
def test_a_formula_that_is_30_per_cent_off_is_learned_in_30_batches():
    outcome = memory_worlds.live(seed=0, alpha=0.01, batches=160)
    # measurements carry one per cent of noise, of which 0.8 is the mean size
    assert outcome.error_from_30 <= 0.02
    assert outcome.error_from_100 <= 0.01


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.002])
def test_failures_keep_to_their_share_and_memory_is_used(alpha):
    outcomes = [memory_worlds.live(seed, alpha) for seed in range(30)]
    rates = [outcome.failure_rate for outcome in outcomes]
    assert np.mean(rates) <= alpha + 0.001
    assert max(rates) <= 1.3 * alpha + 0.001
    assert np.mean([outcome.error_from_30 for outcome in outcomes]) <= 0.02
    assert np.mean([outcome.error_from_100 for outcome in outcomes]) <= 0.01
    if alpha == 0.01:
        assert np.mean([outcome.utilisation for outcome in outcomes]) >= 0.95
