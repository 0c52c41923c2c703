"""Whole steps replayed in the allocator: against traced steps, and the limits that follow from them."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_memory
from tests.unit.memory.small import SMALL_MODEL
from vlmpack.errors import ConfigError
from vlmpack.memory import PRESETS, BatchGuard, TrainingRegime, estimate, max_tiles, replay
from vlmpack.memory.fit_rule import FitRule
from vlmpack.memory.replay import _Run, can_replay
from vlmpack.memory.replay_limit import replayed_tiles

GIB = 2**30
TRUTH = {
    **json.loads(bench_memory.CASES.read_text(encoding="utf-8"))["traced"],
    **json.loads(bench_memory.OWN_CASES.read_text(encoding="utf-8"))["traced"],
}
TRUTH = {name: e for name, e in TRUTH.items() if can_replay(bench_memory.regime_of(e["case"]))}
LIMITS = {
    **json.loads(bench_memory.CASES.read_text(encoding="utf-8"))["limits"],
    **json.loads(bench_memory.OWN_CASES.read_text(encoding="utf-8"))["limits"],
}


def replayed(entry):
    case = entry["case"]
    return replay(bench_memory.shape_of(case), bench_memory.regime_of(case), **bench_memory.load_of(case))


# ---- against traced steps ----------------------------------------------------------------------
def test_replays_ask_for_the_bytes_that_traced_steps_ask_for():
    assert len(TRUTH) >= 50
    for name, entry in TRUTH.items():
        asked = replayed(entry).peak_requested
        assert asked == pytest.approx(entry["truth"]["peak_requested"], rel=2e-4), name


def test_replays_allocate_and_reserve_what_traced_steps_do():
    def errors(ours, theirs):
        pairs = [(getattr(replayed(entry), ours), entry["truth"][theirs]) for entry in TRUTH.values()]
        return sorted(abs(mine / truth - 1) for mine, truth in pairs)

    allocated, reserved = errors("peak_allocated", "peak_allocated"), errors("peak_reserved", "peak_reserved")
    middle, most = len(TRUTH) // 2, int(0.9 * len(TRUTH))
    assert (allocated[middle] < 0.001, allocated[-1] < 0.005) == (True, True)
    assert (reserved[middle] < 0.003, reserved[most] < 0.02, reserved[-1] < 0.06) == (True, True, True)


@pytest.mark.parametrize("name", ["nano460-p17", "nano460-ckptall", "hf-smolvlm-bf16", "hf-q1.5b-lora"])
def test_a_replay_and_the_closed_form_ask_for_the_same(name):
    case = TRUTH[name]["case"]
    shape, regime, load = (
        f(case) for f in (bench_memory.shape_of, bench_memory.regime_of, bench_memory.load_of)
    )
    assert replayed(TRUTH[name]).peak_requested == pytest.approx(
        estimate(shape, regime, **load).peak_requested, rel=2e-4
    )


# ---- a run -------------------------------------------------------------------------------------
@pytest.mark.parametrize("tiles", [0, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulation": True},
        {"checkpoint_vision": True, "checkpoint_language": True},
        {"frozen": ("language",)},
        {"frozen": ("vision", "connector")},
        {"lora_rank": 4, "frozen": ("vision",)},
        {"holds_logits": True, "mask": "padding"},
        {"cross_entropy": "chunked", "loss_chunk": 8},
        {"cross_entropy": "fused", "loss_chunk": 8},
        {"optimizer": "sgd"},
        {"optimizer": "adamw_8bit", "master_weights": True},
        {"weights": "bf16", "autocast": None, "attention": "eager"},
    ],
)
def test_after_a_step_only_what_stays_is_there(settings, tiles):
    if settings.get("frozen") == ("language",) and not tiles:
        pytest.skip("nothing of it would be trained")
    from vlmpack.memory.caching import CachingAllocator
    from vlmpack.memory.static import static_bytes

    regime = TrainingRegime(**settings)
    run = _Run(SMALL_MODEL, regime, 2, 32, tiles, CachingAllocator())
    run.train()
    static = static_bytes(SMALL_MODEL, regime, 32)
    columns = 2 if regime.mask == "none" else 3
    batch = 2 * 32 * 8 * columns + tiles * 3 * 32 * 32 * regime.weight_bytes
    held = 2 * 32 * 512 * regime.compute_bytes if regime.holds_logits else 0
    stays = static.weights + static.optimizer + regime.workspace_bytes + batch + held
    assert run.requested == stays


def test_a_capacity_is_a_limit():
    load = {"rows": 2, "tokens_per_row": 64, "tiles": 4}
    free = replay(SMALL_MODEL, TrainingRegime(), **load)
    assert free.fits
    assert replay(SMALL_MODEL, TrainingRegime(), **load, capacity=free.peak_reserved) == free
    short = replay(SMALL_MODEL, TrainingRegime(), **load, capacity=free.peak_allocated - 1)
    assert not short.fits


@pytest.mark.parametrize("settings", [{"sharding": "zero2", "shards": 4}, {"vision_sub_batch": 2}])
def test_what_cannot_be_replayed_is_said(settings):
    regime = TrainingRegime(**settings)
    assert not can_replay(regime)
    with pytest.raises(ConfigError, match="cannot be replayed"):
        replay(SMALL_MODEL, regime, rows=1, tokens_per_row=8)
    # a limit falls back to the rule
    load = {"rows": 1, "tokens_per_row": 64}
    size = 2 * GIB
    assert max_tiles(SMALL_MODEL, regime, size, **load, replay=True) == max_tiles(
        SMALL_MODEL, regime, size, **load
    )


# ---- limits ------------------------------------------------------------------------------------
def rule_of(entry, *, asks_replay):
    case = entry["case"]
    regime = bench_memory.regime_of(case)
    return FitRule.of(
        bench_memory.shape_of(case),
        regime,
        entry["capacity_MiB"] * 2**20 + regime.context_bytes,
        tokens_per_row=case["seq"],
        position_tokens=0,
        replay=asks_replay,
    )


@pytest.mark.parametrize("name", LIMITS)
def test_no_limit_exceeds_the_allocators_and_the_replay_uses_nine_tenths_of_it(name):
    truth, rows = LIMITS[name]["truth"], LIMITS[name]["case"]["batch"]
    quick = rule_of(LIMITS[name], asks_replay=False).most_tiles(rows).tiles
    found = rule_of(LIMITS[name], asks_replay=True).most_tiles(rows).tiles
    # a count that fails where a larger one runs ends what may be promised
    real = min([truth["max_tiles"], *(hole - 1 for hole in truth.get("holes", []))])
    assert quick <= found <= real
    assert found >= 0.9 * real


def test_a_hole_below_the_largest_count_ends_the_limit():
    entry = LIMITS["hf-q1.5b-bf16-80GB-b3"]
    rule = rule_of(entry, asks_replay=True)
    capacity = rule.gpu.total_bytes - rule.regime.context_bytes
    load = {"rows": 3, "tokens_per_row": 4096, "capacity": capacity}
    runs = [replay(rule.model, rule.regime, tiles=tiles, **load).fits for tiles in (24, 30, 36)]
    assert runs == [True, False, True]
    found = replayed_tiles(rule.model, rule.regime, capacity, rows=3, tokens_per_row=4096)
    assert 21 <= found < 30


def test_nothing_that_does_not_fit_without_pictures_gets_a_limit():
    load = {"rows": 2, "tokens_per_row": 4096}
    regime = TrainingRegime(mask="padding", holds_logits=True)
    assert replayed_tiles(PRESETS["nanovlm-460m"], regime, 23 * GIB, **load) == -1


def test_a_guard_lets_pass_what_the_replay_takes():
    # sixteen short rows: the rule keeps the logits' block free, which the allocator finds
    model, regime = PRESETS["nanovlm-222m"], TrainingRegime(mask="padding", holds_logits=True)
    load = {"rows": 16, "tokens_per_row": 512}
    quick = BatchGuard(model, regime, "3090")
    closer = BatchGuard(model, regime, "3090", replay=True)
    few, many = (guard.pack_budget(**load).max_patches for guard in (quick, closer))
    assert many > few
    assert not quick.verdict(**load, patches=16 * many).fits
    verdict = closer.verdict(**load, patches=16 * many)
    assert (verdict.fits, verdict.short_bytes) == (True, 0)
    assert not closer.verdict(**load, patches=32 * many).fits
    # what the packer was promised holds at the collator, whatever the tokens of a tile
    free = closer.pack_budget(**load, bounded=False).max_patches
    assert free >= many
    assert closer.verdict(**load, patches=16 * free).fits
