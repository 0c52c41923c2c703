"""Read the parts of a transformers config: the sizes of a language model and of a vision encoder.

A `config.json` on disk holds only what differs from the class's defaults, so the defaults that matter are
repeated here; a test compares them with the installed transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from vlmpack.errors import ConfigError
from vlmpack.memory.model_shape import LanguageShape, VisionShape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmpack.memory.ops import Activation

Section: TypeAlias = "Mapping[str, object]"

_LLAMA: Final = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
}
_QWEN2: Final = {**_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
_QWEN2_VL: Final = {
    **_QWEN2,
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_GEMMA3: Final = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
}
_GEMMA: Final = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
}
TEXT_DEFAULTS: Final[dict[str, dict[str, object]]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": _QWEN2,
    "qwen3": {**_QWEN2, "head_dim": 128},
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "gemma": _GEMMA,
    "gemma3_text": _GEMMA3,
}
"""Language models that can be read, with the defaults of their config classes."""

_SIGLIP: Final = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
}
_IDEFICS: Final = {**_SIGLIP, "hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
_QWEN_VISION: Final = {
    "depth": 32,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
VISION_DEFAULTS: Final[dict[str, dict[str, object]]] = {
    "siglip_vision_model": {**_SIGLIP, "vision_use_head": True},
    "idefics3_vision": _IDEFICS,
    "smolvlm_vision": _IDEFICS,
    "clip_vision_model": {**_SIGLIP, "patch_size": 32, "hidden_act": "quick_gelu"},
    "qwen2_vl_vision": {**_QWEN_VISION, "embed_dim": 1280, "mlp_ratio": 4, "hidden_act": "quick_gelu"},
    "qwen2_5_vl_vision": {
        **_QWEN_VISION,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
        "hidden_act": "silu",
    },
}
"""Vision encoders that can be read, with the defaults of their config classes."""

_ACTIVATIONS: Final[dict[str, Activation]] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_new",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


# ---- single values -----------------------------------------------------------------------------
def text_of(section: Section, key: str, where: str) -> str:
    """Return a string of a config.

    Raises:
        ConfigError: If it is missing.
    """
    value = section.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"{where} has no {key}, so its sizes cannot be told")
    return value


def int_of(section: Section, key: str, where: str) -> int:
    """Return a positive integer of a config; a list of equal ones counts as one.

    Raises:
        ConfigError: If it is missing or something else.
    """
    value = section.get(key)
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: {key} must be an integer, got {value!r}")
    if value < 1:
        raise ConfigError(f"{where}: {key} must be positive, got {value}")
    return value


def activation_of(section: Section, where: str, key: str = "hidden_act") -> Activation:
    """Return an activation by transformers' name.

    Raises:
        ConfigError: If the name is unknown.
    """
    name = str(section.get(key))
    if name not in _ACTIVATIONS:
        raise ConfigError(f"{where}: activation {name!r} is unknown. Known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def merged(section: object, defaults: Mapping[str, object]) -> dict[str, object]:
    """Return a part of a config over its class's defaults."""
    given = section if isinstance(section, dict) else {}
    return {**defaults, **{key: value for key, value in given.items() if value is not None}}


def part(section: Section, key: str, default: str, known: Mapping[str, object]) -> tuple[Section, str]:
    """Return a config's part and its model type.

    Raises:
        ConfigError: If the part is missing, no dictionary, or of an unknown type.
    """
    part = section.get(key)
    if part is None:
        raise ConfigError(f"model type {section.get('model_type')!r}: {key} is missing")
    if not isinstance(part, dict):
        raise ConfigError(f"{key} must be a dictionary, got {type(part).__name__}")
    kind = str(part.get("model_type") or default)
    if kind not in known:
        raise ConfigError(f"{key}: model type {kind!r} is unknown. Known: {', '.join(known)}")
    return part, kind


# ---- parts -------------------------------------------------------------------------------------
def read_language(section: Section, kind: str, *, tied: bool | None) -> LanguageShape:
    """Return a language model's sizes.

    Args:
        section: The text part of a config.
        kind: Its model type.
        tied: Whether the output layer is the embedding, where the whole model's config says so.
    """
    values = merged(section, TEXT_DEFAULTS[kind])
    heads = int_of(values, "num_attention_heads", kind)
    hidden = int_of(values, "hidden_size", kind)
    values.setdefault("num_key_value_heads", heads)
    head_dim = int_of(values, "head_dim", kind) if values.get("head_dim") else 0
    gemma = kind.startswith("gemma")
    own_tie = bool(values.get("tie_word_embeddings", gemma))
    bias = kind.startswith("qwen2") or bool(values.get("attention_bias", False))
    return LanguageShape(
        layers=int_of(values, "num_hidden_layers", kind),
        hidden=hidden,
        intermediate=int_of(values, "intermediate_size", kind),
        heads=heads,
        kv_heads=int_of(values, "num_key_value_heads", kind),
        vocab=int_of(values, "vocab_size", kind),
        head_dim=0 if head_dim * heads == hidden else head_dim,
        tied=own_tie if tied is None else tied,
        norm="rms_gemma" if gemma else "rms",
        activation=activation_of(
            values, kind, "hidden_activation" if kind == "gemma3_text" else "hidden_act"
        ),
        attention_bias=bias,
        output_bias=bool(values.get("attention_bias", False)) and kind == "llama",
        mlp_bias=bool(values.get("mlp_bias", False)),
        qk_norm=kind in {"qwen3", "gemma3_text"},
        sandwich_norm=kind == "gemma3_text",
        dense_mask=gemma,
        own_positions=kind in {"qwen2_vl_text", "qwen2_5_vl_text"},
    )


def read_vision(section: Section, kind: str, tile_size: int | None) -> VisionShape:
    """Return a vision encoder's sizes; models of any resolution take tiles of 448 pixels unless told."""
    values = merged(section, VISION_DEFAULTS[kind])
    patch = int_of(values, "patch_size", kind)
    if kind.startswith("qwen"):
        return _read_qwen_vision(values, kind, patch, tile_size or 32 * patch)
    hidden = int_of(values, "hidden_size", kind)
    intermediate = int_of(values, "intermediate_size", kind)
    clip = kind == "clip_vision_model"
    idle = 0
    if kind == "siglip_vision_model" and values["vision_use_head"]:
        # the pooling head is there but takes no part: probe, attention, norm, MLP
        idle = (
            4 * hidden * hidden + 4 * hidden + 3 * hidden + 2 * hidden * intermediate + intermediate + hidden
        )
    return VisionShape(
        layers=int_of(values, "num_hidden_layers", kind),
        hidden=hidden,
        intermediate=intermediate,
        heads=int_of(values, "num_attention_heads", kind),
        patch_size=patch,
        tile_size=tile_size or int_of(values, "image_size", kind),
        activation=activation_of(values, kind),
        class_token=clip,
        pre_norm=clip,
        patch_bias=not clip,
        copies_pixels=kind in {"idefics3_vision", "smolvlm_vision"},
        idle_parameters=2 * hidden if clip else idle,
    )


def _read_qwen_vision(values: Section, kind: str, patch: int, tile: int) -> VisionShape:
    newer = kind == "qwen2_5_vl_vision"
    hidden = int_of(values, "hidden_size" if newer else "embed_dim", kind)
    inner = int_of(values, "intermediate_size", kind) if newer else hidden * int_of(values, "mlp_ratio", kind)
    window = int_of(values, "window_size", kind) // patch if newer else 0
    full = values.get("fullatt_block_indexes", ())
    return VisionShape(
        layers=int_of(values, "depth", kind),
        hidden=hidden,
        intermediate=inner,
        heads=int_of(values, "num_heads", kind),
        patch_size=patch,
        tile_size=tile,
        fused_qkv=True,
        norm="rms" if newer else "layer",
        activation=activation_of(values, kind),
        gated=newer,
        rotary=True,
        position_embedding=False,
        patch_bias=False,
        frames=int_of(values, "temporal_patch_size", kind),
        window_patches=window * window,
        full_layers=len(full) if isinstance(full, (list, tuple)) else 0,
        final_norm=False,
    )
