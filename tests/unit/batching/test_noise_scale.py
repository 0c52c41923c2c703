from __future__ import annotations

import math

import numpy as np
import pytest

from vlmpack.batching import GradientNoiseScale, noise_and_signal
from vlmpack.errors import ConfigError


def step(rng, sizes, mu, sigma):
    """Mean gradients of micro-batches of independent samples: their norms, and the step's."""
    means = [mu + sigma * rng.standard_normal((size, len(mu))).mean(axis=0) for size in sizes]
    whole = np.average(means, axis=0, weights=sizes)
    return [float(mean @ mean) for mean in means], float(whole @ whole)


def test_two_equal_halves_are_mccandlishs_estimator():
    # B_small = 4, B_big = 8: S = (|G_s|^2 - |G_b|^2) / (1/4 - 1/8), |mu|^2 = (8 |G_b|^2 - 4 |G_s|^2) / 4
    small, big = [3.0, 5.0], 2.5
    noise, signal = noise_and_signal([4, 4], small, big)
    mean_small = 4.0
    assert noise == pytest.approx((mean_small - big) / (1 / 4 - 1 / 8))
    assert signal == pytest.approx((8 * big - 4 * mean_small) / (8 - 4))


@pytest.mark.parametrize("sizes", [[4, 4], [1, 2, 13], [7, 1, 1, 1, 30], [5] * 8])
def test_unequal_micro_batches_are_unbiased(sizes):
    rng = np.random.default_rng(0)
    mu, sigma = np.array([0.5, -0.25, 0.0, 1.0]), 2.0
    noises, signals = zip(
        *(noise_and_signal(sizes, *step(rng, sizes, mu, sigma)) for _ in range(4000)), strict=True
    )
    true_noise, true_signal = sigma**2 * len(mu), float(mu @ mu)
    for values, true in ((noises, true_noise), (signals, true_signal)):
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - true) < 4 * error  # four standard errors
        assert error < 0.1 * max(true, 1.0)  # and these are small


def test_ignoring_the_sizes_is_biased():
    # the estimator for equal micro-batches, on unequal ones: why ours exists
    rng = np.random.default_rng(1)
    sizes, mu, sigma = [1, 15], np.zeros(4), 1.0
    naive = []
    for _ in range(2000):
        micro, whole = step(rng, sizes, mu, sigma)
        naive.append((np.mean(micro) - whole) / (2 / 16 - 1 / 16))
    assert np.mean(naive) > 1.5 * 4  # the truth is 4


def test_the_average_over_steps_finds_the_noise_scale():
    rng = np.random.default_rng(2)
    mu = np.array([1.0, 1.0])
    scale = GradientNoiseScale(decay=0.995)
    assert scale.noise_scale is None
    for _ in range(4000):
        sizes = rng.integers(1, 20, size=rng.integers(2, 6)).tolist()
        scale.update(sizes, *step(rng, sizes, mu, 3.0))
    assert scale.noise_scale == pytest.approx(9 * 2 / 2, rel=0.25)
    again = GradientNoiseScale(decay=0.995)
    again.load_state_dict(scale.state_dict())
    assert again.noise_scale == scale.noise_scale
    assert again.num_steps == 4000


def test_steps_that_show_nothing_are_counted():
    scale = GradientNoiseScale()
    scale.update([8], [1.0], 1.0)
    scale.update([4, 4], [math.nan, 1.0], 1.0)
    assert (scale.num_steps, scale.num_skipped, scale.noise_scale) == (0, 2, None)
    scale.update([4, 4], [1.0, 1.0], 0.0)  # the halves cancel: noise only
    assert scale.noise_scale == math.inf
    same = GradientNoiseScale()
    same.update([4, 4], [1.0, 1.0], 1.0)
    assert same.noise_scale == 0.0


def test_numbers_that_do_not_fit_together_are_refused():
    with pytest.raises(ConfigError, match="at least two"):
        noise_and_signal([4], [1.0], 1.0)
    with pytest.raises(ConfigError, match="2 sizes but 1 norms"):
        noise_and_signal([4, 4], [1.0], 1.0)
    with pytest.raises(ConfigError, match="have samples"):
        noise_and_signal([4, 0], [1.0, 1.0], 1.0)
    with pytest.raises(ConfigError, match="decay"):
        GradientNoiseScale(decay=1.0)
