"""nanoVLM's own model: its attention layers get a segment mask, which isolates them."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.family_comparison import compare
from tests.family_models import (
    LENGTHS,
    NANOVLM,
    PLANS,
    ROWS,
    bare_nanovlm,
    collator_of,
    model_of,
    packs_of,
    tokenizer_of,
)
from vlmpack import Tiling, VQADataset
from vlmpack.errors import ConfigError
from vlmpack.families import NanoVLM, family_for, prepare_model_for_packing, verify_isolation
from vlmpack.images import tile_image


@pytest.mark.parametrize("plan", PLANS)
def test_a_packed_batch_trains_as_its_samples_do_one_by_one(plan):
    assert compare("nanovlm", "sdpa", PLANS[plan]).largest <= 1e-5


def test_a_padding_mask_instead_of_segments_contaminates():
    def with_mask(batch):
        mask = (batch.pop("segment_ids") > 0).long()
        return batch | {"attention_mask": mask}

    assert compare("nanovlm", "sdpa", PLANS["1 row"], change=with_mask).logits > 0.5


def test_a_model_that_was_not_prepared_does_not_take_the_batch():
    batch = collator_of("nanovlm", 300)(packs_of("nanovlm", [[1, 2]]))
    with pytest.raises(TypeError, match="segment_ids"):
        bare_nanovlm()(**batch)


def test_targets_are_shifted_and_no_sample_predicts_the_next():
    packs = packs_of("nanovlm", [[1, 4]])
    batch = collator_of("nanovlm", len(packs[0]))(packs)
    labels = packs[0].labels
    assert batch["targets"][0].tolist() == [*labels[1:].tolist(), -100]
    first = packs[0].costs[0].num_tokens
    assert batch["targets"][0, first - 1] == -100
    assert not set(LENGTHS) & batch.keys()
    assert batch["images"] == []


def test_a_call_without_segments_is_the_models_own():
    batch = collator_of("nanovlm", 300)(packs_of("nanovlm", [[1, 2]]))
    del batch["segment_ids"]
    assert torch.equal(model_of("nanovlm")(**batch)[0], bare_nanovlm()(**batch)[0])


def test_preparing_twice_or_a_copy_changes_nothing_more():
    model = prepare_model_for_packing(model_of("nanovlm"))
    batch = collator_of("nanovlm", 300, pixel_dtype=torch.uint8)(packs_of("nanovlm", PLANS["1 row"]))
    assert batch["images"].dtype == torch.uint8
    again = copy.deepcopy(model)
    assert torch.equal(again(**batch)[1], model(**batch)[1])
    again.decoder.blocks[0].attn.q_proj.weight.data.zero_()
    assert not torch.equal(again(**batch)[1], model(**batch)[1])  # the copy's layers are its own


def test_its_isolation_is_verified_and_a_missing_segment_named():
    packs = packs_of("nanovlm", PLANS["2 rows"], append_pad=True)
    batch = collator_of("nanovlm", max(map(len, packs)) + 2)(packs)
    report = verify_isolation(model_of("nanovlm"), batch, packs=packs)
    assert report.is_isolated
    assert len(report.segments) == 4
    with pytest.raises(ConfigError, match="does not say where samples lie"):
        verify_isolation(model_of("nanovlm"), {"input_ids": batch["input_ids"], "images": batch["images"]})


def test_tokens_and_tiles_are_those_of_the_tiling():
    tokenizer = tokenizer_of("nanovlm")
    for tiling in (NANOVLM.tiling, Tiling(tile_size=32, max_side=64, tokens_per_tile=2, global_tile=False)):
        ours = VQADataset(ROWS, tokenizer, family=NanoVLM(tiling=tiling))
        plain = VQADataset(ROWS, tokenizer, tiling=tiling)
        for number, row in enumerate(ROWS):
            assert ours[number].input_ids.tolist() == plain[number].input_ids.tolist()
            for image, geometry in zip(row["images"], ours[number].geometries, strict=True):
                tiles = torch.empty(geometry.num_tiles, 32, 32, 3, dtype=torch.uint8)
                ours.family.cut(image, geometry, tiles.numpy())
                assert torch.equal(tiles.permute(0, 3, 1, 2), tile_image(image, geometry, tile_size=32))


def test_the_family_of_its_model_is_found_by_its_config():
    assert family_for(bare_nanovlm()) == NANOVLM
    assert family_for("nanovlm").tiling == Tiling()


def test_another_model_is_refused():
    with pytest.raises(ConfigError, match="has no attention layers like nanoVLM's"):
        prepare_model_for_packing(torch.nn.Linear(2, 2), NANOVLM)
