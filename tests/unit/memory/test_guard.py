"""Refusing a batch that does not fit, and drawing where the limit lies."""

from __future__ import annotations

import struct

import pytest

from vlmpack.budget import SampleCost
from vlmpack.errors import BudgetError, ConfigError
from vlmpack.memory import PRESETS, BatchGuard, LanguageShape, ModelShape, TrainingRegime, max_tiles
from vlmpack.memory.plot import draw_tiles

NANO = PRESETS["nanovlm-460m"]
REGIME = TrainingRegime(mask="padding", holds_logits=True)
PATCHES = 1024


@pytest.fixture
def guard():
    return BatchGuard(NANO, REGIME, "4090")


def test_the_guard_lets_pass_what_the_limit_allows(guard):
    limit = max_tiles(NANO, REGIME, "4090", rows=1, tokens_per_row=4096).tiles
    guard.admit(rows=1, tokens_per_row=4096, patches=limit * PATCHES)
    assert guard.verdict(rows=1, tokens_per_row=4096, patches=limit * PATCHES).fits
    assert not guard.verdict(rows=1, tokens_per_row=4096, patches=(limit + 1) * PATCHES).fits


def test_a_refusal_names_bytes_samples_and_what_helps(guard):
    samples = {
        "cheap": SampleCost(num_tokens=100, num_images=0, num_patches=0),
        "dear": SampleCost(num_tokens=1105, num_images=1, num_patches=17 * PATCHES),
        "middle": SampleCost(num_tokens=400, num_images=1, num_patches=5 * PATCHES),
    }
    with pytest.raises(BudgetError) as refusal:
        guard.admit(rows=1, tokens_per_row=4096, patches=40 * PATCHES, samples=samples)
    text = str(refusal.value)
    assert "40,960 patches" in text
    assert "but 4090 has 23.65 GiB" in text
    assert "vision 13." in text
    assert text.index("dear (17,408 patches") < text.index("middle (5,120 patches")
    assert "and fits" in text


def test_shorter_rows_are_judged_by_their_own_length(guard):
    patches = 40 * PATCHES
    assert not guard.verdict(rows=1, tokens_per_row=4096, patches=patches).fits
    assert guard.verdict(rows=1, tokens_per_row=1024, patches=patches).fits


def test_tokens_bound_no_tiles_where_a_family_joins_tokens():
    guard = BatchGuard("qwen2.5-vl-3b", TrainingRegime(weights="bf16", autocast=None), "H200")
    # 448 pixels are 32 x 32 patches and 16 x 16 tokens: 1,024 tokens hold four of them, and memory many more
    load = {"rows": 1, "tokens_per_row": 1024}
    assert guard.pack_budget(**load).max_patches == 4 * 32**2
    free = guard.pack_budget(**load, bounded=False).max_patches
    assert free > 8 * 32**2
    assert guard.verdict(**load, patches=free).fits
    assert not guard.verdict(**load, patches=free + 32**2).fits


def test_patches_need_not_fill_a_tile(guard):
    sizes = [guard.verdict(rows=1, tokens_per_row=64, patches=p).required_bytes for p in (1024, 1536, 2048)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_gpu_is_known_with_its_workspaces(guard):
    assert guard.gpu.name == "4090"
    assert guard.regime.workspace_bytes == guard.gpu.workspace_bytes < REGIME.workspace_bytes


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "memory.png"
    draw_tiles(path, NANO, REGIME, "A100-40", rows=2, tokens_per_row=4096, points=4)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1050, 600)


def test_a_model_without_an_encoder_has_nothing_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    text = ModelShape(
        name="text",
        language=LanguageShape(layers=1, hidden=8, intermediate=8, heads=1, kv_heads=1, vocab=8),
    )
    with pytest.raises(ConfigError, match="no vision encoder"):
        draw_tiles(tmp_path / "x.png", text, REGIME, "H100", rows=1, tokens_per_row=8)
