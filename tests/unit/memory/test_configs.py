"""Reading sizes from configs: transformers' objects, dictionaries, files, presets; and what is refused."""

from __future__ import annotations

import json

import pytest

from vlmpack.errors import ConfigError
from vlmpack.memory import (
    PRESETS,
    ConnectorShape,
    LanguageShape,
    ModelShape,
    VisionShape,
)
from vlmpack.memory.sections import TEXT_DEFAULTS, VISION_DEFAULTS

NANO_CONFIG = {
    "vit_hidden_dim": 768,
    "vit_inter_dim": 3072,
    "vit_patch_size": 16,
    "vit_img_size": 512,
    "vit_n_heads": 12,
    "vit_n_blocks": 12,
    "vit_cls_flag": False,
    "lm_hidden_dim": 960,
    "lm_inter_dim": 2560,
    "lm_n_heads": 15,
    "lm_n_kv_heads": 5,
    "lm_n_blocks": 32,
    "lm_vocab_size": 49218,
    "lm_tie_weights": True,
    "mp_pixel_shuffle_factor": 4,
}

# Parameters as the models' cards and checkpoints have them
KNOWN = {
    "nanovlm-222m": 222_081_600,
    "nanovlm-460m": 460_113_984,
    "smolvlm-256m": 256_484_928,
    "smolvlm-500m": 507_482_304,
    "smolvlm2-2.2b": 2_246_784_880,
    "idefics3-8b": 8_462_086_384,
    "llava-1.5-7b": 7_063_427_072,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "gemma-3-4b": 4_300_079_472,
    "paligemma-3b": 2_923_466_480,
}


@pytest.mark.parametrize(("name", "parameters"), KNOWN.items())
def test_presets_have_the_known_number_of_parameters(name, parameters):
    assert PRESETS[name].num_parameters == parameters


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("nanovlm-460m", 64),
        ("smolvlm2-2.2b", 81),
        ("idefics3-8b", 169),
        ("llava-1.5-7b", 576),
        ("gemma-3-4b", 256),
    ],
)
def test_presets_have_the_known_number_of_tokens_a_tile(name, tokens):
    assert PRESETS[name].tokens_per_tile == tokens


# ---- forms -------------------------------------------------------------------------------------
def test_a_preset_a_dictionary_a_file_and_a_folder_give_the_same_sizes(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(NANO_CONFIG), encoding="utf-8")
    from_dictionary = ModelShape.from_config(NANO_CONFIG)
    assert ModelShape.load(path) == from_dictionary
    assert ModelShape.from_config(str(tmp_path)) == from_dictionary
    preset = ModelShape.from_config("nanovlm-460m")
    assert (preset.vision, preset.language) == (from_dictionary.vision, from_dictionary.language)


def test_a_transformers_object_gives_the_sizes_that_it_has():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2_5_VLConfig(
        vision_config={"hidden_size": 1280, "out_hidden_size": 2048},
        text_config={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        tie_word_embeddings=True,
    )
    shape = ModelShape.from_config(config, tile_size=448)
    assert shape.num_parameters == KNOWN["qwen2.5-vl-3b"]
    assert shape.vision == PRESETS["qwen2.5-vl-3b"].vision


def test_an_old_qwen_config_has_the_text_sizes_on_top():
    text = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    }
    flat = {
        "model_type": "qwen2_vl",
        "vision_config": {"embed_dim": 1280},
        "tie_word_embeddings": True,
        **text,
    }
    assert ModelShape.from_config(flat).num_parameters == KNOWN["qwen2-vl-2b"]


@pytest.mark.parametrize("kind", sorted(TEXT_DEFAULTS))
def test_our_defaults_of_language_models_are_transformers(kind):
    transformers = pytest.importorskip("transformers")
    config = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma": transformers.GemmaConfig,
        "gemma3_text": transformers.Gemma3TextConfig,
        "qwen2_vl_text": transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLTextConfig,
        "qwen2_5_vl_text": transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig,
    }[kind]()
    ours = ModelShape.from_config({"model_type": kind}, text_only=True).language
    theirs = ModelShape.from_config(config.to_dict(), text_only=True).language
    assert ours == theirs


@pytest.mark.parametrize("kind", sorted(VISION_DEFAULTS))
def test_our_defaults_of_vision_encoders_are_transformers(kind):
    transformers = pytest.importorskip("transformers")
    models = transformers.models
    config = {
        "siglip_vision_model": transformers.SiglipVisionConfig,
        "clip_vision_model": transformers.CLIPVisionConfig,
        "idefics3_vision": models.idefics3.configuration_idefics3.Idefics3VisionConfig,
        "smolvlm_vision": models.smolvlm.configuration_smolvlm.SmolVLMVisionConfig,
        "qwen2_vl_vision": models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig,
        "qwen2_5_vl_vision": models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig,
    }[kind]()
    theirs = config.to_dict()
    for name, value in VISION_DEFAULTS[kind].items():
        found = theirs[name]
        assert (list(value) if isinstance(value, tuple) else value) == (
            list(found) if isinstance(found, (list, tuple)) else found
        ), name


# ---- refused -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "flava"}, "unknown"),
        ({"model_type": "llama"}, "no vision part"),
        ({}, "no model_type"),
        ({"model_type": "smolvlm"}, "text_config is missing"),
        ({"model_type": "smolvlm", "text_config": {"model_type": "llama"}}, "vision_config is missing"),
        ({"model_type": "llava", "text_config": {"model_type": "t5"}, "vision_config": {}}, "unknown"),
        ({"model_type": "llava", "text_config": [], "vision_config": {}}, "dictionary"),
        ({**NANO_CONFIG, "lm_hidden_dim": -960}, "positive"),
        ({**NANO_CONFIG, "vit_n_blocks": 0}, "positive"),
        ({**NANO_CONFIG, "lm_n_heads": 7}, "do not divide"),
        ({**NANO_CONFIG, "vit_n_heads": "12"}, "integer"),
        ({**NANO_CONFIG, "mp_pixel_shuffle_factor": 5}, "does not divide"),
        ({key: value for key, value in NANO_CONFIG.items() if key != "lm_vocab_size"}, "lm_vocab_size"),
        (42, "config object"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        ModelShape.from_config(config)


def test_a_missing_file_and_a_broken_one_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a preset nor a local config"):
        ModelShape.from_config("no-such-model")
    path = tmp_path / "config.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not JSON"):
        ModelShape.load(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a list"):
        ModelShape.load(path)


def test_a_language_model_alone_may_be_asked_for():
    shape = ModelShape.from_config({"model_type": "llama"}, text_only=True)
    assert shape.vision is None
    assert shape.tokens_per_tile == shape.patches_per_tile == 0


EYES = {"layers": 1, "hidden": 8, "intermediate": 8, "heads": 2, "patch_size": 4, "tile_size": 16}
TEXT = {"layers": 1, "hidden": 8, "intermediate": 8, "heads": 2, "kv_heads": 1, "vocab": 8}


@pytest.mark.parametrize(
    ("cls", "sizes"),
    [
        (VisionShape, {**EYES, "hidden": 0}),
        (VisionShape, {**EYES, "heads": 3}),
        (VisionShape, {**EYES, "tile_size": 2}),
        (VisionShape, {**EYES, "activation": "swiglu"}),
        (LanguageShape, {**TEXT, "layers": -1}),
        (LanguageShape, {**TEXT, "kv_heads": 3}),
        (LanguageShape, {**TEXT, "heads": 3, "kv_heads": 1}),
        (LanguageShape, {**TEXT, "norm": "batch"}),
        (ConnectorShape, {"kind": "resampler"}),
        (ConnectorShape, {"factor": 0}),
    ],
)
def test_impossible_sizes_are_refused(cls, sizes):
    with pytest.raises(ConfigError):
        cls(**sizes)


def test_an_encoder_needs_a_connector():
    with pytest.raises(ConfigError, match="together"):
        ModelShape(name="half", language=LanguageShape(**TEXT), vision=VisionShape(**EYES))
