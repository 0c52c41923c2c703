"""The reference document's recommendations, kept to the bit, and the corrected ones beside them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vlmpack.errors import ConfigError
from vlmpack.memory import (
    GPU_PRESETS,
    IMAGE_MULTIPLIER_TABLE,
    SCENARIO_PRESETS,
    get_recommended_config,
    recommend,
    recommendation_table,
    to_training_arguments,
)
from vlmpack.memory.recommend import effective_batch_warning

# available = 0.8 * GPU; sample = 0.8 * (1 + 0.7 * (images - 1)):
# 24/1: 19.2 / 0.8 = 24; 24/2: 19.2 / 1.36 = 14.1; 40/2: 32 / 1.36 = 23.5; 80/2: 64 / 1.36 = 47.06
CODE = {
    (24, 1): (24, 1, 24),
    (24, 2): (14, 1, 14),
    (40, 1): (40, 1, 40),
    (40, 2): (23, 1, 23),
    (80, 1): (80, 1, 80),
    (80, 2): (47, 1, 47),
    # 4 * 0.8 / 2.48 = 1.29 -> 1, and 16 // 1 = 16
    (4, 4): (1, 16, 16),
    # 0.8 GB hold 1 sample; 0.5 GB hold none, but at least one is taken
    (0.5, 1): (1, 16, 16),
}


@pytest.mark.parametrize(("arguments", "expected"), CODE.items())
def test_the_documents_code_is_kept_to_the_bit(arguments, expected):
    names = ("batch_size", "gradient_accumulation_steps", "effective_batch_size")
    assert get_recommended_config(*arguments, 16) == dict(zip(names, expected, strict=True))


def test_its_defaults_are_one_image_and_sixteen_samples():
    assert get_recommended_config(10) == get_recommended_config(10, 1, 16)
    assert (
        get_recommended_config(gpu_memory_gb=24, num_images_per_sample=2, target_effective_batch_size=16)[
            "batch_size"
        ]
        == 14
    )


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [((24, 1), (16, 1, 16)), ((24, 2), (2, 8, 16)), ((40, 1), (20, 1, 20)), ((40, 2), (4, 4, 16))],
)
def test_what_the_document_prints_beside_it_is_not_what_it_computes(arguments, printed):
    assert tuple(get_recommended_config(*arguments, 16).values()) != printed


def test_the_table_has_sixty_dashes_and_six_lines():
    lines = recommendation_table()
    assert lines[0] == "Recommended configurations:"
    assert lines[1] == "-" * 60
    assert lines[2] == "GPU=24GB, Images=1: batch=24, accum=1, eff_batch=24"
    assert lines[7] == "GPU=80GB, Images=2: batch=47, accum=1, eff_batch=47"
    assert len(lines) == 8


def test_the_table_is_printed_by_the_module():
    done = subprocess.run(
        [sys.executable, "-m", "vlmpack.memory"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == recommendation_table()
    assert done.stderr == ""


# ---- corrected ---------------------------------------------------------------------------------
# room = 0.85 * GPU - 14; sample = 0.8 * (1 + 0.7) * 2 = 2.72 for two images, 1.6 for one
@pytest.mark.parametrize(
    ("gpu", "images", "batch", "steps"),
    [
        (24, 2, 2, 8),  # 6.4 / 2.72 = 2.4
        (40, 2, 4, 4),  # 20 / 2.72 = 7.4 -> 4
        (80, 2, 16, 1),  # 54 / 2.72 = 19.9 -> 16
        (24, 1, 4, 4),  # 6.4 / 1.6 = 4
        (40, 1, 8, 2),  # 20 / 1.6 = 12.5 -> 8
    ],
)
def test_the_corrected_rule_gives_the_presets(gpu, images, batch, steps):
    result = recommend(gpu, images)
    assert (result.batch_size, result.gradient_accumulation_steps) == (batch, steps)
    assert result.effective_batch_size == 16


def test_the_corrected_rule_meets_the_target_exactly():
    # (24 * 0.8 - 14) / 1.36 = 3.8 -> 3: five micro-batches of 3 and one of 1, where the document stops at 15
    result = recommend(24, 2, 16, training_multiplier=1.0, utilisation=0.8, power_of_two=False)
    assert (result.batch_size, result.gradient_accumulation_steps) == (3, 6)
    assert (result.effective_batch_size, result.last_batch_size) == (16, 1)


def test_without_the_corrections_it_is_the_documents_code():
    result = recommend(
        24,
        2,
        16,
        static_gb=0,
        training_multiplier=1.0,
        utilisation=0.8,
        cap_to_target=False,
        power_of_two=False,
    )
    assert result.batch_size == get_recommended_config(24, 2, 16)["batch_size"]


def test_the_gpus_memory_is_found(monkeypatch):
    from vlmpack.memory import device

    monkeypatch.setattr(device, "get_gpu_memory_info", lambda: {"total": 40.0})
    assert recommend(num_images_per_sample=2) == recommend(40, 2)
    monkeypatch.setattr(device, "get_gpu_memory_info", lambda: {"total": 0})
    with pytest.raises(ConfigError, match="no GPU"):
        recommend(num_images_per_sample=2)


def test_weights_that_fill_the_gpu_are_refused():
    with pytest.raises(ConfigError, match=r"leave 0\.0 GB|leave -"):
        recommend(16, 1)


@pytest.mark.parametrize("wrong", [{"num_images_per_sample": 0}, {"utilisation": 1.5}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        recommend(40, **wrong)


# ---- presets -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "batch", "steps", "effective", "precision"),
    [
        ("rtx3090-conservative", 2, 8, 16, "fp16"),
        ("rtx3090-aggressive", 3, 5, 15, "fp16"),
        ("a100-40-balanced", 4, 4, 16, "fp16"),
        ("a100-40-aggressive", 6, 3, 18, "fp16"),
        ("80gb-aggressive", 8, 2, 16, "bf16"),
        ("80gb-max-throughput", 16, 1, 16, "bf16"),
    ],
)
def test_presets_by_gpu(name, batch, steps, effective, precision):
    preset = GPU_PRESETS[name]
    assert (preset.batch_size, preset.gradient_accumulation_steps) == (batch, steps)
    assert (preset.effective_batch_size, preset.precision) == (effective, precision)


@pytest.mark.parametrize(
    ("name", "batch", "steps", "effective"),
    [
        ("single-gpu", 2, 8, 16),
        ("multi-gpu-limited", 1, 16, 16),
        ("inference", 8, 0, 8),
        ("maximum-throughput", 16, 1, 16),
        ("out-of-memory", 1, 16, 16),
        ("too-slow", 4, 4, 16),
        ("too-slow-noisier", 2, 4, 8),
    ],
)
def test_presets_by_situation(name, batch, steps, effective):
    preset = SCENARIO_PRESETS[name]
    assert (preset.batch_size, preset.gradient_accumulation_steps) == (batch, steps)
    assert preset.effective_batch_size == effective


def test_several_gpus_multiply_the_step():
    assert SCENARIO_PRESETS["multi-gpu-limited"].global_batch_size(4) == 64
    with pytest.raises(ConfigError):
        SCENARIO_PRESETS["multi-gpu-limited"].global_batch_size(0)


def test_the_table_of_multipliers_is_not_what_the_code_adds():
    assert IMAGE_MULTIPLIER_TABLE[2] == (1.5, 12.0, 1.87)
    for images, (gb, batch_of_8, multiplier) in IMAGE_MULTIPLIER_TABLE.items():
        assert batch_of_8 == pytest.approx(8 * gb)
        # 1.87, 2.62 and 3.25 are 1.5 / 0.8, 2.1 / 0.8, 2.6 / 0.8, cut off
        assert multiplier == pytest.approx(gb / 0.8, abs=0.006)
        if images > 1:
            assert multiplier != pytest.approx(1 + 0.7 * (images - 1), abs=0.01)


@pytest.mark.parametrize(
    ("size", "legacy", "current"), [(8, False, False), (32, False, False), (4, True, True)]
)
def test_the_usual_range_of_a_step(size, legacy, current):
    assert (effective_batch_warning(size, legacy=True) is not None) == legacy
    assert (effective_batch_warning(size) is not None) == current


def test_above_the_range_the_documents_text_is_wrong():
    assert effective_batch_warning(64, legacy=True) == "Batch size may be too small"
    assert effective_batch_warning(64) == "effective batch size 64 may be too large: 8 to 32 is usual"


# ---- names of settings -------------------------------------------------------------------------
SECTION = {
    "per_device_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "fp16": True,
    "optim": "adamw_torch_fused",
}


def test_the_documents_section_gets_todays_names():
    assert to_training_arguments(SECTION) == {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "activation_checkpointing": True,
        "fp16": True,
        "optim": "adamw_torch_fused",
    }


def test_todays_names_are_known_to_transformers():
    transformers = pytest.importorskip("transformers")
    fields = transformers.TrainingArguments.__dataclass_fields__
    assert set(to_training_arguments(SECTION)) <= set(fields)
    assert "per_device_batch_size" not in fields


def test_an_unknown_key_is_refused():
    with pytest.raises(ConfigError, match="batchsize"):
        to_training_arguments({"batchsize": 2})
