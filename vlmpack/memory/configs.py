"""Read a model's sizes from a transformers config: an object, its dictionary, or a local `config.json`."""

from __future__ import annotations

import json
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from vlmpack.errors import ConfigError
from vlmpack.memory.model_shape import ConnectorShape, LanguageShape, ModelShape, VisionShape
from vlmpack.memory.presets import PRESETS
from vlmpack.memory.sections import (
    TEXT_DEFAULTS,
    VISION_DEFAULTS,
    Section,
    activation_of,
    int_of,
    part,
    read_language,
    read_vision,
    text_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def read_config(config: object, *, tile_size: int | None = None, text_only: bool = False) -> ModelShape:
    """Return the sizes of the model that `config` describes.

    Args:
        config: A transformers config object, its dictionary, a path, or a preset's name.
        tile_size: Pixels along a tile's side where it is not the config's image size.
        text_only: Accept a model without a vision encoder.

    Raises:
        ConfigError: If it cannot be read, its model type is unknown, it has no vision part, or a size is
            missing or wrong.
    """
    if isinstance(config, str) and config in PRESETS:
        return PRESETS[config]
    section = _as_section(config)
    if "vit_hidden_dim" in section:
        return _nanovlm(section, tile_size)
    kind = text_of(section, "model_type", "the config")
    if kind in FAMILIES:
        return FAMILIES[kind](section, tile_size)
    if kind in TEXT_DEFAULTS:
        if not text_only:
            raise ConfigError(
                f"model type {kind!r} has no vision part; "
                "pass text_only=True to estimate the language model alone"
            )
        language = read_language(section, kind, tied=None)
        return ModelShape(name=kind, language=language, buffer_bytes=4 * language.head_width)
    raise ConfigError(
        f"model type {kind!r} is unknown. Known: nanovlm, {', '.join(FAMILIES)}. "
        "For others build a ModelShape from the sizes."
    )


def _as_section(config: object) -> Section:
    """Return a config as a dictionary, whatever it came as.

    Raises:
        ConfigError: If it is nothing of that kind, or the file cannot be read.
    """
    if isinstance(config, dict):
        return config
    to_dict = getattr(config, "to_dict", None)
    if callable(to_dict):
        return cast("Section", to_dict())
    if not isinstance(config, (str, PathLike)):
        raise ConfigError(
            f"a config object, a dictionary, a path or a preset's name is needed, got {config!r}"
        )
    path = Path(fspath(config))
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise ConfigError(f"{config!s} is neither a preset nor a local config. Presets: {', '.join(PRESETS)}")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, not a config's dictionary")
    return loaded


def _buffers(language: LanguageShape, vision: VisionShape, *, positions: bool) -> int:
    """Return the bytes of two rotary frequency tables and of the vision encoder's position ids."""
    return 4 * language.head_width + (8 * vision.tokens_per_tile if positions else 0)


def _tied(section: Section, *, default: bool) -> bool:
    value = section.get("tie_word_embeddings")
    return default if value is None else bool(value)


def _idefics3(section: Section, tile_size: int | None) -> ModelShape:
    name = str(section["model_type"])
    text, text_kind = part(section, "text_config", "llama", TEXT_DEFAULTS)
    eyes, eyes_kind = part(section, "vision_config", f"{name}_vision", VISION_DEFAULTS)
    language = read_language(text, text_kind, tied=_tied(section, default=False))
    vision = read_vision(eyes, eyes_kind, tile_size)
    factor = int_of({"scale_factor": 2, **section}, "scale_factor", name)
    return ModelShape(
        name=name,
        language=language,
        vision=vision,
        connector=ConnectorShape(kind="pixel_shuffle", factor=factor),
        buffer_bytes=_buffers(language, vision, positions=False),
    )


def _llava(section: Section, tile_size: int | None) -> ModelShape:
    name = str(section["model_type"])
    newer = name == "llava_onevision"
    text, text_kind = part(section, "text_config", "qwen2" if newer else "llama", TEXT_DEFAULTS)
    default = "siglip_vision_model" if newer else "clip_vision_model"
    eyes, eyes_kind = part(section, "vision_config", default, VISION_DEFAULTS)
    layer = section.get("vision_feature_layer", -1 if newer else -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ConfigError(f"{name}: vision_feature_layer must be one layer, got {layer!r}")
    vision = read_vision(eyes, eyes_kind, tile_size)
    unused = -layer - 1 if layer < 0 else vision.layers - layer
    language = read_language(text, text_kind, tied=_tied(section, default=False))
    bias = bool(section.get("multimodal_projector_bias", True))
    activation = activation_of({"projector_hidden_act": "gelu", **section}, name, "projector_hidden_act")
    return ModelShape(
        name=name,
        language=language,
        vision=_without_end(vision, unused),
        connector=ConnectorShape(kind="mlp", bias=bias, activation=activation),
        buffer_bytes=_buffers(language, vision, positions=True),
    )


def _without_end(vision: VisionShape, unused: int) -> VisionShape:
    """Return the encoder whose features come from before the last norm, `unused` layers from the end."""
    return replace(
        vision,
        unused_layers=unused,
        final_norm=False,
        idle_parameters=vision.idle_parameters + (0 if vision.class_token else 2 * vision.hidden),
    )


def _qwen_vl(section: Section, tile_size: int | None) -> ModelShape:
    name = str(section["model_type"])
    nested = section.get("text_config")
    # configs of before transformers 4.52 keep the text model's sizes beside the vision part
    text = nested if isinstance(nested, dict) else {k: v for k, v in section.items() if k != "vision_config"}
    eyes, _ = part(
        {**section, "vision_config": section.get("vision_config")}, "vision_config", name, _QWEN_NAMES
    )
    language = read_language(text, f"{name}_text", tied=_tied(section, default=False))
    vision = read_vision(eyes, f"{name}_vision", tile_size)
    factor = int_of({"spatial_merge_size": 2, **eyes}, "spatial_merge_size", name)
    norm = vision.norm
    return ModelShape(
        name=name,
        language=language,
        vision=vision,
        connector=ConnectorShape(kind="merger", factor=factor, bias=True, norm=norm),
        buffer_bytes=4 * language.head_width + 2 * vision.hidden // vision.heads,
    )


_QWEN_NAMES: Final = {"qwen2_vl": 1, "qwen2_5_vl": 1, "qwen2_vl_vision": 1, "qwen2_5_vl_vision": 1}


def _gemma3(section: Section, tile_size: int | None) -> ModelShape:
    text, text_kind = part(section, "text_config", "gemma3_text", TEXT_DEFAULTS)
    eyes, eyes_kind = part(section, "vision_config", "siglip_vision_model", VISION_DEFAULTS)
    language = read_language(text, text_kind, tied=_tied(section, default=True))
    vision = read_vision(eyes, eyes_kind, tile_size)
    tokens = int_of({"mm_tokens_per_image": 256, **section}, "mm_tokens_per_image", "gemma3")
    side = vision.tile_size // vision.patch_size
    return ModelShape(
        name="gemma3",
        language=language,
        vision=vision,
        connector=ConnectorShape(kind="pool", factor=side // round(tokens**0.5)),
        buffer_bytes=2 * _buffers(language, vision, positions=False) + 8 * vision.tokens_per_tile,
    )


def _paligemma(section: Section, tile_size: int | None) -> ModelShape:
    text, text_kind = part(section, "text_config", "gemma", TEXT_DEFAULTS)
    eyes, eyes_kind = part(section, "vision_config", "siglip_vision_model", VISION_DEFAULTS)
    language = read_language(text, text_kind, tied=_tied(section, default=True))
    vision = read_vision(eyes, eyes_kind, tile_size)
    return ModelShape(
        name="paligemma",
        language=language,
        vision=vision,
        connector=ConnectorShape(kind="linear", bias=True),
        buffer_bytes=_buffers(language, vision, positions=True),
    )


def _nanovlm(section: Section, tile_size: int | None) -> ModelShape:
    """The reference pipeline's own config."""
    where = "nanovlm"
    vision = VisionShape(
        layers=int_of(section, "vit_n_blocks", where),
        hidden=int_of(section, "vit_hidden_dim", where),
        intermediate=int_of(section, "vit_inter_dim", where),
        heads=int_of(section, "vit_n_heads", where),
        patch_size=int_of(section, "vit_patch_size", where),
        tile_size=tile_size or int_of(section, "vit_img_size", where),
        class_token=bool(section.get("vit_cls_flag", False)),
        fused_qkv=True,
    )
    language = LanguageShape(
        layers=int_of(section, "lm_n_blocks", where),
        hidden=int_of(section, "lm_hidden_dim", where),
        intermediate=int_of(section, "lm_inter_dim", where),
        heads=int_of(section, "lm_n_heads", where),
        kv_heads=int_of(section, "lm_n_kv_heads", where),
        vocab=int_of(section, "lm_vocab_size", where),
        tied=bool(section.get("lm_tie_weights", True)),
        always_repeats_keys=True,
        float_logits=False,
        plain_eager=True,
    )
    return ModelShape(
        name=where,
        language=language,
        vision=vision,
        connector=ConnectorShape(factor=int_of(section, "mp_pixel_shuffle_factor", where)),
        merge="index",
        buffer_bytes=2 * language.head_width,
    )


FAMILIES: Final[dict[str, Callable[[Section, int | None], ModelShape]]] = {
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "llava": _llava,
    "llava_next": _llava,
    "llava_onevision": _llava,
    "qwen2_vl": _qwen_vl,
    "qwen2_5_vl": _qwen_vl,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
}
"""How each model type's config is read."""
