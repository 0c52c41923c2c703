"""Tiny random models of the real classes, and batches of packs for them with a small vocabulary."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.fakes import SMALL, jpeg, row, samples_of, tokenizer
from vlmpack.collate import VQACollator
from vlmpack.packing import ConstantLengthDataset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmpack.packing import PackedSequence

VOCABULARY = 512
IMAGE = VOCABULARY - 1
LENGTH = 128
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rows(count: int = 24, *, images: bool = True) -> list[dict]:
    """Return conversations of different lengths, every third without an image where there are any."""
    rng = np.random.default_rng(7)
    return [
        row(
            "What is it? " * int(rng.integers(1, 6)),
            "Yes it is. " * int(rng.integers(1, 5)),
            [jpeg(40, 40, n)] if images and n % 3 else [],
        )
        for n in range(count)
    ]


def packs(data: list[dict] | None = None, **settings: object) -> ConstantLengthDataset:
    """Return a stream of packs of about 3 samples."""
    return ConstantLengthDataset(
        samples_of(rows() if data is None else data), **{"seq_length": LENGTH, "lookahead": 8, **settings}
    )


class SmallVocabulary(VQACollator):
    """The collator of the core, with token ids folded into a small vocabulary; keeps its samples apart."""

    def __init__(self, **settings: object) -> None:
        super().__init__(tokenizer(), LENGTH, **settings)

    def __call__(self, packed: Sequence[PackedSequence]) -> dict:
        batch = dict(super().__call__(packed))
        ids = batch["input_ids"]
        small = torch.where(ids == tokenizer().convert_tokens_to_ids("<|image|>"), IMAGE, ids % 500 + 3)
        batch["input_ids"] = small
        batch["labels"] = torch.where(batch["labels"] == -100, -100, small)
        batch["use_cache"] = False
        batch |= flash_boundaries(batch["segment_ids"])
        return batch


class SmolVLMCollator(SmallVocabulary):
    """Images flat, [1, N, 3, H, W], in the order of their tokens."""

    def __call__(self, packed: Sequence[PackedSequence]) -> dict:
        batch = super().__call__(packed)
        tiles = batch.pop("tiles")
        if len(tiles):
            batch["pixel_values"] = ((tiles.float() / 255 - 0.5) / 0.5)[None]
            batch["pixel_attention_mask"] = torch.ones(1, len(tiles), *tiles.shape[-2:], dtype=torch.bool)
        return batch


class QwenCollator(SmallVocabulary):
    """Text only; four rows of positions, as Qwen wants them."""

    def __call__(self, packed: Sequence[PackedSequence]) -> dict:
        batch = super().__call__(packed)
        del batch["tiles"]
        batch["position_ids"] = batch["position_ids"][None].repeat(4, 1, 1)
        return batch


def flash_boundaries(segment_ids: torch.Tensor) -> dict:
    """Return where segments begin over all rows laid end to end."""
    changes = torch.ones_like(segment_ids, dtype=torch.bool)
    changes[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = torch.cat([changes.flatten().nonzero().flatten(), torch.tensor([segment_ids.numel()])]).int()
    longest = int(starts.diff().max())
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts.clone(),
        "max_length_q": longest,
        "max_length_k": longest,
    }


def smolvlm(seed: int = 0) -> SmolVLMForConditionalGeneration:
    """Return a SmolVLM of 0.1 million weights: 4 tokens a tile of 32 pixels."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SMALL.tile_size,
        "patch_size": SMALL.patch_size,
    }
    config = SmolVLMConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
        scale_factor=1,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return spread(SmolVLMForConditionalGeneration(config))


def _qwen_vision(**more: object) -> dict:
    return {"depth": 1, "num_heads": 2, "patch_size": 16, "spatial_merge_size": 2, **more}


def qwen2_vl(seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """Return a Qwen2-VL of 0.1 million weights."""
    torch.manual_seed(seed)
    text = {
        **TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    config = Qwen2VLConfig(
        vision_config=_qwen_vision(embed_dim=32, hidden_size=32), text_config=text, image_token_id=IMAGE
    )
    return spread(Qwen2VLForConditionalGeneration(config))


def qwen3_vl(seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """Return a Qwen3-VL of 0.1 million weights. Its class says accepts_loss_kwargs = False."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4, "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope}
    vision = _qwen_vision(
        hidden_size=32,
        intermediate_size=64,
        out_hidden_size=32,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )
    config = Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return spread(Qwen3VLForConditionalGeneration(config))


def llama(seed: int = 0) -> LlamaForCausalLM:
    """Return a language model of 0.05 million weights."""
    torch.manual_seed(seed)
    return spread(LlamaForCausalLM(LlamaConfig(**TEXT)))


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Draw weights from N(0, 1 / fan-in), so that logits are of size 1 and a leak is seen."""
    with torch.no_grad(), warnings.catch_warnings():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(0, weight[0].numel() ** -0.5)
    return model
