from __future__ import annotations

import warnings

import pytest
from pydantic import ValidationError

from vlmpack.batching import HeterogeneousTrainingConfig, NormalizationConfig, SafetyConfig
from vlmpack.errors import ConfigError


def test_the_documented_usage():
    config = HeterogeneousTrainingConfig()
    config.num_epochs = 3
    config.learning_rate = 5e-5
    config.task_distribution = {"T1": 0.5, "T2": 0.25, "T3": 0.25}
    config.gradient_accumulation_steps = 4
    config.use_gradient_accumulation = True
    config.max_memory_mb = 20000
    config.memory_margin_percent = 0.15
    config.use_grad_norm_balancing = True
    config.grad_norm_alpha = 1.5
    config.base_batch_size = 8
    config.enable_gradient_checkpointing = True
    assert config.step_size == 32
    assert config.loss_weights == {"T1": 1.0, "T2": 1.0, "T3": 1.0}


def test_the_defaults_are_the_documented_values():
    config = HeterogeneousTrainingConfig()
    assert (config.num_epochs, config.learning_rate) == (3, 5e-5)
    assert (config.gradient_accumulation_steps, config.use_gradient_accumulation) == (4, True)
    assert (config.max_memory_mb, config.memory_margin_percent) == (20000, 0.15)
    assert (config.use_grad_norm_balancing, config.grad_norm_alpha) == (True, 1.5)
    assert config.task_distribution == {"T1": 0.5, "T2": 0.25, "T3": 0.25}
    assert config.diversity_weight == 0.5


# base_batch_size, gradient_accumulation_steps, margin, checkpointing, balancing: the document's table
PRESETS = {
    "limited": (8, 4, 0.20, True, True),
    "moderate": (16, 2, 0.10, False, True),
    "high": (32, 1, 0.05, False, True),
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_documented_presets(name):
    config = HeterogeneousTrainingConfig.preset(name)
    assert PRESETS[name] == (
        config.base_batch_size,
        config.gradient_accumulation_steps,
        config.memory_margin_percent,
        config.enable_gradient_checkpointing,
        config.use_grad_norm_balancing,
    )
    assert config.step_size == 32
    assert HeterogeneousTrainingConfig.preset(name, num_epochs=7).num_epochs == 7


@pytest.mark.parametrize(
    ("gb", "name"),
    [
        (15, "limited"),
        (20, "limited"),
        (24, "limited"),
        (25, "moderate"),
        (30, "moderate"),
        (39.9, "moderate"),
        (40, "high"),
        (80, "high"),
    ],
)
def test_a_devices_size_chooses_the_preset(gb, name):
    config = HeterogeneousTrainingConfig.for_memory(gb)
    assert config.base_batch_size == PRESETS[name][0]
    assert config.max_memory_mb == 1000 * gb
    assert HeterogeneousTrainingConfig.for_memory(gb, base_batch_size=3).base_batch_size == 3


def test_a_device_below_the_presets_and_an_unknown_one_are_refused():
    with pytest.raises(ConfigError, match=r"begin at 15 GB, got 8: vlmpack\.memory\.recommend"):
        HeterogeneousTrainingConfig.for_memory(8)
    with pytest.raises(ConfigError, match="there is no preset 'huge'"):
        HeterogeneousTrainingConfig.preset("huge")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_epochs", True, "valid integer"),
        ("num_epochs", 0, "greater than 0"),
        ("num_epochs", "3", "valid integer"),
        ("learning_rate", True, "valid number"),
        ("learning_rate", float("nan"), "finite number"),
        ("learning_rate", -1.0, "greater than 0"),
        ("memory_margin_percent", 20, "20 percent is 0.2. A larger margin is safer"),
        ("memory_margin_percent", -0.1, "a fraction is meant"),
        ("task_distribution", {"T1": 0.5}, "they add up to 0.5"),
        ("task_distribution", {"T1": 1.5, "T2": -0.5}, "none negative"),
        ("task_distribution", {}, "at least one task"),
        ("task_loss_weights", {"T1": -1.0}, "must not be negative"),
        ("balance_rule", "paper", "'legacy' or 'gradnorm'"),
        ("base_batchsize", 8, "no attribute 'base_batchsize'"),
        ("safety", {"single_sample": "ignore"}, "safety.single_sample"),
    ],
)
def test_what_is_wrong_is_refused_when_it_is_assigned(name, value, said):
    config = HeterogeneousTrainingConfig()
    before = config.model_copy(deep=True)
    with pytest.raises(ValidationError, match=said):
        setattr(config, name, value)
    assert config == before
    with pytest.raises(ValidationError):
        HeterogeneousTrainingConfig(**{name: value})


def test_without_accumulation_a_step_is_one_micro_batch():
    config = HeterogeneousTrainingConfig(use_gradient_accumulation=False)
    assert (config.num_micro_batches, config.step_size) == (1, 16)


def test_tasks_that_are_weighted_but_have_no_share_and_the_other_way_round():
    config = HeterogeneousTrainingConfig(
        task_distribution={"a": 0.5, "b": 0.5}, task_loss_weights={"b": 2.0, "c": 3.0}
    )
    assert config.task_types == ("a", "b", "c")
    assert config.loss_weights == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_the_settings_make_the_parts():
    config = HeterogeneousTrainingConfig(
        base_batch_size=8, normalization=NormalizationConfig(lr_rule="linear"), learning_rate=1e-4
    )
    normalizer = config.normalizer()
    assert (normalizer.base_batch_size, normalizer.target_batch_size) == (32, 32)
    assert normalizer.lr_scale(64) == 2.0
    config.normalization = NormalizationConfig(base_batch_size=16)
    assert config.normalizer().lr_scale(64) == 2.0
    balancer = config.balancer()
    assert (balancer.alpha, balancer.rule, balancer.weights) == (1.5, "legacy", {"T1": 1, "T2": 1, "T3": 1})
    assert list(config.balancer(("T1", "new")).weights) == ["T1", "new"]
    config.use_grad_norm_balancing = False
    assert config.balancer() is None
    assert SafetyConfig().single_sample == "raise"


def test_an_alpha_that_does_not_converge_is_refused_by_the_rule_that_cares():
    config = HeterogeneousTrainingConfig(grad_norm_alpha=2.5)
    with pytest.raises(ConfigError, match="0 < alpha < 2"):
        config.balancer()
    config.balance_rule = "gradnorm"
    assert config.balancer().alpha == 2.5


def test_the_settings_have_the_names_of_training_arguments(tmp_path):
    config = HeterogeneousTrainingConfig.preset("limited", learning_rate=1e-4, warmup_share=0.1, seed=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = config.to_training_arguments(tmp_path, use_cpu=True, save_strategy="no")
    assert arguments.per_device_train_batch_size == 8
    assert arguments.gradient_accumulation_steps == 4
    assert arguments.num_train_epochs == 3
    assert arguments.learning_rate == 1e-4
    assert arguments.warmup_steps == 0.1
    assert arguments.get_warmup_steps(200) == 20
    assert arguments.activation_checkpointing is True
    assert arguments.remove_unused_columns is False
    assert arguments.accelerator_config.dispatch_batches is False
    assert arguments.report_to == []
    assert arguments.seed == 7
    assert arguments.output_dir == str(tmp_path)
    assert arguments.save_strategy == "no"
