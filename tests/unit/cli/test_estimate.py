"""`vlmpack estimate`: breakdown, verdict, remedies, choices, pictures; what cannot be answered is said."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import types
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from tests.unit.memory.test_configs import NANO_CONFIG
from vlmpack.cli.estimate import estimate
from vlmpack.memory import GPUS, PRESETS, TrainingRegime, check, max_tiles, pareto_front, remedies
from vlmpack.memory import estimate as estimate_step

NANO = PRESETS["nanovlm-460m"]
REFERENCE = ("--mask", "padding", "--holds-logits")
REGIME = TrainingRegime(mask="padding", holds_logits=True, workspace_bytes=GPUS["A100-40"].workspace_bytes)
LOAD = {"rows": 2, "tokens_per_row": 4096, "tiles": 60}


def figures_of(result) -> dict:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


# ---- options -----------------------------------------------------------------------------------
def test_every_setting_of_a_regime_has_an_option_with_its_choices_and_default():
    parameters = inspect.signature(estimate).parameters
    hints = get_type_hints(estimate)
    differing = {"mask": "packed", "autocast": "bf16", "frozen": None}
    for name, field in TrainingRegime.model_fields.items():
        assert parameters[name].default == differing.get(name, field.default), name
        assert choices(hints[name]) - {"none"} == choices(field.annotation) - {"none"}, name


def choices(annotation: object) -> set[str]:
    """Return the words that a type allows, None left out."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) in {types.UnionType, __import__("typing").Union}:
        return set().union(*(choices(inner) for inner in get_args(annotation)))
    return set()


def test_the_settings_reach_the_memory_model(vlmpack):
    options = ("--weights", "bf16", "--autocast", "none", "--frozen", "vision,connector", "--shards", 4)
    options += ("--sharding", "zero2", "--optimizer", "adamw_fused", "--checkpoint-language", "--rows", 3)
    figures = figures_of(vlmpack("estimate", "smolvlm-500m", *options, "--tiles", 17, "--json", "-"))
    regime = TrainingRegime(
        weights="bf16",
        autocast=None,
        frozen=("vision", "connector"),
        shards=4,
        sharding="zero2",
        optimizer="adamw_fused",
        checkpoint_language=True,
        mask="packed",
    )
    assert TrainingRegime.model_validate_json(json.dumps(figures["regime"])) == regime
    step = estimate_step(PRESETS["smolvlm-500m"], regime, rows=3, tokens_per_row=4096, tiles=17)
    assert figures["peak"]["requested_bytes"] == step.peak_requested
    assert figures["peak"]["total_bytes"] == step.device_bytes
    assert figures["phases"] == [{"name": p.name, "parts": dict(p.parts)} for p in step.phases]
    assert figures["verdict"] is None, "no GPU was named"


# ---- answers -----------------------------------------------------------------------------------
def test_the_answer_is_the_memory_models(vlmpack, tmp_path):
    file = tmp_path / "answer.json"
    shown = vlmpack(
        "estimate", "nanovlm-460m", "--gpu", "A100-40", "--rows", 2, "--tiles", 60, *REFERENCE, "--json", file
    )
    assert shown.exit_code == 0, shown.stderr
    figures = json.loads(file.read_text())
    verdict = check(NANO, REGIME, "A100-40", **LOAD)
    assert not verdict.fits
    assert figures["verdict"]["short_bytes"] == verdict.short_bytes
    assert f"does not fit: {verdict.required_bytes / 2**30:.2f} GiB of 39.39 GiB" in shown.stdout
    limit = max_tiles(NANO, REGIME, "A100-40", rows=2, tokens_per_row=4096)
    assert figures["limit"] == {"tiles": limit.tiles, "by_tokens": 126, "bound": "memory"}
    assert f"up to {limit.tiles} tiles fit such a batch (tokens would allow 126)" in shown.stdout
    assert figures["pack_budget"]["max_patches"] == limit.tiles // 2 * 1024
    found = remedies(NANO, REGIME, "A100-40", **LOAD)
    assert [remedy["name"] for remedy in figures["remedies"]] == [remedy.name for remedy in found]
    front = pareto_front(NANO, REGIME, "A100-40", tokens_per_row=4096)
    assert [(p["rows"], p["tiles_per_row"]) for p in figures["front"]] == [
        (p.rows, p.tiles_per_row) for p in front
    ]
    step = estimate_step(NANO, REGIME, **LOAD)
    for name, size in step.peak.parts.items():
        line = next((line for line in shown.stdout.splitlines() if line.split()[:1] == [name]), None)
        assert (line is None) == (size == 0), name
        assert line is None or line.split()[1] == f"{size / 2**30:.2f}"
    assert [phase.name for phase in step.phases] == [
        line[:29].strip() for line in shown.stdout.splitlines()[6 : 6 + len(step.phases)]
    ]


def test_without_a_number_of_tiles_the_rows_are_full_of_them(vlmpack):
    figures = figures_of(vlmpack("estimate", "nanovlm-460m", "--rows", 2, "--json", "-"))
    assert figures["batch"]["tiles"] == 126


@pytest.mark.parametrize(
    ("model", "images", "side", "tiles"),
    [
        ("nanovlm-460m", 8, 1536, 8 * 10),
        ("nanovlm-460m", 72, 2048, 1224),
        ("nanovlm-460m", 3, 400, 3),
        ("smolvlm2-2.2b", 2, 1152, 2 * 10),  # tiles of 384 pixels, which 14 does not divide
        # 672 pixels are 48 patches of 14; a tile of 448 pixels is 32 x 32 patches
        ("qwen2.5-vl-3b", 2, 672, 2 * 48**2 / 32**2),
    ],
)
def test_images_become_tiles_of_the_models_size(vlmpack, model, images, side, tiles):
    figures = figures_of(vlmpack("estimate", model, "--images", images, "--side", side, "--json", "-"))
    assert figures["batch"]["tiles"] == tiles


def test_fewer_images_and_a_smaller_side_are_remedies_where_images_are_told(vlmpack):
    batch = ("--gpu", "A100-40", "--rows", 2, "--images", 7)
    names = {
        remedy["name"]
        for remedy in figures_of(vlmpack("estimate", "nanovlm-460m", *batch, "--json", "-"))["remedies"]
    }
    assert {"one image less a pack", "largest side 1536 instead of 2048"} <= names


def test_a_config_file_and_a_folder_are_read(vlmpack, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NANO_CONFIG))
    one, two = (
        figures_of(vlmpack("estimate", place, "--json", "-"))
        for place in (tmp_path, tmp_path / "config.json")
    )
    assert one == two
    assert one["num_parameters"] == NANO.num_parameters


@pytest.mark.parametrize(
    ("gpu", "size"), [("4090", GPUS["4090"].total_bytes), ("24GiB", 24 * 2**30), ("80gb", 80 * 10**9)]
)
def test_a_gpu_is_a_name_or_a_size(vlmpack, gpu, size):
    figures = figures_of(vlmpack("estimate", "nanovlm-460m", "--gpu", gpu, "--json", "-"))
    assert figures["gpu"]["total_bytes"] == size


def test_a_batch_that_fits_says_so(vlmpack):
    shown = vlmpack("estimate", "nanovlm-460m", "--gpu", "H100", "--tiles", 17).stdout
    assert "\nfits: " in shown
    assert "(tokens allow no more): max_patches=64,512 a pack" in shown


def test_a_replay_says_what_is_reserved_and_allows_what_the_rule_does_not(vlmpack):
    batch = ("--gpu", "3090", "--rows", 16, "--tokens", 512, "--tiles", 110, *REFERENCE)
    quick = figures_of(vlmpack("estimate", "nanovlm-222m", *batch, "--json", "-"))
    closer = figures_of(vlmpack("estimate", "nanovlm-222m", *batch, "--replay", "--json", "-"))
    # docs/memory_model.md has the same two limits
    assert (quick["limit"]["tiles"], closer["limit"]["tiles"]) == (99, 116)
    assert (quick["verdict"]["fits"], closer["verdict"]["fits"]) == (False, True)
    assert quick["replayed"] is None
    assert closer["peak"]["requested_bytes"] < closer["replayed"]["peak_allocated"]
    assert (
        closer["replayed"]["peak_allocated"] < closer["replayed"]["peak_reserved"] < GPUS["3090"].total_bytes
    )
    assert "Replayed in the allocator: " in vlmpack("estimate", "nanovlm-222m", "--replay").stdout


# ---- the worked example ------------------------------------------------------------------------
def test_the_worked_example_shows_each_figure_and_its_erratum(vlmpack):
    shown = vlmpack("estimate", "--worked-example").stdout
    for words in (
        "1,224 tiles: 4 packs * 18 images * 17 tiles",
        "so 4 packs of 4,096 hold 252",
        "28.69 + 5.38 + 7.17 = 41.24 GiB",
        "494.86 GiB",
        "the whole step needs 440.21 GiB with SDPA",
        "408 tiles: ~12 GB",
        "the step needs 174.25 GiB",
        "35-45 GB at batch 2, 8 images, 1536 pixels",
        "76.12 GiB",
        "2 packs of 63 tiles",
    ):
        assert words in shown
    lines = figures_of(vlmpack("estimate", "--worked-example", "--json", "-"))["lines"]
    assert len(lines) == 7


def test_the_worked_example_is_about_one_model(vlmpack):
    result = vlmpack("estimate", "smolvlm-500m", "--worked-example")
    assert result.exit_code == 2
    assert "--worked-example is about nanovlm-460m" in result.stderr


# ---- pictures and measurements -----------------------------------------------------------------
def test_memory_is_drawn_against_tiles(vlmpack, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "memory.png"
    result = vlmpack("estimate", "nanovlm-222m", "--gpu", "A10", "--tokens", 512, "--plot", file)
    assert result.exit_code == 0, result.stderr
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_real_step_is_measured_beside_the_estimate(vlmpack, tmp_path):
    oracle = pytest.importorskip("tests.unit.memory.oracle")
    oracle.idefics3("sdpa").model.config.save_pretrained(tmp_path)
    batch = ("--rows", 2, "--tokens", 96, "--tiles", 2)
    result = vlmpack("estimate", tmp_path, *batch, "--measure", "--json", tmp_path / "answer.json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads((tmp_path / "answer.json").read_text())["measured"]
    assert figures["measured_bytes"] > 2**20
    assert abs(figures["error"]) < 0.01
    assert "Measured on" in result.stdout


# ---- what cannot be answered -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a model: nanovlm-222m, "),
        (["nanovlm-461m"], "nanovlm-461m is neither a preset nor a local config. Presets: "),
        (["nanovlm-460m", "--gpu", "C64"], "GPU 'C64' is unknown. Known: 3090, "),
        (["nanovlm-460m", "--gpu", "A100"], "could be A100-40 or A100-80"),
        (["nanovlm-460m", "--rows", 0], "--rows must be at least 1, got 0"),
        (["nanovlm-460m", "--tokens", -5], "--tokens must be at least 1, got -5"),
        (["nanovlm-460m", "--tiles", -1], "--tiles must not be negative, got -1"),
        (["nanovlm-460m", "--images", -1], "--images must not be negative, got -1"),
        (["nanovlm-460m", "--images", 1, "--side", 0], "--side must be at least 1, got 0"),
        (["nanovlm-460m", "--images", 1, "--tiles", 1], "give --tiles or --images, not both"),
        (["nanovlm-460m", "--lora-rank", 0], "--lora-rank must be greater than 0, got 0"),
        (["nanovlm-460m", "--frozen", "eyes"], "--frozen must be 'vision', 'connector' or 'language'"),
        (["nanovlm-460m", "--sharding", "zero3"], "sharding='zero3' contradicts shards=1"),
        (["nanovlm-460m", "--gpu", "H100", "--margin", "3"], "did you mean 0.03?"),
        (["nanovlm-460m", "--plot", "x.png"], "name it by --gpu"),
        (["nanovlm-460m", "--json", "no/such/folder.json"], "--json: there is no folder no/such"),
        (["nanovlm-460m", "--measure"], "a preset has sizes only"),
        # 7,063,427,072 parameters * 16 bytes are 105.25 GiB, less the unused parts' gradients and states
        (["llava-1.5-7b", "--gpu", "4090"], "too much before the first batch"),
        (["nanovlm-460m", "--gpu", "4090", "--rows", 2], "without a single picture"),
    ],
)
def test_what_cannot_be_answered_is_an_error_in_one_line(vlmpack, arguments, words):
    result = vlmpack("estimate", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "flava"}, "model type 'flava' is unknown"),
        ({"model_type": "llama"}, "no vision part"),
        ({**NANO_CONFIG, "lm_hidden_dim": -1}, "positive"),
    ],
)
def test_a_config_that_says_too_little_is_refused(vlmpack, tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = vlmpack("estimate", tmp_path, "--gpu", "H100")
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_language_model_alone_may_be_asked_for(vlmpack, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    figures = figures_of(vlmpack("estimate", tmp_path, "--text-only", "--gpu", "B200", "--json", "-"))
    assert figures["batch"]["tiles"] == 0
    assert vlmpack("estimate", tmp_path, "--text-only", "--images", 1).exit_code == 2


def test_a_shortage_is_told_with_the_breakdown_and_no_budget(vlmpack, tmp_path):
    file = tmp_path / "answer.json"
    result = vlmpack("estimate", "llava-1.5-7b", "--gpu", "4090", "--json", file)
    assert result.exit_code == 2
    figures = json.loads(file.read_text())
    assert (figures["limit"], figures["pack_budget"], figures["front"]) == (None, None, [])
    assert figures["verdict"]["short_bytes"] > 80 * 2**30
    assert "What helps, each alone:" in result.stdout


def test_an_answer_needs_neither_torch_nor_numba():
    code = (
        "import sys\n"
        "sys.argv = ['vlmpack', 'estimate', 'nanovlm-460m', '--gpu', 'H100', '--rows', '4', '--json', '-']\n"
        "from vlmpack.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    sys.stderr.write(repr(sorted({'torch', 'numba', 'transformers', 'matplotlib', 'PIL'}"
        " & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("[]")
    assert json.loads(done.stdout)["batch"]["tiles"] == 252
