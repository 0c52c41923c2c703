"""Sizes of models by name, as their published configs give them, so that no file is needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from vlmpack.memory.model_shape import ConnectorShape, LanguageShape, ModelShape, VisionShape

# ---- vision encoders ---------------------------------------------------------------------------
SIGLIP_B16_224: Final = VisionShape(
    layers=12, hidden=768, intermediate=3072, heads=12, patch_size=16, tile_size=224
)
SIGLIP_B16_512: Final = replace(SIGLIP_B16_224, tile_size=512)
SIGLIP_SO400M_384: Final = VisionShape(
    layers=27, hidden=1152, intermediate=4304, heads=16, patch_size=14, tile_size=384
)
CLIP_L14_336: Final = VisionShape(
    layers=24,
    hidden=1024,
    intermediate=4096,
    heads=16,
    patch_size=14,
    tile_size=336,
    class_token=True,
    activation="quick_gelu",
    patch_bias=False,
    pre_norm=True,
    final_norm=False,
    unused_layers=1,
    idle_parameters=2 * 1024,
)
QWEN2_EYES: Final = VisionShape(
    layers=32,
    hidden=1280,
    intermediate=5120,
    heads=16,
    patch_size=14,
    tile_size=448,
    fused_qkv=True,
    activation="quick_gelu",
    rotary=True,
    position_embedding=False,
    patch_bias=False,
    frames=2,
    final_norm=False,
)
QWEN2_5_EYES: Final = replace(
    QWEN2_EYES,
    intermediate=3420,
    activation="silu",
    norm="rms",
    gated=True,
    window_patches=64,
    full_layers=4,
)

# ---- language models ---------------------------------------------------------------------------
SMOLLM2_135M: Final = LanguageShape(
    layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocab=49152
)
SMOLLM2_360M: Final = LanguageShape(
    layers=32, hidden=960, intermediate=2560, heads=15, kv_heads=5, vocab=49152
)
SMOLLM2_1_7B: Final = LanguageShape(
    layers=24, hidden=2048, intermediate=8192, heads=32, kv_heads=32, vocab=49152
)
LLAMA_3_1_8B: Final = LanguageShape(
    layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=128256, tied=False
)
VICUNA_7B: Final = LanguageShape(
    layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, vocab=32064, tied=False
)
QWEN2_0_5B: Final = LanguageShape(
    layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2, vocab=151936, attention_bias=True
)
QWEN2_1_5B: Final = replace(QWEN2_0_5B, layers=28, hidden=1536, intermediate=8960, heads=12)
QWEN2_7B: Final = replace(
    QWEN2_1_5B, hidden=3584, intermediate=18944, heads=28, kv_heads=4, vocab=152064, tied=False
)
QWEN2_5_3B: Final = replace(QWEN2_1_5B, layers=36, hidden=2048, intermediate=11008, heads=16)
GEMMA_3_4B: Final = LanguageShape(
    layers=34,
    hidden=2560,
    intermediate=10240,
    heads=8,
    kv_heads=4,
    vocab=262208,
    head_dim=256,
    norm="rms_gemma",
    activation="gelu_tanh",
    qk_norm=True,
    sandwich_norm=True,
    dense_mask=True,
)
GEMMA_2B: Final = LanguageShape(
    layers=18,
    hidden=2048,
    intermediate=16384,
    heads=8,
    kv_heads=1,
    vocab=257216,
    norm="rms_gemma",
    activation="gelu_tanh",
    dense_mask=True,
)


def _reference(name: str, vision: VisionShape, language: LanguageShape, factor: int) -> ModelShape:
    """A model of the reference pipeline: fused projections, loss on raw logits, keys always repeated."""
    return ModelShape(
        name=name,
        vision=replace(vision, fused_qkv=True),
        connector=ConnectorShape(factor=factor),
        language=replace(language, always_repeats_keys=True, float_logits=False, plain_eager=True),
        merge="index",
        buffer_bytes=2 * language.head_width,
    )


def _model(name: str, vision: VisionShape, connector: ConnectorShape, language: LanguageShape) -> ModelShape:
    return ModelShape(
        name=name,
        vision=vision,
        connector=connector,
        language=language,
        buffer_bytes=4 * language.head_width,
    )


def _smolvlm(
    name: str, vision: VisionShape, language: LanguageShape, *, factor: int, vocab: int
) -> ModelShape:
    untied = replace(language, vocab=vocab, tied=False)
    return _model(name, replace(vision, copies_pixels=True), ConnectorShape(factor=factor), untied)


def _qwen(name: str, vision: VisionShape, language: LanguageShape) -> ModelShape:
    merger = ConnectorShape(kind="merger", factor=2, bias=True, norm=vision.norm)
    return _model(name, vision, merger, replace(language, own_positions=True))


_MLP: Final = ConnectorShape(kind="mlp", bias=True)

_MODELS: Final = (
    _reference("nanovlm-222m", SIGLIP_B16_224, SMOLLM2_135M, 2),
    # 66 tokens are added for images and tile positions
    _reference("nanovlm-460m", SIGLIP_B16_512, replace(SMOLLM2_360M, vocab=49218), 4),
    _smolvlm("smolvlm-256m", SIGLIP_B16_512, SMOLLM2_135M, factor=4, vocab=49280),
    _smolvlm("smolvlm-500m", SIGLIP_B16_512, SMOLLM2_360M, factor=4, vocab=49280),
    _smolvlm("smolvlm2-2.2b", SIGLIP_SO400M_384, SMOLLM2_1_7B, factor=3, vocab=49280),
    _smolvlm("idefics3-8b", replace(SIGLIP_SO400M_384, tile_size=364), LLAMA_3_1_8B, factor=2, vocab=128259),
    _model("llava-1.5-7b", CLIP_L14_336, _MLP, VICUNA_7B),
    _model(
        "llava-onevision-0.5b",
        replace(SIGLIP_SO400M_384, layers=26, final_norm=False, idle_parameters=2 * 1152),
        _MLP,
        replace(QWEN2_0_5B, vocab=152000),
    ),
    _model(
        "llava-onevision-7b",
        replace(SIGLIP_SO400M_384, layers=26, final_norm=False, idle_parameters=2 * 1152),
        _MLP,
        QWEN2_7B,
    ),
    _qwen("qwen2-vl-2b", QWEN2_EYES, QWEN2_1_5B),
    _qwen("qwen2-vl-7b", QWEN2_EYES, QWEN2_7B),
    _qwen("qwen2.5-vl-3b", QWEN2_5_EYES, QWEN2_5_3B),
    _qwen("qwen2.5-vl-7b", QWEN2_5_EYES, QWEN2_7B),
    _model(
        "gemma-3-4b",
        replace(SIGLIP_SO400M_384, tile_size=896),
        ConnectorShape(kind="pool", factor=4),
        GEMMA_3_4B,
    ),
    _model(
        "paligemma-3b",
        replace(SIGLIP_SO400M_384, tile_size=224),
        ConnectorShape(kind="linear", bias=True),
        GEMMA_2B,
    ),
)

PRESETS: Final[dict[str, ModelShape]] = {model.name: model for model in _MODELS}
"""The models that are known by name."""
