"""Real steps of models built from a config alone, beside their estimates."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.unit.memory import oracle  # noqa: E402
from vlmpack.errors import ConfigError  # noqa: E402
from vlmpack.memory import ModelShape, TrainingRegime  # noqa: E402
from vlmpack.memory.real_step import measure_config  # noqa: E402

ON_THE_CPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="compares bytes that the CPU's kernels keep"
)
LOAD = {"rows": 2, "tokens_per_row": 96, "tiles": 2}


@pytest.fixture
def folder(tmp_path):
    """A folder with a model's config, as users have it."""

    def save(family: str = "idefics3"):
        tiny = oracle.FAMILIES[family]("sdpa")
        tiny.model.config.save_pretrained(tmp_path)
        return tmp_path, ModelShape.from_config(tmp_path, tile_size=tiny.tile_size)

    return save


@ON_THE_CPU
@pytest.mark.parametrize("family", ["smolvlm", "llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("mask", ["none", "packed"])
def test_the_bytes_kept_are_those_of_the_estimate(folder, family, mask):
    path, shape = folder(family)
    found = measure_config(path, shape, TrainingRegime(mask=mask), **LOAD)
    assert found.measured_bytes > 2**20
    assert abs(found.error) < 0.001


@ON_THE_CPU
@pytest.mark.parametrize(
    "settings",
    [
        {"autocast": None},
        {"autocast": None, "weights": "bf16"},
        {"attention": "eager"},
        {"frozen": ("vision", "connector")},
        {"frozen": ("language",)},
    ],
)
def test_settings_are_followed(folder, settings):
    path, shape = folder()
    plain = measure_config(path, shape, TrainingRegime(), **LOAD)
    found = measure_config(path, shape, TrainingRegime(**settings), **LOAD)
    assert found.measured_bytes != plain.measured_bytes
    assert abs(found.error) < 0.02


@ON_THE_CPU
def test_recomputed_blocks_keep_their_inputs(folder):
    path, shape = folder()
    regime = TrainingRegime(autocast=None, checkpoint_vision=True, checkpoint_language=True)
    found = measure_config(path, shape, regime, **LOAD)
    # the cosine and sine tables are held by a closure that the hooks do not see, see test_oracle
    assert found.estimated_bytes - found.measured_bytes == pytest.approx(2 * 96 * 16 * 4, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_rank": 8}, "lora_rank"),
        ({"checkpoint_vision": True}, "checkpoint_vision without checkpoint_language"),
        ({"attention": "flash"}, "attention=flash"),
        ({"mask": "padding"}, "mask=padding"),
        ({"optimizer": "sgd"}, "optimizer=sgd"),
        ({"vision_sub_batch": 4, "cross_entropy": "fused"}, "vision_sub_batch, cross_entropy"),
    ],
)
def test_settings_that_no_step_here_follows_are_refused(folder, settings, words):
    path, shape = folder()
    with pytest.raises(ConfigError, match=f"cannot follow {words}"):
        measure_config(path, shape, TrainingRegime(**settings), **LOAD)


def test_a_step_that_the_machine_cannot_hold_is_refused_before_it_is_built(folder, monkeypatch):
    path, shape = folder()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("vlmpack.memory.real_step._free_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"has 0\.0 GiB free"):
        measure_config(path, shape, TrainingRegime(), **LOAD)


def test_more_tiles_than_the_rows_hold_are_refused(folder):
    path, shape = folder()
    # a tile is 16 tokens
    with pytest.raises(ConfigError, match="13 tiles take 208 tokens, but the rows hold 192"):
        measure_config(path, shape, TrainingRegime(), rows=2, tokens_per_row=96, tiles=13)


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path, folder):
    _, shape = folder()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(ConfigError, match="transformers cannot build"):
        measure_config(tmp_path, shape, TrainingRegime(), **LOAD)
