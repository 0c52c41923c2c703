"""The estimate's parts and phases, and its accuracy on traced and published steps."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest
from pydantic import ValidationError

from benchmarks import bench_memory
from vlmpack.errors import ConfigError
from vlmpack.memory import PRESETS, LanguageShape, ModelShape, TrainingRegime, estimate

NANO = PRESETS["nanovlm-460m"]
REGIME = TrainingRegime(mask="padding", holds_logits=True)
PARAMETERS = 460_113_984  # ViT 86,433,024 + projector 11,796,480 + SmolLM2-360M with 49,218 tokens


@pytest.fixture(scope="module")
def cases():
    return json.loads(bench_memory.CASES.read_text(encoding="utf-8"))


def step(**changes):
    load = {"rows": 1, "tokens_per_row": 4096, "tiles": 17}
    regime = REGIME.model_copy(update={k: v for k, v in changes.items() if k not in load})
    return estimate(NANO, regime, **{**load, **{k: v for k, v in changes.items() if k in load}})


# ---- accuracy against measurements -------------------------------------------------------------
def test_traced_steps_are_within_the_stated_accuracy(cases):
    errors = [score.error for score in bench_memory.traced_scores(cases["traced"])]
    sizes = sorted(abs(error) for error in errors)
    assert len(sizes) == 22
    assert statistics.median(sizes) <= 1.0
    assert sizes[int(0.9 * len(sizes))] <= 2.5
    assert sizes[-1] <= 6.0
    assert min(errors) >= -3.0


def test_published_peaks_are_within_the_stated_accuracy(cases):
    scores = bench_memory.published_scores(cases)
    assert len(scores) == 12
    assert max(abs(score.error) for score in scores) <= 3.5


def test_steps_that_the_formulas_had_not_seen_are_within_it_too():
    own = json.loads(bench_memory.OWN_CASES.read_text(encoding="utf-8"))
    errors = [score.error for score in bench_memory.traced_scores(own["traced"])]
    assert len(errors) == 34
    assert statistics.median(abs(error) for error in errors) <= 1.0
    assert max(abs(error) for error in errors) <= 2.5
    for entry in own["limits"].values():
        assert bench_memory.limit_of(entry).tiles <= bench_memory.safe_limit(entry)


def documented_tables():
    text = bench_memory.DOCS.read_text(encoding="utf-8")
    return text.split(bench_memory.BEGIN)[1].split(bench_memory.END)[0].strip()


def test_the_documentations_tables_are_what_the_benchmark_prints():
    shown = documented_tables().splitlines()
    assert not [line for line in bench_memory.tables(replays=False) if line not in shown]


@pytest.mark.slow
def test_all_of_the_documentations_tables_are_what_the_benchmark_prints():
    assert documented_tables().startswith("\n".join(bench_memory.tables()))


@pytest.mark.parametrize("name", ["nano460-p17", "nano460-ckptall", "hf-smolvlm-bf16", "hf-smolvlm-eager"])
def test_what_is_asked_for_is_exact(cases, name):
    entry = cases["traced"][name]
    result = estimate(
        bench_memory.shape_of(entry["case"]),
        bench_memory.regime_of(entry["case"]),
        **bench_memory.load_of(entry["case"]),
    )
    # the allocator's rounding apart, traced bytes are met to within 0.01 %
    assert result.peak_requested == pytest.approx(entry["truth"]["peak_requested"], rel=1e-4)


def test_the_scenarios_of_the_reference_document_are_met(cases):
    for score in bench_memory.traced_scores(bench_memory.spec_cases(cases)):
        assert abs(score.error) <= 1.0, score


# ---- components --------------------------------------------------------------------------------
def test_static_parts_are_four_bytes_a_parameter():
    parts = step().components
    assert parts["weights"] == 4 * PARAMETERS + 128  # 32 rotary frequencies in float32
    assert parts["gradients"] == 4 * PARAMETERS
    assert parts["optimizer"] == 8 * PARAMETERS
    assert parts["transient_step"] == 4 * PARAMETERS


def test_a_tile_costs_350_megabytes():
    # 12 blocks * 27,712 bytes * 1,024 patches, pixels in 4 + 2 bytes, last norm, projector's input, indices
    expected = 12 * 27_712 * 1024 + 3 * 512 * 512 * (4 + 2) + (4 * 768 + 8) * 1024 + 2 * 768 * 1024 + 16 * 64
    assert step(tiles=34).peak_requested - step(tiles=33).peak_requested == expected


def test_the_peak_is_a_phase_and_not_the_sum():
    result = step()
    assert result.peak_requested == max(phase.total for phase in result.phases)
    assert result.peak_requested < sum(result.components.values())
    assert result.peak.name == "backward loss"


def test_a_small_batch_peaks_at_the_optimizer():
    result = step(tokens_per_row=256, tiles=1)
    assert result.peak.name == "step"
    # five copies of the parameters: weights, gradients, two states, the temporary
    assert result.peak_requested > 5 * 4 * PARAMETERS
    assert step(tokens_per_row=256, tiles=1, optimizer="adamw_fused").peak.name != "step"


def test_every_phase_names_only_what_is_there():
    for phase in step(checkpoint_vision=True, checkpoint_language=True).phases:
        assert all(size >= 0 for size in phase.parts.values()), phase


# ---- options -----------------------------------------------------------------------------------
def test_checkpointing_the_encoder_leaves_its_inputs():
    kept = step(tiles=63, checkpoint_vision=True).components["vision"]
    # 12 blocks keep 4 bytes * 768 * 1,024 a tile; stem and last norm keep their own
    blocks = 12 * 4 * 768 * 1024 * 63
    ends = (2 * 3 * 512 * 512 + (4 * 768 + 8) * 1024) * 63
    assert blocks + ends < kept < 1.02 * (blocks + ends) + 27_712 * 1024 * 63


def test_sub_batches_bound_the_encoder_by_one_of_them():
    whole, pieces = step(tiles=63), step(tiles=63, vision_sub_batch=8)
    assert pieces.peak_requested < whole.peak_requested
    assert pieces.components["vision"] < whole.components["vision"] / 7
    longer = step(tiles=126, rows=2, vision_sub_batch=8)
    assert longer.components["vision"] == pieces.components["vision"]


def test_a_frozen_encoder_keeps_nothing_and_has_no_gradients():
    frozen = step(tiles=63, frozen=("vision",))
    assert frozen.components["vision"] == 0
    assert frozen.components["gradients"] == 4 * (PARAMETERS - 86_433_024)


def test_adapters_train_their_own_weights_alone():
    result = step(lora_rank=8, lora_targets="qv", frozen=("vision", "connector"))
    # q: 8 * (960 + 960), v: 8 * (960 + 320), 32 layers, float32
    trained = 32 * 8 * ((960 + 960) + (960 + 320))
    assert result.components["gradients"] == 4 * trained
    assert result.components["optimizer"] == 8 * trained


def test_accumulation_adds_all_gradients_to_the_forward_pass():
    once, more = step(), step(accumulation=True)
    assert more.peak_requested - once.peak_requested == 4 * PARAMETERS


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("zero1", {"optimizer"}),
        ("zero2", {"optimizer", "gradients"}),
        ("zero3", {"optimizer", "gradients", "weights"}),
    ],
)
def test_sharding_divides_what_its_stage_says(stage, parts):
    alone, shared = step().components, step(sharding=stage, shards=4).components
    for name in ("weights", "gradients", "optimizer"):
        expected = -(-alone[name] // 4) if name in parts else alone[name]
        assert shared[name] == expected, name


def test_an_8_bit_optimizer_keeps_two_bytes_a_parameter():
    assert step(optimizer="adamw_8bit").components["optimizer"] == 2 * PARAMETERS
    assert step(optimizer="sgd").components["optimizer"] == 0
    assert step(optimizer="sgd_momentum").components["optimizer"] == 4 * PARAMETERS
    assert step(master_weights=True).components["optimizer"] == 12 * PARAMETERS


def test_memory_is_linear_in_the_batch():
    # batch 1 with 16 accumulation steps instead of 4: every pack costs the same
    peaks = [step(rows=n, tiles=17 * n, tokens_per_row=2048).peak_requested for n in (2, 3, 4)]
    assert peaks[1] - peaks[0] == peaks[2] - peaks[1]


def test_a_quarter_of_the_side_is_a_fraction_of_the_tiles():
    # 1024 instead of 2048 pixels: 5 instead of 17 tiles an image
    large, small = step(tiles=3 * 17), step(tiles=3 * 5)
    saved = large.components["vision"] - small.components["vision"]
    assert saved == pytest.approx((51 - 15) / 51 * large.components["vision"], rel=0.02)


def test_a_chunked_loss_takes_the_logits_off_the_peak():
    full, chunked = step(), step(cross_entropy="chunked", loss_chunk=256)
    # 12 bytes a position and word, of which one chunk of 256 in 4,096 stays
    assert full.peak_requested - chunked.peak_requested > 8 * 4096 * 49218
    assert step(cross_entropy="fused").peak_requested < full.peak_requested


def test_fractions_of_a_tile_count():
    low, high = step(tiles=17).peak_requested, step(tiles=18).peak_requested
    assert low < step(tiles=17.5).peak_requested < high


# ---- bad input ---------------------------------------------------------------------------------
@pytest.mark.parametrize("load", [{"rows": 0}, {"tokens_per_row": 0}, {"tiles": -1}])
def test_impossible_loads_are_refused(load):
    with pytest.raises(ConfigError):
        step(**load)


def test_tiles_without_an_encoder_are_refused():
    text = ModelShape(
        name="text",
        language=LanguageShape(layers=1, hidden=8, intermediate=8, heads=1, kv_heads=1, vocab=8),
    )
    with pytest.raises(ConfigError, match="no vision encoder"):
        estimate(text, REGIME, rows=1, tokens_per_row=8, tiles=1)


def test_a_regime_that_trains_nothing_is_refused():
    with pytest.raises(ConfigError, match="nothing to train"):
        step(frozen=("vision", "connector", "language"))


@pytest.mark.parametrize(
    "settings",
    [
        {"weigths": "bf16"},
        {"weights": "int8"},
        {"lora_rank": "8"},
        {"lora_rank": 0},
        {"checkpoint_vision": 1},
        {"weights": "bf16", "autocast": "fp16"},
        {"sharding": "zero2"},
        {"shards": 4},
        {"lora_rank": 4, "frozen": ("language",)},
    ],
)
def test_a_wrong_regime_is_refused(settings):
    with pytest.raises(ValidationError):
        TrainingRegime(**settings)


def test_frozen_parts_may_come_as_a_list():
    assert TrainingRegime(frozen=["vision"]) == TrainingRegime(frozen=("vision",))
    with pytest.raises(ValidationError, match="frozen"):
        TrainingRegime(frozen=["eyes"])


# ---- cost of asking ----------------------------------------------------------------------------
def test_an_estimate_needs_neither_torch_nor_numba():
    code = (
        "import sys; from vlmpack.memory import PRESETS, TrainingRegime, estimate, max_tiles, recommend;"
        "m = PRESETS['nanovlm-460m']; r = TrainingRegime();"
        "estimate(m, r, rows=1, tokens_per_row=4096, tiles=3);"
        "max_tiles(m, r, 'H100', rows=1, tokens_per_row=4096);"
        "print([n for n in ('torch', 'numba', 'transformers', 'datasets') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
