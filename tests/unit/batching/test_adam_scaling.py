"""Adam's settings for another batch size: the rule, its laws, and what it preserves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmpack.batching import AdamSettings, scale_adam, scaled_adam
from vlmpack.errors import ConfigError

BASE = AdamSettings(lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8)


def test_a_step_four_times_as_large():
    # sqrt(4) = 2; 1 - 4 * 0.1 = 0.6; 1 - 4 * 0.01 = 0.96.
    assert scale_adam(BASE, 4) == pytest.approx((2e-3, 0.6, 0.96, 5e-9))


@given(first=st.floats(0.1, 3), second=st.floats(0.1, 3))
def test_two_changes_are_one(first, second):
    assert scale_adam(scale_adam(BASE, first), second) == pytest.approx(scale_adam(BASE, first * second))


def test_the_learning_of_a_sample_is_that_of_the_base():
    # Gradients that are noise around nothing: what k small steps do to the weights, one step k times as large
    # does as well. Measured as the spread of the weights after the same number of samples.
    def spread(ratio):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(4000))
        optimizer = torch.optim.Adam([weight], lr=1e-3, betas=(0.98, 0.998))
        with scaled_adam(optimizer, ratio):
            for _ in range(int(2400 / ratio)):
                weight.grad = torch.randn_like(weight) / ratio**0.5
                optimizer.step()
        return float(weight.detach().std())

    base = spread(1)
    assert spread(4) == pytest.approx(base, rel=0.05)
    assert spread(16) == pytest.approx(base, rel=0.15)


def test_the_settings_come_back_after_an_error_too():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1, betas=(0.9, 0.95))
    group = optimizer.param_groups[0]

    def fail_inside():
        with scaled_adam(optimizer, 2):
            assert group["betas"] == pytest.approx((0.8, 0.9))
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.9, 0.95), 1e-8)


@pytest.mark.parametrize("ratio", [0, -1, 10.1, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"0 to 10 with decays of 0\.9 and 0\.99"):
        scale_adam(BASE, ratio)


def test_other_optimizers_are_refused():
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match="SGD"), scaled_adam(sgd, 2):
        pass
