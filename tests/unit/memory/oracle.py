"""Tiny models of transformers' classes with random weights, and the bytes that autograd keeps on them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers as tf
from torch import nn

from vlmpack.memory.probe import SavedBytes

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB = 211
EYES = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 3}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 8, "vision_use_head": False}


@dataclass
class Tiny:
    """A model, a batch for it, and the same load in the estimator's words."""

    model: nn.Module
    batch: dict[str, Any]
    load: dict[str, int]
    tile_size: int | None = None


def kept_bytes(model: nn.Module, run: Callable[[], torch.Tensor], *, autocast: bool, ignore: Any = ()) -> int:
    """Return the bytes that a forward pass leaves in the graph, parameters and buffers left out."""
    counter = SavedBytes(ignore=[*model.parameters(), *model.buffers(), *ignore])
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with counter.counting(), context:
        loss = run()
    total = counter.total
    assert loss.grad_fn is not None  # and so the graph is still alive where it was counted
    return total


def whole_model_bytes(tiny: Tiny, *, autocast: bool) -> int:
    """Return what a whole forward pass keeps, its batch left out."""
    tensors = [value for value in tiny.batch.values() if torch.is_tensor(value)]
    return kept_bytes(tiny.model, lambda: tiny.model(**tiny.batch).loss, autocast=autocast, ignore=tensors)


# ---- single towers -----------------------------------------------------------------------------
def vision_tower(kind: str, attention: str, *, layers: int, size: dict[str, int]) -> tuple[nn.Module, Any]:
    """Return a vision encoder and a function from a number of tiles to its input."""
    sizes = {**size, "num_hidden_layers": layers, "attn_implementation": attention}
    if kind == "siglip":
        model = tf.SiglipVisionModel(
            tf.SiglipVisionConfig(image_size=64, patch_size=16, vision_use_head=False, **sizes)
        )
    elif kind == "clip":
        model = tf.CLIPVisionModel(tf.CLIPVisionConfig(image_size=64, patch_size=16, **sizes))
    else:
        model = tf.Siglip2VisionModel(
            tf.Siglip2VisionConfig(patch_size=16, num_patches=16, vision_use_head=False, **sizes)
        )

    def inputs(tiles: int) -> dict[str, torch.Tensor]:
        if kind != "siglip2":
            return {"pixel_values": torch.randn(tiles, 3, 64, 64)}
        return {
            "pixel_values": torch.randn(tiles, 16, 3 * 16 * 16),
            "pixel_attention_mask": torch.ones(tiles, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * tiles),
        }

    return model.train(), inputs


def language_model(kind: str, attention: str, *, layers: int, size: dict[str, int]) -> nn.Module:
    """Return a language model of transformers."""
    config, cls = {
        "llama": (tf.LlamaConfig, tf.LlamaForCausalLM),
        "mistral": (tf.MistralConfig, tf.MistralForCausalLM),
        "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM),
        "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM),
        "gemma": (tf.GemmaConfig, tf.GemmaForCausalLM),
        "gemma3_text": (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM),
    }[kind]
    model = cls(config(**size, num_hidden_layers=layers, attn_implementation=attention))
    return model.train()


# ---- whole vision-language models --------------------------------------------------------------
def _ids(rows: int, tokens: int, image_tokens: int) -> torch.Tensor:
    ids = torch.randint(10, VOCAB - 10, (rows, tokens))
    ids[:, :image_tokens] = 5
    return ids


def _tiny(
    model: nn.Module, ids: torch.Tensor, tiles: int, tile_size: int | None = None, **batch: Any
) -> Tiny:
    return Tiny(
        model=model.train(),
        batch={"input_ids": ids, "labels": ids.clone(), "use_cache": False, **batch},
        load={"rows": ids.shape[0], "tokens_per_row": ids.shape[1], "tiles": tiles},
        tile_size=tile_size,
    )


def idefics3(attention: str, *, smolvlm: bool = False) -> Tiny:
    """Return an Idefics3 or SmolVLM with four tiles of 8 x 8 patches, four patches a token."""
    config, cls = (
        (tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration)
        if smolvlm
        else (tf.Idefics3Config, tf.Idefics3ForConditionalGeneration)
    )
    model = cls(
        config(
            vision_config={"image_size": 64, "patch_size": 8, **EYES},
            text_config={"model_type": "llama", **TEXT, "pad_token_id": 0},
            scale_factor=2,
            image_token_id=5,
            pad_token_id=0,
        )
    )
    model.set_attn_implementation(attention)
    # pictures of zeros would be taken for padding
    return _tiny(model, _ids(2, 96, 32), 4, pixel_values=torch.rand(1, 4, 3, 64, 64) + 1)


def qwen_vl(attention: str, *, newer: bool) -> Tiny:
    """Return a Qwen2-VL or Qwen2.5-VL with four pictures of 8 x 8 patches."""
    vision = {"depth": 4, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if newer:
        config, cls = tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLForConditionalGeneration
        vision |= {"hidden_size": 64, "intermediate_size": 176, "out_hidden_size": 64}
        vision |= {"window_size": 16, "fullatt_block_indexes": [1, 3]}
    else:
        config, cls = tf.Qwen2VLConfig, tf.Qwen2VLForConditionalGeneration
        vision |= {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    model = cls(
        config(
            vision_config=vision,
            text_config={**TEXT, "rope_parameters": rope},
            image_token_id=5,
            vision_start_token_id=6,
            vision_end_token_id=7,
            video_token_id=8,
        )
    )
    model.set_attn_implementation(attention)
    return _tiny(
        model,
        _ids(2, 96, 32),
        4,
        tile_size=32,
        pixel_values=torch.randn(4 * 64, 3 * 2 * 4 * 4),
        image_grid_thw=torch.tensor([[1, 8, 8]] * 4),
        position_ids=torch.arange(96)[None, None].expand(3, 2, 96),
    )


def llava(attention: str) -> Tiny:
    """Return a LLaVA: CLIP, of which the last layer feeds nothing."""
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 64, "patch_size": 8, **EYES},
            text_config={"model_type": "llama", **TEXT},
            image_token_index=5,
        )
    )
    model.set_attn_implementation(attention)
    return _tiny(model, _ids(2, 96, 64), 2, pixel_values=torch.randn(2, 3, 64, 64))


def gemma3(attention: str) -> Tiny:
    """Return a Gemma 3: pooled patches, four norms a block, a dense mask."""
    model = tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            vision_config={**SIGLIP, **EYES},
            text_config={**TEXT, "head_dim": 32},
            mm_tokens_per_image=16,
            image_token_index=5,
            boi_token_index=6,
            eoi_token_index=7,
        )
    )
    model.set_attn_implementation(attention)
    ids = _ids(2, 96, 32)
    return _tiny(model, ids, 4, pixel_values=torch.randn(4, 3, 64, 64), token_type_ids=(ids == 5).long())


def paligemma(attention: str) -> Tiny:
    """Return a PaliGemma: one linear layer between SigLIP and Gemma."""
    model = tf.PaliGemmaForConditionalGeneration(
        tf.PaliGemmaConfig(
            vision_config={**SIGLIP, **EYES},
            text_config={**TEXT, "model_type": "gemma", "head_dim": 16},
            image_token_index=5,
            projection_dim=64,
        )
    )
    model.set_attn_implementation(attention)
    ids = _ids(2, 96, 64)
    return _tiny(
        model,
        ids,
        2,
        pixel_values=torch.randn(2, 3, 64, 64),
        token_type_ids=torch.zeros_like(ids),
        attention_mask=torch.ones_like(ids),
    )


FAMILIES: dict[str, Callable[[str], Tiny]] = {
    "idefics3": idefics3,
    "smolvlm": lambda attention: idefics3(attention, smolvlm=True),
    "qwen2_vl": lambda attention: qwen_vl(attention, newer=False),
    "qwen2_5_vl": lambda attention: qwen_vl(attention, newer=True),
    "llava": llava,
    "gemma3": gemma3,
    "paligemma": paligemma,
}


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, as peft has it: result + B(A(x)) * scale."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base(x)
        added = result + self.up(self.down(x.to(self.down.weight.dtype))) * 2.0
        return added.to(result.dtype)


def adapt(model: nn.Module, names: tuple[str, ...], rank: int) -> None:
    """Freeze a language model and put adapters beside the layers of these names."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(parent, name, Adapted(child, rank))
