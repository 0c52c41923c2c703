"""The stages connected: settings reach their stage, and a batch comes out of rows."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tests.fakes import jpeg, row, tokenizer
from tests.unit.memory.small import SMALL_MODEL, gpu_for
from vlmpack.errors import BudgetError, ConfigError
from vlmpack.memory import BatchGuard, TrainingRegime
from vlmpack.pipeline import PipelineConfig, build_pipeline

TINY = {"tile_size": 32, "max_side": 128, "tokens_per_tile": 4, "seq_length": 256}


def test_rows_come_out_as_batches_and_the_report_adds_up():
    # 64 x 32 pixels: 1 x 2 tiles of 32 and the global one, 4 patches each: 12 a sample, 24 in a pack.
    rows = [row(f"Question {n}?", images=[jpeg(64, 32, n)]) for n in range(8)]
    pipeline = build_pipeline(rows, tokenizer(), PipelineConfig(**TINY, max_patches=24, batch_size=2))
    batches = list(pipeline.loader)
    assert [len(batch["keys"]) for batch in batches] == [2, 2]
    assert sorted(key for batch in batches for pack in batch["keys"] for key in pack) == list("01234567")
    assert all(batch["tiles"].shape == (12, 3, 32, 32) for batch in batches)
    report = pipeline.report
    assert (report.num_read, report.num_packed, report.num_packs, report.total_refused) == (8, 8, 4, 0)
    assert report.fill["patches"] == 1.0


def test_each_setting_reaches_its_stage():
    rows = [
        {**row("<im>What?", images=[jpeg(300, 300)]), "name": "big"},
        {**row(images=[jpeg(20, 20), jpeg(20, 20)]), "name": "two"},
        {**row("long " * 300), "name": "long"},
        {**row(), "name": "rated", "relevance_ratings": [2]},
        {**row(), "name": "good", "relevance_ratings": [3]},
    ]
    config = PipelineConfig(
        **TINY,
        image_marker="<im>",
        key_column="name",
        max_images_per_example=1,
        min_rating=3,
        oversize="fewer_tiles",
        max_patches=30,  # 300 pixels are 4 x 4 tiles + 1: 68 patches; 2 x 2 + 1 are 20
        append_pad=False,
    )
    pipeline = build_pipeline(rows, tokenizer(), config)
    packs = list(pipeline.packs)
    assert sorted(key for pack in packs for key in pack.keys) == ["big", "good"]
    assert sum(len(pack.tiles) for pack in packs) == 5
    assert all((pack.segment_ids > 0).all() for pack in packs)
    report = pipeline.report
    assert dict(report.num_refused) == {"too_many_images": 1, "over_budget": 1, "ratings": 1}
    assert report.num_shrunk == 1


def test_the_batch_budget_reaches_the_collator():
    rows = [row(images=[jpeg(20, 20, n)]) for n in range(4)]
    config = PipelineConfig(**TINY, max_images=1, batch_size=4, max_batch_patches=15)
    with pytest.raises(BudgetError, match="the batch holds 16 patches, over its budget of 15"):
        list(build_pipeline(rows, tokenizer(), config).loader)


def test_with_the_gpus_budget_no_batch_is_refused_and_with_a_larger_one_it_is():
    # 64 x 32 pixels: 3 tiles of 4 patches. The GPU takes 2 rows with 6 tiles together: 12 patches a pack.
    rows = [row(f"Question {n}?", images=[jpeg(64, 32, n)]) for n in range(9)]
    gpu = gpu_for(rows=2, tokens_per_row=256, tiles=6)
    guard = BatchGuard(SMALL_MODEL, None, gpu)
    config = PipelineConfig(**TINY, batch_size=2)
    pipeline = build_pipeline(rows, tokenizer(), config, memory=guard)
    assert pipeline.packs.budget.max_patches == 12
    batches = list(pipeline.loader)
    assert [len(batch["tiles"]) for batch in batches] == [6, 6, 6, 6, 3]
    assert pipeline.report.total_refused == 0
    larger = BatchGuard(SMALL_MODEL, None, gpu_for(rows=2, tokens_per_row=256, tiles=12))
    pipeline = build_pipeline(rows, tokenizer(), config, memory=larger)
    assert pipeline.packs.budget.max_patches == 24
    pipeline.collator._memory = guard
    with pytest.raises(BudgetError, match=r"needs .* MiB too much") as refusal:
        list(pipeline.loader)
    assert "Dearest samples: " in str(refusal.value)
    assert "vision 0.0 MiB" not in str(refusal.value)


def test_the_gpu_is_named_in_the_settings():
    config = PipelineConfig(gpu="A100-40", model="nanovlm-460m", batch_size=2)
    pipeline = build_pipeline([row()], tokenizer(), config)
    assert pipeline.packs.budget.max_patches == 17 * 1024  # with a dense mask, as packed rows need it
    frugal = {"mask": "packed", "checkpoint_vision": True, "cross_entropy": "chunked"}
    config = PipelineConfig(
        gpu="A100-40", model="nanovlm-460m", batch_size=2, regime=frugal, max_patches=9000
    )
    assert config.regime == TrainingRegime(**frugal)
    assert build_pipeline([row()], tokenizer(), config).packs.budget.max_patches == 9000
    assert PipelineConfig().memory() is None
    closer = PipelineConfig(gpu="A100-40", model="nanovlm-460m", memory_replay=True).memory()
    assert closer is not None
    assert closer._rule.replay


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpu": "H100"}, "a memory check needs gpu and model, got gpu='H100', model=None"),
        ({"model": "nanovlm-460m"}, "a memory check needs gpu and model"),
        (
            {"gpu": "H100", "model": "smolvlm2-2.2b"},
            "tiles of 512 pixels, but smolvlm2-2.2b takes tiles of 384",
        ),
        ({"gpu": 2**30, "model": "nanovlm-460m"}, "does not fit 1.0 GiB"),
        ({"gpu": "C64", "model": "nanovlm-460m"}, "GPU 'C64' is unknown"),
        ({"gpu": "H100", "model": "nanovlm-461m"}, "neither a preset nor a local config"),
        ({"gpu": 0, "model": "nanovlm-460m"}, "positive number of bytes"),
    ],
)
def test_a_gpu_or_model_that_cannot_be_used_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        build_pipeline([row()], tokenizer(), PipelineConfig(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"seq_lenght": 4096},
        {"seq_length": "4096"},
        {"seq_length": 0},
        {"oversize": "cut"},
        {"decode": 1},
        {"memory_margin": 1.5},
    ],
)
def test_a_misspelt_or_wrongly_typed_setting_is_an_error(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        PipelineConfig(**settings)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="does not divide max_side"):
        build_pipeline([row()], tokenizer(), PipelineConfig(tile_size=500))
