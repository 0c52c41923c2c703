"""What a batch of a family holds, and what is refused before a model sees it."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from tests.fakes import SMALL, picture, row, tokenizer
from tests.family_models import (
    CASES,
    LENGTHS,
    PLANS,
    byte_tokenizer,
    collator_of,
    model_of,
    packs_of,
    tokenizer_of,
)
from vlmpack import (
    BatchBudget,
    ConstantLengthDataset,
    PipelineConfig,
    Tiling,
    VQACollator,
    VQADataset,
    build_pipeline,
)
from vlmpack.errors import BudgetError, ConfigError
from vlmpack.families import family_for
from vlmpack.families.batch import dummy_sample, with_dummy
from vlmpack.families.masks import causal_or_block, dense, within
from vlmpack.families.rows import varlen


def test_flash_lengths_run_over_the_flattened_rows_with_padding_as_segments():
    # Row 0: samples of 2 and 3 tokens, an appended pad after each, 1 of padding joined to the last: 2 1 3 2.
    # Row 1: one sample of 5, then 3 of padding.
    lengths = varlen(torch.tensor([[1, 1, 0, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]))
    assert lengths["cu_seq_lens_q"].tolist() == [0, 2, 3, 6, 8, 13, 16]
    assert lengths["cu_seq_lens_q"].dtype == torch.int32
    assert torch.equal(lengths["cu_seq_lens_q"], lengths["cu_seq_lens_k"])
    assert lengths["max_length_q"] == lengths["max_length_k"] == 5
    assert type(lengths["max_length_q"]) is int


def test_rows_that_are_full_of_one_sample_each_stay_two_segments():
    assert varlen(torch.ones(2, 4, dtype=torch.int64))["cu_seq_lens_q"].tolist() == [0, 4, 8]


def test_an_image_sees_itself_whole_and_a_sliding_window_does_not_reach_far():
    # Segment 1: text, an image of 2, text. Segment 2: an image of 1. Padding.
    segments = torch.tensor([[1, 1, 1, 1, 2, 0]])
    is_image = torch.tensor([[False, True, True, False, True, False]])
    seen = causal_or_block(segments, is_image)
    assert seen.int().tolist() == [[
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]]  # fmt: skip
    assert within(seen, 2)[0, 3].int().tolist() == [0, 0, 1, 1, 0, 0]
    mask = dense(seen, torch.float16)
    assert mask.shape == (1, 1, 6, 6)
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float16).min}
    assert torch.equal(dense(seen, torch.bool)[:, 0], seen)


@pytest.mark.parametrize("name", CASES)
def test_a_text_only_batch_has_no_pixels_and_all_the_rest(name):
    packs = packs_of(name, [[1], [4]])
    batch = collator_of(name, 100)(packs)
    assert not {"pixel_values", "image_grid_thw", "image_sizes", "batch_num_images"} & batch.keys()
    assert set(LENGTHS) <= batch.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_dummy_image_gives_the_eyes_a_gradient_and_changes_nothing(name):
    model = model_of(name)
    packs = packs_of(name, [[1], [1]])

    def train(batch):
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        return out, {key for key, parameter in model.named_parameters() if parameter.grad is not None}

    expected, of_text = train(collator_of(name, len(packs[0]))(packs))
    batch = collator_of(name, len(packs[0]), dummy_image=True)(packs)
    assert len(batch["input_ids"]) == 3  # no row had room
    assert (batch["labels"][2] == -100).all()
    out, of_all = train(batch)
    assert torch.allclose(out.loss, expected.loss, atol=1e-6)
    assert torch.allclose(out.logits[:2], expected.logits, atol=1e-5)
    eyes = {key for key, _ in model.named_parameters()} - of_text
    assert len(eyes & of_all) > 20


@pytest.mark.parametrize("name", CASES)
def test_a_dummy_image_goes_into_the_emptiest_row_as_a_segment_of_its_own(name):
    packs = packs_of(name, [[1], [4]])  # sample 4 is the shorter one
    batch = collator_of(name, 400, dummy_image=True)(packs)
    assert batch["input_ids"].shape == (2, 400)
    length = len(packs[1])
    positions = batch["position_ids"]
    plain = positions[0] if positions.ndim == 3 else positions
    assert plain[1, length - 1 : length + 2].tolist() == [length - 1, 0, 1]
    assert 400 + length in batch["cu_seq_lens_q"].tolist()
    with_images = packs_of(name, [[2], [4]])
    collate, usual = collator_of(name, 400, dummy_image=True), collator_of(name, 400)
    assert len(collate(with_images)["pixel_values"]) == len(usual(with_images)["pixel_values"])


def test_a_dummy_that_no_row_can_hold_is_refused():
    family, tokens = CASES["internvl"].family.for_tokenizer(tokenizer_of("internvl"))
    with pytest.raises(ConfigError, match="a dummy image takes 7 tokens, but a row of the batch has 6"):
        with_dummy(packs_of("internvl", [[4]]), dummy_sample(family, tokens), 6)


@pytest.mark.parametrize("name", CASES)
def test_a_sample_with_an_image_token_too_many_is_named(name):
    (pack,) = packs_of(name, [[1, 0, 2]])
    image = collator_of(name, 400)._tokens.image
    extra = pack.input_ids.clone()
    at = int((extra == image).nonzero()[-1]) + 4
    extra[at] = image
    needed = sum(geometry.num_image_tokens for geometry in pack.geometries[2:])
    message = rf"sample 2 has {needed + 1} image tokens \(id {image}\), but its 1 images make {needed}:"
    with pytest.raises(ConfigError, match=message):
        collator_of(name, 400)([replace(pack, input_ids=extra)])


def test_two_samples_that_swap_an_image_token_are_noticed_though_the_sum_is_right():
    (pack,) = packs_of("gemma3", [[2, 3]])
    collate = collator_of("gemma3", 400)
    ids = pack.input_ids.clone()
    ids[int((ids == collate._tokens.image).nonzero()[0])] = 5
    ids[-1] = collate._tokens.image
    with pytest.raises(ConfigError, match="sample 2 has 3 image tokens"):
        collate([replace(pack, input_ids=ids)])


def test_packs_of_another_rule_are_refused():
    with pytest.raises(ConfigError, match="not cut for smolvlm: 1 images, 1 geometries, tiles of 14 pixels"):
        collator_of("smolvlm", 400)(packs_of("qwen2_vl", [[2]]))
    (pack,) = packs_of("smolvlm", [[2]])
    with pytest.raises(ConfigError, match="not cut for smolvlm: 1 images, 0 geometries"):
        collator_of("smolvlm", 400)([replace(pack, geometries=())])
    with pytest.raises(ConfigError, match="a pack has 0 of 5 tiles"):
        collator_of("smolvlm", 400)([replace(pack, tiles=pack.tiles[:0])])


def test_a_tokenizer_without_the_image_tokens_is_refused():
    family = family_for("smolvlm")
    for make in (
        lambda: VQADataset([], byte_tokenizer(), family=family),
        lambda: VQACollator(byte_tokenizer(), 9, family=family),
    ):
        with pytest.raises(
            ConfigError,
            match=r"has no special token '<image>', '<fake_token_around_image>'.*add_family_tokens",
        ):
            make()


def test_a_family_is_asked_for_by_name_config_or_model():
    assert family_for("qwen2_vl") == family_for({"model_type": "qwen2_vl"})
    assert family_for(model_of("internvl")).max_tiles == 12
    assert family_for(model_of("internvl"), {"max_patches": 4}) == CASES["internvl"].family
    collate = VQACollator(tokenizer_of("llava"), 100, family="llava")
    assert collate.family == family_for("llava")
    for unknown in ("frobnicate", {"model_type": "frobnicate"}, {}):
        with pytest.raises(ConfigError, match="vlmpack knows no model family"):
            family_for(unknown)
    with pytest.raises(ConfigError, match="expected a config or a mapping, got int"):
        family_for(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VQACollator(tokenizer(), 10, dummy_image=True), "dummy_image needs a family"),
        (
            lambda: VQACollator(tokenizer(), 10, family=SMALL),
            "family must be one of vlmpack.families or its name",
        ),
        (
            lambda: VQADataset([], tokenizer(), family="smolvlm"),
            "family must be one of vlmpack.families, got 'smolvlm'",
        ),
        (
            lambda: VQADataset([], tokenizer_of("llava"), family=CASES["llava"].family, tiling=Tiling()),
            "pass tiling= or family=, not both",
        ),
    ],
)
def test_a_setting_that_contradicts_another_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", CASES)
def test_data_goes_through_the_packer_within_its_budgets(name):
    # 24 rows, a third of them text; every one is packed once, and the batch trains.
    rows = [
        row(
            "<image> What?" if n % 3 else "What?",
            "It is. " * (n % 5 + 1),
            [picture(40 + n, 30, n)] * bool(n % 3),
        )
        for n in range(24)
    ]
    family = CASES[name].family
    samples = VQADataset(rows, tokenizer_of(name), family=family)
    packs = ConstantLengthDataset(samples, seq_length=500, max_patches=600, decode_threads=0)
    batches = list(packs)
    assert sorted(int(key) for pack in batches for key in pack.keys) == list(range(24))
    assert all(pack.cost.num_patches <= 600 and len(pack) <= 500 for pack in batches)
    budget = BatchBudget(max_patches=sum(pack.cost.num_patches for pack in batches))
    collate = VQACollator(tokenizer_of(name), 500, family=family, budget=budget)
    assert torch.isfinite(model_of(name)(**collate(batches)).loss)
    with pytest.raises(BudgetError, match=f"over its budget of {budget.max_patches}"):
        collate(batches * 2)


def test_the_pipeline_takes_a_family():
    rows = [row("<image> What?", "That.", [picture(40 + n, 30, n)]) for n in range(6)]
    config = PipelineConfig(seq_length=500, batch_size=2)
    pipeline = build_pipeline(rows, tokenizer_of("smolvlm"), config, family=CASES["smolvlm"].family)
    batches = list(pipeline.loader)
    assert pipeline.report.num_packed == 6
    assert torch.isfinite(model_of("smolvlm")(**batches[0]).loss)


def test_a_sample_that_is_too_large_is_cut_smaller_by_its_family():
    rows = [row("<image>", "Yes.", [picture(90, 80)])]
    for name, whole, smaller in (("idefics3", 10, 5), ("internvl", 5, 1), ("qwen2_vl", 36, 16)):
        samples = VQADataset(rows, tokenizer_of(name), family=CASES[name].family)
        assert samples[0].geometries[0].num_tiles == whole
        limit = samples[0].cost.num_patches - 1
        packs = ConstantLengthDataset(
            samples, seq_length=300, max_patches=limit, oversize="fewer_tiles", decode_threads=0
        )
        (pack,) = packs
        assert packs.report.num_shrunk == 1
        assert len(pack.tiles) == smaller
        collator_of(name, 300)([pack])  # its tokens still come to its tiles


def copy_of(thing):
    """Return it as a spawned worker gets it."""
    return ForkingPickler.loads(ForkingPickler.dumps(thing))


def test_a_dataset_and_a_collator_reach_spawned_workers():
    samples = VQADataset(
        [row("<image>", "Yes.", [picture(9, 9)])], tokenizer_of("smolvlm"), family=CASES["smolvlm"].family
    )
    again = copy_of(samples)
    assert again[0].input_ids.tolist() == samples[0].input_ids.tolist()
    collate = copy_of(collator_of("smolvlm", 300))
    assert collate(packs_of("smolvlm", PLANS["1 row"]))["input_ids"].shape == (1, 300)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "internvl",
            {"model_type": "internvl", "downsample_ratio": "half"},
            "downsample_ratio must be a number",
        ),
        (
            "llava",
            {"model_type": "llava", "vision_feature_select_strategy": "full"},
            "only vision_feature_select",
        ),
        (
            "llava",
            {"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}},
            "must be CLIP's",
        ),
        (
            "llava_onevision",
            {"model_type": "llava_onevision", "image_grid_pinpoints": []},
            "must be a list of",
        ),
        (
            "llava_onevision",
            {"model_type": "llava_onevision", "vision_aspect_ratio": "pad"},
            "must be anyres_max_N",
        ),
        (
            "qwen2_vl",
            {"model_type": "qwen2_vl", "vision_config": {"patch_size": 0}},
            "patch_size must be a positive",
        ),
        (
            "qwen2_vl",
            {"model_type": "qwen2_vl", "vision_config": {"patch_size": 1.5}},
            "patch_size must be an integer",
        ),
        ("qwen2_vl", {"model_type": "qwen2_vl", "vision_config": []}, "vision_config must be a mapping"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(name, config, message):
    with pytest.raises(ConfigError, match=message):
        family_for(config)


def test_a_mean_that_would_make_a_black_tile_vanish_is_refused():
    # Black, 0, less a mean of 0 is 0.0 everywhere, which Idefics3 takes for padding.
    with pytest.raises(ConfigError, match="a tile of one colour would become zeros"):
        family_for("idefics3", {"image_mean": [0, 0, 0]})
    with pytest.raises(ConfigError, match="a tile of one colour would become zeros"):
        family_for("smolvlm", {"image_mean": [0.2, 0.4, 0.6]})  # levels 51, 102 and 153


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"do_pan_and_scan": True}, "do_pan_and_scan adds crops and words"),
        ({"image_mean": [0.5]}, "image_mean must be three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "a deviation of 0"),
    ],
)
def test_a_processor_that_is_not_understood_is_refused(processor, message):
    with pytest.raises(ConfigError, match=message):
        family_for("gemma3", processor)
