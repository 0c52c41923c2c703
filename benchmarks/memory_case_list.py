"""The steps and limits that `trace_memory` traces: what the development set does not have."""

from __future__ import annotations

from typing import Any

Case = dict[str, Any]

EYES: dict[str, tuple[Case, int]] = {
    "b16-512": (
        {"hidden": 768, "inter": 3072, "layers": 12, "heads": 12, "patch": 16, "image": 512},
        4,
    ),
    "b16-256": (
        {"hidden": 768, "inter": 3072, "layers": 12, "heads": 12, "patch": 16, "image": 256},
        2,
    ),
    "so400m": (
        {"hidden": 1152, "inter": 4304, "layers": 27, "heads": 16, "patch": 14, "image": 378},
        3,
    ),
}
TEXT: dict[str, Case] = {
    "135m": {"hidden": 576, "inter": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "vocab": 49152},
    "360m": {"hidden": 960, "inter": 2560, "layers": 32, "heads": 15, "kv_heads": 5, "vocab": 49218},
    "q0.5b": {"hidden": 896, "inter": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "vocab": 151936},
    "q1.5b": {"hidden": 1536, "inter": 8960, "layers": 28, "heads": 12, "kv_heads": 2, "vocab": 151936},
    "l1b": {"hidden": 2048, "inter": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "s1.7b": {"hidden": 2048, "inter": 8192, "layers": 24, "heads": 32, "kv_heads": 32, "vocab": 49152},
}
TEXT["q1.5b-untied"] = {**TEXT["q1.5b"], "tied": False}


def case(
    stack: str, eyes: str, text: str, dtype: str, tiles: int, batch: int, seq: int, **options: Any
) -> Case:
    """Return a case's dictionary."""
    vision, shuffle = EYES[eyes]
    return {
        "stack": stack,
        "vit": vision,
        "lm": TEXT[text],
        "dtype": dtype,
        "attn": "sdpa",
        "tiles": tiles,
        "batch": batch,
        "seq": seq,
        "ckpt_vit": False,
        "ckpt_lm": False,
        "shuffle": shuffle,
        **options,
    }


BOTH = {"ckpt_vit": True, "ckpt_lm": True}
AMP, BF16, FP32 = "amp_bf16", "bf16", "fp32"
STEPS: dict[str, Case] = {
    "hf-q1.5b-bf16": case("hf", "b16-512", "q1.5b", BF16, 20, 2, 4096),
    "hf-q1.5b-bf16-ckpt": case("hf", "b16-512", "q1.5b", BF16, 40, 4, 4096, **BOTH),
    "hf-q1.5b-untied-amp": case("hf", "b16-512", "q1.5b-untied", AMP, 8, 1, 2048),
    "hf-l1b-amp-ckptlm": case("hf", "so400m", "l1b", AMP, 10, 2, 2048, ckpt_lm=True),
    "hf-so400m-s1.7b-bf16": case("hf", "so400m", "s1.7b", BF16, 12, 1, 2048),
    "hf-so400m-s1.7b-amp-ckptvit": case("hf", "so400m", "s1.7b", AMP, 12, 1, 2048, ckpt_vit=True),
    "hf-360m-fp32": case("hf", "b16-512", "360m", FP32, 8, 1, 1024),
    "hf-360m-fp32-eager": case("hf", "b16-512", "360m", FP32, 4, 1, 512, attn="eager"),
    "hf-360m-bf16-eager": case("hf", "b16-512", "360m", BF16, 8, 1, 1024, attn="eager"),
    "hf-360m-freezelm": case("hf", "b16-512", "360m", AMP, 16, 1, 2048, freeze=["lm"]),
    "hf-360m-bf16-freezeboth": case("hf", "b16-512", "360m", BF16, 16, 1, 2048, freeze=["lm", "vit"]),
    "hf-360m-bf16-freezevit": case("hf", "b16-512", "360m", BF16, 32, 2, 2048, freeze=["vit"]),
    "hf-360m-packed-bf16": case("hf", "b16-512", "360m", BF16, 30, 2, 4096, packed_mask=True),
    "hf-360m-amp-ckpt-manytiles": case("hf", "b16-512", "360m", AMP, 200, 1, 1024, **BOTH),
    "hf-135m-manyrows": case("hf", "b16-256", "135m", AMP, 64, 32, 256),
    "hf-q1.5b-bf16-accum": case("hf", "b16-512", "q1.5b", BF16, 10, 1, 2048, accum=4),
    "hf-q1.5b-bf16-accum-ckpt": case("hf", "b16-512", "q1.5b", BF16, 10, 1, 2048, accum=4, **BOTH),
    "hf-q1.5b-lora": case(
        "hf", "b16-512", "q1.5b", BF16, 16, 1, 2048, lora=16, lora_targets="attention", freeze=["vit"]
    ),
    "hf-q1.5b-lora-qv": case(
        "hf", "b16-512", "q1.5b", BF16, 16, 1, 2048, lora=8, lora_targets="qv", freeze=["vit", "mp"]
    ),
    "hf-360m-lora-all-amp": case(
        "hf", "b16-512", "360m", AMP, 16, 1, 2048, lora=8, lora_targets="all", freeze=["vit"]
    ),
    "hf-q1.5b-bf16-chunked": case("hf", "b16-512", "q1.5b", BF16, 8, 2, 2048, loss="chunked"),
    "hf-q0.5b-amp-chunked-ckpt": case("hf", "b16-512", "q0.5b", AMP, 8, 4, 4096, loss="chunked", **BOTH),
    "hf-q1.5b-bf16-fused": case("hf", "b16-512", "q1.5b", BF16, 8, 2, 2048, loss="fused"),
    "hf-q0.5b-amp-fused-ckpt": case("hf", "b16-512", "q0.5b", AMP, 8, 4, 4096, loss="fused", **BOTH),
    "hf-360m-amp-pieces": case("hf", "b16-512", "360m", AMP, 40, 1, 1024, sub_batch=8),
    "hf-360m-bf16-pieces-many": case("hf", "b16-512", "360m", BF16, 200, 1, 512, sub_batch=32),
    "nano135m-b1": case("nano", "b16-256", "135m", AMP, 1, 1, 128),
    "nano360m-short": case("nano", "b16-512", "360m", AMP, 1, 1, 256),
    "nano360m-freezelm": case("nano", "b16-512", "360m", AMP, 16, 1, 2048, freeze=["lm"]),
    "nano360m-ckpt-manytiles": case("nano", "b16-512", "360m", AMP, 300, 1, 512, **BOTH),
    "nano360m-fp32-ckpt": case("nano", "b16-512", "360m", FP32, 30, 1, 1024, **BOTH),
    "nano-q0.5b-ckptlm": case("nano", "b16-512", "q0.5b", AMP, 30, 1, 4096, ckpt_lm=True),
    "nano-q0.5b-ckpt": case("nano", "b16-512", "q0.5b", AMP, 60, 2, 4096, **BOTH),
    "nano-so400m-s1.7b": case("nano", "so400m", "s1.7b", AMP, 6, 1, 2048),
}

# a case, the allocator's MiB, and the tiles that the rows' tokens allow
LIMITS: dict[str, tuple[Case, int, int]] = {
    "nano460m-16GB-b1-2048": (case("nano", "b16-512", "360m", AMP, 0, 1, 2048), 15548, 32),
    "nano460m-48GB-b2": (case("nano", "b16-512", "360m", AMP, 0, 2, 4096), 44800, 128),
    "nano222m-24GB-b16-512": (case("nano", "b16-256", "135m", AMP, 0, 16, 512), 23668, 128),
    "hf-q1.5b-bf16-40GB-b1": (case("hf", "b16-512", "q1.5b", BF16, 0, 1, 4096), 39735, 64),
    "hf-q1.5b-bf16-80GB-b3": (case("hf", "b16-512", "q1.5b", BF16, 0, 3, 4096), 80479, 192),
    "hf-q0.5b-amp-40GB-b2": (case("hf", "b16-512", "q0.5b", AMP, 0, 2, 2048), 39735, 64),
    "hf-so400m-s1.7b-bf16-40GB-b2": (case("hf", "so400m", "s1.7b", BF16, 0, 2, 2048), 39735, 50),
    "hf-360m-ckptlm-24GB-b4": (case("hf", "b16-512", "360m", AMP, 0, 4, 2048, ckpt_lm=True), 23668, 128),
    # made after the replay of the allocator, which had not seen them
    "hf-q0.5b-bf16-24GB-b4-1024": (case("hf", "b16-512", "q0.5b", BF16, 0, 4, 1024), 23668, 64),
    "hf-135m-amp-24GB-b8-1024": (case("hf", "b16-256", "135m", AMP, 0, 8, 1024), 23668, 128),
    "nano-q0.5b-ckptvit-40GB-b2": (
        case("nano", "b16-512", "q0.5b", AMP, 0, 2, 2048, ckpt_vit=True),
        39735,
        64,
    ),
    "hf-l1b-bf16-48GB-b2-2048": (case("hf", "so400m", "l1b", BF16, 0, 2, 2048), 44800, 50),
    "hf-q1.5b-lora-24GB-b2-2048": (
        case("hf", "b16-512", "q1.5b", BF16, 0, 2, 2048, lora=16, lora_targets="attention", freeze=["vit"]),
        23668,
        64,
    ),
    "nano460m-fp32-40GB-b2-2048": (case("nano", "b16-512", "360m", FP32, 0, 2, 2048), 39735, 64),
}
