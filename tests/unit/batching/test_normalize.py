from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmpack.batching import (
    EffectiveBatchSizeNormalizer,
    adascale_gain,
    gradient_scale,
    loss_scale,
    scaled_lr,
    seesaw_batch_size,
)
from vlmpack.errors import ConfigError

sizes = st.integers(1, 4096)


def test_the_documented_formulas_bit_for_bit():
    # grad *= base / current; lr = base_lr * sqrt(current / base); loss *= target / (current * accumulation)
    assert gradient_scale(16, 8) == 2.0
    assert gradient_scale(16, 12) == 16 / 12
    assert scaled_lr(5e-5, 64, 16) == 1e-4
    assert scaled_lr(5e-5, 24, 16) == 5e-5 * math.sqrt(24 / 16)
    assert loss_scale(32, 8, 4) == 1.0
    assert loss_scale(32, 3, 5) == 32 / 15


@given(sizes, sizes, sizes, st.integers(1, 64))
def test_the_documented_formulas_for_any_sizes(base, target, current, steps):
    normalizer = EffectiveBatchSizeNormalizer(base, target, 5e-5)
    assert normalizer.gradient_scale(current) == base / current
    assert normalizer.scaled_lr(current) == 5e-5 * math.sqrt(current / base)
    assert normalizer.loss_scale(current, steps) == target / (current * steps)


def test_the_documented_constructor_and_its_scale():
    normalizer = EffectiveBatchSizeNormalizer(16, 32, 5e-5)
    assert (normalizer.base_batch_size, normalizer.target_batch_size, normalizer.base_lr) == (16, 32, 5e-5)
    batch_size = 24
    shown = f"Effective batch size scale: {normalizer.batch_size_scale(batch_size)}"
    assert shown == f"Effective batch size scale: {batch_size / 16}" == "Effective batch size scale: 1.5"


def test_the_triple_product_depends_on_the_split_and_the_default_does_not():
    # sqrt(16 / b) * 32 / (b * k) with b * k = 32: the table of the conflict, 2.0, 1.41, 1.0, 0.71
    with pytest.warns(UserWarning, match="how a step is split"):
        legacy = EffectiveBatchSizeNormalizer(16, 32, 5e-5, mode="legacy_stack")
    stacked = [legacy.apply(b, 32 // b) for b in (4, 8, 16, 32)]
    products = [each.gradient_scale * each.lr_scale * each.loss_scale for each in stacked]
    assert products == pytest.approx([2.0, math.sqrt(2), 1.0, math.sqrt(0.5)], rel=1e-15)
    step = EffectiveBatchSizeNormalizer(16, 32, 5e-5)
    assert len({step.apply(b, 32 // b) for b in (4, 8, 16, 32)}) == 1
    once = step.apply(4, 8)
    assert (once.gradient_scale, once.loss_scale, once.lr_scale) == (1.0, 1.0, math.sqrt(2))


@pytest.mark.parametrize(
    ("rule", "scale"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0), ("seesaw", 2.0), ("adascale", 1.0)]
)
def test_each_rule_scales_by_the_steps_size(rule, scale):
    normalizer = EffectiveBatchSizeNormalizer(16, 64, 1e-4, lr_rule=rule)
    assert normalizer.lr_scale(64) == scale
    assert normalizer.apply(16, 4).lr == 1e-4 * scale


@given(st.floats(1, 1000), st.floats(0, 1e9), sizes)
def test_adascale_lies_between_one_and_linear(ratio, noise, base):
    assert 1 - 1e-12 <= adascale_gain(ratio, noise, base) <= ratio * (1 + 1e-12)


def test_adascale_by_hand():
    assert adascale_gain(4, math.inf, 16) == 4  # noise alone: linear
    assert adascale_gain(4, 0, 16) == 1  # no noise: a larger step is worth no more
    assert adascale_gain(4, 16, 16) == 2 / 1.25  # (1 + 1) / (1/4 + 1)
    normalizer = EffectiveBatchSizeNormalizer(16, 64, 1e-4, lr_rule="adascale")
    normalizer.noise_scale = 16.0
    assert normalizer.lr_scale(64) == 1.6


def test_seesaw_trades_a_halved_rate_for_a_doubled_step():
    assert seesaw_batch_size(256, 1.0) == 256
    assert seesaw_batch_size(256, 0.5) == 512
    normalizer = EffectiveBatchSizeNormalizer(256, 256, 1e-3, lr_rule="seesaw")
    # scheduled 1/2, step x 2: the rate that acts is 1/sqrt(2) of the highest
    assert 0.5 * normalizer.lr_scale(seesaw_batch_size(256, 0.5)) == pytest.approx(math.sqrt(0.5), rel=1e-15)
    with pytest.raises(ConfigError, match="lr_ratio"):
        seesaw_batch_size(256, 0.0)


@given(sizes, sizes)
def test_micro_batches_make_the_target_exactly(target, micro):
    normalizer = EffectiveBatchSizeNormalizer(16, target, 5e-5)
    parts = normalizer.micro_batches(micro)
    assert sum(parts) == target
    assert max(parts) <= micro
    assert normalizer.accumulation_steps(micro) == len(parts) == -(-target // min(micro, target))


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_sizes_must_be_positive_and_finite(bad):
    normalizer = EffectiveBatchSizeNormalizer()
    calls = (
        lambda: gradient_scale(bad, 1),
        lambda: gradient_scale(1, bad),
        lambda: scaled_lr(1e-4, bad, 16),
        lambda: loss_scale(32, 8, bad),
        lambda: normalizer.lr_scale(bad),
        lambda: normalizer.apply(bad),
        lambda: EffectiveBatchSizeNormalizer(bad),
        lambda: EffectiveBatchSizeNormalizer(base_lr=bad),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="must be positive and finite"):
            call()


def test_unknown_rules_and_modes_are_refused():
    with pytest.raises(ConfigError, match="lr_rule must be one of"):
        EffectiveBatchSizeNormalizer(lr_rule="cubic")
    with pytest.raises(ConfigError, match="mode must be one of"):
        EffectiveBatchSizeNormalizer(mode="both")
    with pytest.raises(ConfigError, match="noise_scale must not be negative"):
        adascale_gain(2, -1, 16)


def test_rules_agree_at_the_base_size():
    for rule, base in itertools.product(("none", "sqrt", "linear", "seesaw", "adascale"), (1, 16, 100)):
        assert EffectiveBatchSizeNormalizer(base, base, 1e-4, lr_rule=rule).lr_scale(base) == 1.0
