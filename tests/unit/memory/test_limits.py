"""Limits: never above what the allocator really takes, sensible messages, the front, budgets, remedies."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from benchmarks import bench_memory
from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling
from vlmpack.memory import (
    GPUS,
    PRESETS,
    TrainingRegime,
    batch_budget_for_gpu,
    check,
    estimate,
    find_gpu,
    max_tiles,
    pack_budget_for_gpu,
    pareto_front,
    remedies,
)

NANO = PRESETS["nanovlm-460m"]
REGIME = TrainingRegime(mask="padding", holds_logits=True)
PACK = {"tokens_per_row": 4096}


def test_the_rule_never_exceeds_the_allocator_and_uses_nine_tenths_of_it():
    limits = json.loads(bench_memory.CASES.read_text(encoding="utf-8"))["limits"]
    assert len(limits) == 3
    for name, entry in limits.items():
        ours, real = bench_memory.limit_of(entry).tiles, entry["truth"]["max_tiles"]
        assert 0.9 * real <= ours <= real, name


# The same rule by hand on the reference model, 4,096 positions a pack: packs -> tiles, None: not even text
BY_GPU = [
    ("4090", {1: 21, 2: None}),
    ("A100-40", {1: 63, 2: 38}),
    ("A100-80", {2: 126, 4: 98}),
]


@pytest.mark.parametrize(("gpu", "expected"), BY_GPU)
def test_the_reference_model_by_gpu(gpu, expected):
    for rows, tiles in expected.items():
        if tiles is None:
            with pytest.raises(ConfigError, match="without a single picture"):
                max_tiles(NANO, REGIME, gpu, rows=rows, **PACK)
        else:
            assert max_tiles(NANO, REGIME, gpu, rows=rows, **PACK).tiles == tiles


def test_checkpointing_the_encoder_makes_tokens_the_bound():
    regime = REGIME.model_copy(update={"checkpoint_vision": True})
    limit = max_tiles(NANO, regime, "A100-80", rows=4, **PACK)
    # 4 rows * floor(4096 / 65)
    assert (limit.tiles, limit.by_tokens, limit.bound) == (252, 252, "tokens")


def test_one_tile_more_does_not_fit():
    limit = max_tiles(NANO, REGIME, "4090", rows=1, **PACK)
    assert limit.bound == "memory"
    assert check(NANO, REGIME, "4090", rows=1, tiles=limit.tiles, **PACK).fits
    over = check(NANO, REGIME, "4090", rows=1, tiles=limit.tiles + 1, **PACK)
    assert not over.fits
    assert over.short_bytes == over.required_bytes - over.available_bytes > 0


def test_expandable_segments_leave_the_logits_block_out_but_not_the_rounding():
    segments = REGIME.model_copy(update={"expandable_segments": True})
    plain = check(NANO, REGIME, "H100", rows=1, tiles=17, **PACK).required_bytes
    grown = check(NANO, segments, "H100", rows=1, tiles=17, **PACK).required_bytes
    workspace = GPUS["H100"].workspace_bytes
    regime = segments.model_copy(update={"workspace_bytes": workspace})
    peak = estimate(NANO, regime, rows=1, tiles=17, **PACK).peak_requested
    assert plain - grown == 4 * 4096 * 49218 - int(0.015 * peak)


def test_a_limit_with_expandable_segments_is_not_over_the_published_one():
    # two rows of the reference model on 40 GB: 41 tiles run in a simulated allocator
    segments = REGIME.model_copy(update={"expandable_segments": True})
    size = 39_735 * 2**20 + REGIME.context_bytes
    assert 0.9 * 41 <= max_tiles(NANO, segments, size, rows=2, position_tokens=0, **PACK).tiles <= 41


def test_the_margin_is_a_share_of_the_peak():
    step = estimate(NANO, REGIME.model_copy(update={"workspace_bytes": 0}), rows=1, tiles=17, **PACK)
    size = 30 * 2**30
    regime = REGIME.model_copy(update={"workspace_bytes": 0})
    loose = check(NANO, regime, size, rows=1, tiles=17, margin=0.0, **PACK).required_bytes
    tight = check(NANO, regime, size, rows=1, tiles=17, margin=0.1, **PACK).required_bytes
    assert tight - loose == pytest.approx(0.1 * step.peak_requested, abs=2)


@pytest.mark.parametrize("margin", [-0.1, 1.0, 3])
def test_a_margin_that_is_no_fraction_is_refused(margin):
    with pytest.raises(ConfigError, match="fraction"):
        check(NANO, REGIME, "H100", rows=1, margin=margin, **PACK)


def test_a_percentage_gets_a_hint():
    with pytest.raises(ConfigError, match=r"did you mean 0\.03"):
        check(NANO, REGIME, "H100", rows=1, margin=3, **PACK)


# ---- GPUs that are too small -------------------------------------------------------------------
def test_weights_alone_over_the_gpu_say_by_how_much():
    with pytest.raises(ConfigError, match=r"weights, gradients, optimizer .* too much") as error:
        max_tiles(PRESETS["qwen2-vl-7b"], TrainingRegime(), "L4", rows=1, **PACK)
    # 8,291,375,616 parameters * 16 bytes are 123.6 GiB, and the context is 0.6
    assert "124.1" in str(error.value)


def test_no_budget_is_ever_negative():
    with pytest.raises(ConfigError):
        batch_budget_for_gpu(NANO, REGIME, 2**30, **PACK)
    with pytest.raises(ConfigError):
        pareto_front(NANO, REGIME, 8 * 2**30, **PACK)


# ---- GPU names ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("H100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("rtx 3090", "3090"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("a100-40", "A100-40"),
        ("NVIDIA A10", "A10"),
        ("L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_gpus_are_found_by_their_usual_names(given, expected):
    assert find_gpu(given) is GPUS[expected]


def test_every_gpu_of_the_table_is_found_by_its_own_name():
    assert len(GPUS) == 11
    for name, gpu in GPUS.items():
        assert find_gpu(name) is gpu


@pytest.mark.parametrize("gpu", ["A100", "TPU", "", 0, -1, 2.5, True])
def test_unknown_or_ambiguous_gpus_are_refused(gpu):
    with pytest.raises(ConfigError):
        find_gpu(gpu)


# ---- budgets and the front ---------------------------------------------------------------------
def test_a_batch_budget_counts_packs_patches_and_tokens():
    budget = batch_budget_for_gpu(NANO, REGIME, "4090", rows=1, **PACK)
    assert (budget.max_packs, budget.max_patches, budget.max_tokens) == (1, 21 * 1024, 4096)


def test_without_rows_the_largest_number_of_full_packs_is_taken():
    # 80 GB: two packs may hold all of their 63 tiles, three may not (42 each)
    budget = batch_budget_for_gpu(NANO, REGIME, "A100-80", **PACK)
    assert (budget.max_packs, budget.max_patches) == (2, 126 * 1024)


def test_a_pack_budget_divides_the_tiles_evenly():
    budget = pack_budget_for_gpu(NANO, REGIME, "A100-80", rows=4, max_images=18, **PACK)
    # 98 tiles for four packs: 24 each
    assert (budget.max_tokens, budget.max_images, budget.max_patches) == (4096, 18, 24 * 1024)


def test_the_front_trades_packs_for_tiles():
    front = pareto_front(NANO, REGIME, "A100-80", **PACK)
    assert [(point.rows, point.tiles_per_row) for point in front][:3] == [(2, 63), (3, 42), (4, 24)]
    for left, right in pairwise(front):
        assert left.rows < right.rows
        assert left.tiles_per_row > right.tiles_per_row
    assert all(point.required_bytes <= GPUS["A100-80"].total_bytes for point in front)


# ---- remedies ----------------------------------------------------------------------------------
def test_remedies_are_ranked_and_hold_what_they_promise():
    found = remedies(NANO, REGIME, "A100-80", rows=4, tiles=252, tiling=Tiling(), images=15, **PACK)
    now = estimate(
        NANO,
        REGIME.model_copy(update={"workspace_bytes": GPUS["A100-80"].workspace_bytes}),
        rows=4,
        tiles=252,
        **PACK,
    ).peak_bytes
    assert [r.saved_bytes for r in found] == sorted((r.saved_bytes for r in found), reverse=True)
    assert all(r.peak_bytes == now - r.saved_bytes for r in found)
    names = {r.name: r for r in found}
    assert names["checkpoint the vision encoder"].fits
    assert not names["8-bit AdamW"].fits
    # 1,536 instead of 2,048 pixels: 10 instead of 17 tiles an image
    assert "largest side 1536 instead of 2048" in names
    assert any("tiles at a time" in name for name in names)


def test_what_is_done_already_is_no_remedy():
    regime = REGIME.model_copy(update={"checkpoint_vision": True, "optimizer": "adamw_8bit"})
    names = {r.name for r in remedies(NANO, regime, "4090", rows=1, tiles=40, **PACK)}
    assert "checkpoint the vision encoder" not in names
    assert not any("AdamW" in name for name in names)
