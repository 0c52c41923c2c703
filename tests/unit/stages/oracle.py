"""A slow second way from a conversation to token ids and labels, sharing nothing with the library's.

The text is written out in full, every image token of every tile included, and tokenised in one go
through transformers' own front end. Which tokens the assistant wrote is told from byte counts: the
tokens of a byte-level tokenizer are the bytes of the text, one after the other.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from tests.fakes import SMALL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerFast

_IMAGE_TOKENS = re.compile(r"<\|image\|>|<\|global_image\|>|<row_[1-4]_col_[1-4]>")


def image_text(rows: int, columns: int) -> str:
    """Return what stands for an image of this grid: 4 image tokens a tile, and where the tile lies."""
    tile = "<|image|>" * 4
    text = "<|global_image|>" + tile
    if rows * columns > 1:
        text += "".join(f"<row_{r + 1}_col_{c + 1}>{tile}" for r in range(rows) for c in range(columns))
    return text


def clean(text: str) -> str:
    """Return a user's text without image tokens, however often taking one out makes another."""
    while _IMAGE_TOKENS.search(text):
        text = _IMAGE_TOKENS.sub("", text)
    return text


def chat_of(row: dict, sizes: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    """Return (role, content) with the whole text of each image in its place.

    Args:
        row: With the column `texts`, and `<image>` where images belong, or nowhere.
        sizes: Height and width of each image.
    """
    grids = [SMALL.image(height, width).grid for height, width in sizes]
    images = [image_text(grid.rows, grid.columns) for grid in grids]
    chat = [(role, turn[role]) for turn in row["texts"] for role in ("user", "assistant")]
    if not any("<image>" in content for _, content in chat):
        names = [f"<image: {i}>" if len(images) > 1 else "" for i in range(len(images))]
        first = "".join(name + image for name, image in zip(names, images, strict=True))
        cleaned = [(role, clean(content)) for role, content in chat]
        return [("user", first + cleaned[0][1]), *cleaned[1:]]
    placed = []
    for role, content in chat:
        pieces = [clean(piece) for piece in content.split("<image>")]
        text = pieces[0]
        for piece in pieces[1:]:
            text += images.pop(0) + piece
        placed.append((role, text))
    assert not images
    return placed


@lru_cache
def added_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, int]:
    """Return the length in bytes of every token that is not of the byte-level vocabulary."""
    return {number: len(token.content.encode()) for number, token in tokenizer.added_tokens_decoder.items()}


def ids_and_labels(
    tokenizer: PreTrainedTokenizerFast,
    write: Callable[[list[tuple[str, str]]], list[tuple[str, bool]]],
    row: dict,
    sizes: Sequence[tuple[int, int]],
) -> tuple[list[int], list[int]]:
    """Return the ids of the whole conversation, and -100 or the id where the assistant wrote the token.

    Args:
        tokenizer: Byte-level.
        write: What the chat template writes, in pieces.
        row: With the column `texts`.
        sizes: Height and width of each image.
    """
    pieces = write(chat_of(row, sizes))
    text = "".join(piece for piece, _ in pieces)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    added = added_tokens(tokenizer)
    # One character of the byte-level vocabulary is one byte.
    lengths = [added.get(number) or len(tokenizer.convert_ids_to_tokens(number)) for number in ids]
    assert sum(lengths) == len(text.encode()), "the tokens must be the bytes of the text"
    by_assistant = b"".join(bytes([spoken]) * len(piece.encode()) for piece, spoken in pieces)
    image_ids = {tokenizer.convert_tokens_to_ids(t) for t in _IMAGE_TOKENS.findall(image_text(4, 4))}
    labels, position = [], 0
    for token_id, length in zip(ids, lengths, strict=True):
        spoken = by_assistant[position : position + length]
        supervised = all(spoken) and token_id not in image_ids
        labels.append(token_id if supervised else -100)
        position += length
    return ids, labels
