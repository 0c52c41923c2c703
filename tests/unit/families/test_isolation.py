"""Training on a pack equals training on its samples: logits, loss and gradients, on the real classes."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.emulated_flash import emulated
from tests.family_comparison import compare
from tests.family_models import CASES, PLANS, collator_of, model_of, packs_of, tokenizer_of

EXACT = 1e-5
CONTAMINATED = 0.5
"""Random models have mean absolute logits of 0.8; a sample that sees another's is off by about 4."""

BY_POSITIONS = [name for name, case in CASES.items() if not case.family.needs_masks]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_a_packed_batch_trains_as_its_samples_do_one_by_one(name, attention, plan):
    assert compare(name, attention, PLANS[plan]).largest <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing_keeps_samples_apart(name):
    # With it SmolVLM would be contaminated by its cache, had the batch not switched that off.
    model = copy.deepcopy(model_of(name))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    assert compare(name, "sdpa", PLANS["1 row"], model=model).largest <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_a_batch_has_no_attention_mask_that_would_end_the_isolation(name):
    batch = collator_of(name, 400)(packs_of(name, [[0, 1]]))
    mask = batch.get("attention_mask")
    assert mask is None or isinstance(mask, dict)
    assert batch["use_cache"] is False


@pytest.mark.parametrize("name", CASES)
def test_a_padding_mask_contaminates(name):
    def with_mask(batch):
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    assert compare(name, "sdpa", PLANS["1 row"], change=with_mask).logits > CONTAMINATED


@pytest.mark.parametrize("name", BY_POSITIONS)
def test_positions_that_go_on_contaminate(name):
    def going_on(batch):
        length = batch["input_ids"].shape[1]
        return batch | {"position_ids": torch.arange(length).expand_as(batch["position_ids"])}

    assert compare(name, "sdpa", PLANS["1 row"], change=going_on).logits > CONTAMINATED


@pytest.mark.parametrize("name", BY_POSITIONS)
def test_the_default_cache_contaminates_which_the_batch_prevents(name):
    def with_the_default(batch):
        del batch["use_cache"]
        return batch

    assert compare(name, "sdpa", PLANS["1 row"], change=with_the_default).logits > CONTAMINATED


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("axes", [slice(0, 1), slice(1, 4)])
def test_qwen_positions_need_all_four_axes(name, axes):
    def fewer(batch):
        positions = batch["position_ids"][axes]
        return batch | {"position_ids": positions[0] if len(positions) == 1 else positions}

    assert compare(name, "sdpa", PLANS["1 row"], change=fewer).logits > CONTAMINATED


@pytest.mark.parametrize("name", CASES)
def test_images_in_another_order_change_the_result_without_an_error(name):
    def swapped(batch):
        if "image_grid_thw" in batch:
            return batch | {"pixel_values": batch["pixel_values"].flip(0)}
        axis = 1 if batch["pixel_values"].ndim == 5 else 0
        return batch | {"pixel_values": batch["pixel_values"].flip(axis)}

    assert compare(name, "sdpa", PLANS["1 row"], change=swapped).logits > CONTAMINATED


def test_gemma_token_types_look_image_blocks_up_at_the_wrong_places():
    # Why the batch has a dict of masks: with restarting positions, the sliding layers of transformers 5.23
    # evaluate the image blocks at positions instead of places in the row.
    def with_token_types(batch):
        image = tokenizer_of("gemma3").convert_tokens_to_ids("<image_soft_token>")
        del batch["attention_mask"]
        return batch | {"token_type_ids": (batch["input_ids"] == image).int()}

    assert compare("gemma3", "sdpa", PLANS["1 row"], change=with_token_types).logits > 0.1


@pytest.mark.parametrize(("attention", "worst"), [("sdpa", EXACT), ("eager", None)])
def test_a_boolean_mask_isolates_under_sdpa_and_not_under_eager_attention(attention, worst):
    def as_bool(batch):
        masks = {kind: mask == 0 for kind, mask in batch["attention_mask"].items()}
        return batch | {"attention_mask": masks}

    differences = compare("gemma3", attention, PLANS["1 row"], change=as_bool)
    assert differences.logits > CONTAMINATED if worst is None else differences.largest <= worst


def test_several_images_in_a_sample_of_llava_onevision_are_not_tiled():
    # Sample 0 has two images, sample 2 one: 1 + 1 squares and a tiled picture.
    packs = packs_of("llava_onevision", [[0, 2]])
    assert [geometry.has_global_tile for geometry in packs[0].geometries] == [False, False, True]
    batch = collator_of("llava_onevision", 400)(packs)
    assert batch["batch_num_images"].tolist() == [2, 1]
    assert batch["image_sizes"].tolist() == [[40, 60], [64, 30], [80, 90]]


@pytest.fixture
def _flash():
    with emulated():
        yield


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", BY_POSITIONS)
def test_flash_attention_is_given_the_segments_of_every_row(name, plan):
    assert compare(name, "flash", PLANS[plan]).largest <= EXACT


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize("name", BY_POSITIONS)
def test_without_lengths_flash_attention_isolates_one_row_but_not_two(name):
    # transformers finds segments by restarting positions only in a batch of one row.
    def without_lengths(batch):
        for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            del batch[key]
        return batch

    assert compare(name, "flash", PLANS["1 row"], change=without_lengths).largest <= EXACT
    assert compare(name, "flash", PLANS["2 rows"], change=without_lengths).logits > CONTAMINATED
