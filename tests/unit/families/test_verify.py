"""`prepare_model_for_packing` refuses what contaminates; `verify_isolation` measures it and says why."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.family_models import CASES, PLANS, collator_of, model_of, packs_of
from vlmpack.errors import ConfigError
from vlmpack.families import family_for, prepare_model_for_packing, verify_isolation

BY_POSITIONS = [name for name, case in CASES.items() if not case.family.needs_masks]


def batch_of(name: str, plan: str = "2 rows", **settings: object) -> dict:
    packs = packs_of(name, PLANS[plan], append_pad=True)
    return collator_of(name, max(map(len, packs)) + 3, **settings)(packs)


@pytest.fixture
def fresh_model():
    def make(name: str, attention: str = "sdpa"):
        return copy.deepcopy(model_of(name, attention))

    return make


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_the_collator_is_isolated(name, plan):
    model = model_of(name)
    report = verify_isolation(model, batch_of(name, plan))
    assert report.is_isolated
    assert report.largest <= 1e-5
    assert len(report.segments) == sum(len(row) for row in PLANS[plan])
    assert not report.faults
    assert str(report).endswith("\nisolated")
    assert model.training  # left as it was


@pytest.mark.parametrize(
    ("change", "setting", "reason"),
    [
        ({"attention_mask": "ones"}, "attention_mask", "falls back to plain causal"),
        ({"use_cache": True}, "use_cache", "no packs are looked for"),
        ({"use_cache": None}, "use_cache", "no packs are looked for"),
        ({"position_ids": "going on"}, "position_ids", "do not begin at 0"),
        ({"position_ids": None}, "no position_ids", "a row is one sample"),
    ],
)
@pytest.mark.parametrize("name", BY_POSITIONS)
def test_a_setting_that_leaks_is_measured_and_named_and_refused_before_forward(
    name, change, setting, reason, fresh_model
):
    batch = batch_of(name)
    for key, value in change.items():
        if value is None:
            del batch[key]
        elif value == "ones":
            batch[key] = torch.ones_like(batch["input_ids"])
        elif value == "going on":
            batch[key] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch[key])
        else:
            batch[key] = value
    model = fresh_model(name)
    report = verify_isolation(model, batch)
    assert not report.is_isolated
    assert report.largest > 0.5
    assert [fault.setting for fault in report.faults] == [setting]
    assert reason in str(report)
    assert str(report).endswith("NOT isolated")
    assert " leaks" in str(report)
    prepare_model_for_packing(model)
    with pytest.raises(ConfigError, match=rf"would see each other. {setting}: .*{reason}"):
        model(**batch)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("axes", [0, slice(1, 4)])
def test_positions_of_fewer_axes_than_qwens_four_are_named(name, axes):
    batch = batch_of(name)
    batch["position_ids"] = batch["position_ids"][axes]
    report = verify_isolation(model_of(name), batch)
    assert not report.is_isolated
    assert "takes [4, batch, length], got" in str(report)


@pytest.mark.parametrize("name", CASES)
def test_images_in_another_order_are_seen_with_the_packs(name):
    packs = packs_of(name, [[2, 1, 3]])  # one image, none, one
    batch = collator_of(name, len(packs[0]))(packs)
    assert verify_isolation(model_of(name), batch, packs=packs).is_isolated
    pixels = batch["pixel_values"]
    batch["pixel_values"] = pixels.flip(1 if pixels.ndim == 5 else 0)
    report = verify_isolation(model_of(name), batch, packs=packs)
    assert [segment.largest > 0.1 for segment in report.segments] == [True, False, True]
    assert "are the images in the order of their tokens?" in str(report)


def test_images_that_do_not_come_to_their_tokens_are_refused():
    packs = packs_of("qwen2_vl", [[0, 1, 3]])
    batch = collator_of("qwen2_vl", len(packs[0]))(packs)
    batch["image_grid_thw"] = batch["image_grid_thw"].flip(0)
    with pytest.raises(ConfigError, match="do not come to the image tokens of row 0, positions 0 to"):
        verify_isolation(model_of("qwen2_vl"), batch)


def test_a_batch_that_carries_weights_for_its_loss_is_verified_too():
    packs = packs_of("smolvlm", PLANS["2 rows"], append_pad=True)
    batch = collator_of("smolvlm", 400, loss_weighting="sample")(packs)
    assert {"loss_weights", "segment_ids", "keys"} <= batch.keys()
    assert verify_isolation(model_of("smolvlm"), batch).is_isolated


def test_samples_of_a_batch_of_ones_own_are_found_by_restarting_positions():
    batch = batch_of("smolvlm")
    expected = len(verify_isolation(model_of("smolvlm"), batch).segments)
    for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        del batch[key]
    report = verify_isolation(model_of("smolvlm"), batch)
    assert report.is_isolated
    assert len(report.segments) == expected
    del batch["position_ids"]
    with pytest.raises(ConfigError, match="does not say where samples lie"):
        verify_isolation(model_of("smolvlm"), batch)


def test_gemma_masks_are_checked_for_their_form(fresh_model):
    batch = batch_of("gemma3")
    del batch["attention_mask"]
    assert "isolated by its masks alone" in str(verify_isolation(model_of("gemma3"), batch))
    as_bool = batch_of("gemma3", mask_dtype=torch.bool)
    assert verify_isolation(model_of("gemma3"), as_bool).is_isolated
    report = verify_isolation(model_of("gemma3", "eager"), as_bool)
    assert not report.is_isolated
    assert "eager attention adds a boolean mask as 0 and 1" in str(report)
    prepared = prepare_model_for_packing(fresh_model("gemma3", "eager"))
    with pytest.raises(ConfigError, match="use a float dtype"):
        prepared(**as_bool)


@pytest.mark.parametrize("name", CASES)
def test_a_prepared_model_has_no_cache_and_trains_on_packs_of_bytes(name, fresh_model):
    model = fresh_model(name)
    model.config.use_cache = model.config.get_text_config().use_cache = True
    assert prepare_model_for_packing(prepare_model_for_packing(model)) is model
    assert not model.config.use_cache
    assert not model.config.get_text_config().use_cache
    as_bytes = batch_of(name, pixel_dtype=torch.uint8)
    as_floats = batch_of(name)
    assert as_bytes["pixel_values"].dtype == torch.uint8
    assert as_bytes["pixel_values"].shape == as_floats["pixel_values"].shape
    assert torch.equal(model(**as_bytes).loss, model(**as_floats).loss)


def test_a_prepared_model_lets_calls_pass_that_are_no_packed_batch(fresh_model):
    model = prepare_model_for_packing(fresh_model("smolvlm"))
    ids = torch.arange(10)[None]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)


@pytest.mark.parametrize(
    ("name", "kernel", "reason"),
    [
        ("gemma3", "flash_attention_2", "cannot let the tokens of an image see each other"),
        ("gemma3", "kernels-community/flash-attn3", "cannot let the tokens of an image see each other"),
        ("gemma3", "flex_attention", "corrupted heap"),
        ("qwen2_vl", "flex_attention", "has no flex attention"),
        ("smolvlm", "my_kernel", "whether it keeps packed samples apart is not known"),
    ],
)
def test_a_kernel_that_cannot_isolate_is_refused_with_the_reason(name, kernel, reason, fresh_model):
    model = fresh_model(name)
    model.config.get_text_config()._attn_implementation = kernel
    with pytest.raises(ConfigError, match=reason):
        prepare_model_for_packing(model)


def test_an_unknown_model_is_refused(fresh_model):
    model = fresh_model("smolvlm")
    with pytest.raises(ConfigError, match="the model is of type 'smolvlm', but the family qwen2_vl"):
        prepare_model_for_packing(model, family_for("qwen2_vl"))
    model.config.model_type = "frobnicate"
    with pytest.raises(ConfigError, match=r"knows no model family 'frobnicate'.*Known: idefics3, smolvlm"):
        prepare_model_for_packing(model)
    with pytest.raises(ConfigError, match="Linear"):
        prepare_model_for_packing(torch.nn.Linear(2, 2))
