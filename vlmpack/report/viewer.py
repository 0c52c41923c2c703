"""The pack viewer: packs as bars of their samples; a click shows tiles, and the text with what is learnt.

Made of `details` elements, so that it needs no script: the page can be mailed, and opened offline.
"""

from __future__ import annotations

import base64
import io
import itertools
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from vlmpack.errors import SampleError
from vlmpack.images.decode import decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedTokenizerBase

    from vlmpack.budget import PackBudget
    from vlmpack.packing import PackedSequence

THUMB: Final = 72
"""Pixels of a tile's side."""
TILES: Final = 12
"""Tiles that are shown of a sample."""
CHARACTERS: Final = 1500
"""Characters that are shown of a sample's text."""
HUES: Final = ("#3b76b5", "#e08214", "#3f9146", "#8e4a94", "#cf4a3f", "#23888a", "#96793a")


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """A stretch of a sample's text."""

    text: str
    """As the tokenizer decodes it; image tokens are one word in brackets."""
    is_learnt: bool
    """Whether the loss counts it."""


def words_of(
    input_ids: torch.Tensor, labels: torch.Tensor, tokenizer: PreTrainedTokenizerBase, image_ids: set[int]
) -> list[Words]:
    """Return a segment's text in stretches that are learnt or not, images in brackets.

    Args:
        input_ids: int64 [T].
        labels: int64 [T], -100 where nothing is learnt.
        tokenizer: That the ids are of.
        image_ids: Ids that stand for images.
    """
    ids, learnt = input_ids.numpy(), labels.numpy() != -100
    is_image = np.isin(ids, list(image_ids))
    kind = is_image * 2 + learnt
    edges = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(ids)]
    words = []
    for start, stop in itertools.pairwise(edges):
        if stop == start:
            continue
        text = (
            f"[image: {stop - start} tokens]"
            if is_image[start]
            else tokenizer.decode(ids[start:stop].tolist())
        )
        words.append(Words(text=text, is_learnt=bool(learnt[start])))
    return words


def pack_viewer(
    packs: Sequence[tuple[int, PackedSequence]],
    budget: PackBudget,
    tokenizer: PreTrainedTokenizerBase,
    image_ids: set[int],
) -> str:
    """Return the viewer as HTML.

    Args:
        packs: Number and pack, decoded or not.
        budget: What a pack may hold.
        tokenizer: Of the packs.
        image_ids: Ids that stand for images.
    """
    return "\n".join(_pack(number, pack, budget, tokenizer, image_ids) for number, pack in packs)


def _pack(
    number: int,
    pack: PackedSequence,
    budget: PackBudget,
    tokenizer: PreTrainedTokenizerBase,
    image_ids: set[int],
) -> str:
    cost = pack.cost
    segments = "".join(
        f'<i style="width:{100 * each.num_tokens / budget.max_tokens:.3f}%;background:{_hue(place)}" '
        f'title="{escape(key)}: {each.num_tokens:,} tokens, {each.num_images} images"></i>'
        for place, (key, each) in enumerate(zip(pack.keys, pack.costs, strict=True))
    )
    figures = (
        f"{len(pack.keys)} samples · {cost.num_tokens:,} tokens · {cost.num_images} images · "
        f"{sum(pack.tiles_per_image)} tiles"
    )
    return (
        f'<details class="pack" id="pack-{number}"><summary><b>{number:,}</b>'
        f'<span class="track">{segments}</span><em>{figures}</em></summary>'
        f"{_samples(pack, tokenizer, image_ids)}</details>"
    )


def _hue(place: int) -> str:
    return HUES[place % len(HUES)]


def _samples(pack: PackedSequence, tokenizer: PreTrainedTokenizerBase, image_ids: set[int]) -> str:
    shown = []
    image = tile = 0
    for place, (key, cost) in enumerate(zip(pack.keys, pack.costs, strict=True)):
        where = pack.segment_ids == place + 1
        num_tiles = sum(pack.tiles_per_image[image : image + cost.num_images])
        tiles = pack.tiles[tile : tile + num_tiles]
        image, tile = image + cost.num_images, tile + num_tiles
        words = words_of(pack.input_ids[where], pack.labels[where], tokenizer, image_ids)
        shown.append(
            f'<section><h4><i style="background:{_hue(place)}"></i>{escape(key)}'
            f"<em>{cost.num_tokens:,} tokens · {cost.num_images} images · {num_tiles} tiles</em></h4>"
            f'<div class="tiles">{"".join(map(_thumbnail, tiles[:TILES]))}'
            f"{_more(len(tiles) - TILES)}</div><p>{_text(words)}</p></section>"
        )
    return "".join(shown)


def _more(number: int) -> str:
    return f"<em>and {number} more</em>" if number > 0 else ""


def _thumbnail(tile: torch.Tensor) -> str:
    return _image(Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()), "tile")


def thumbnail_of(data: bytes | None) -> str:
    """Return a picture's file as a small image of the page; nothing where there is none or it is broken.

    Args:
        data: As it is stored.
    """
    if data is None:
        return ""
    try:
        picture = decode(data)
    except SampleError:
        return ""
    return _image(picture, "picture")


def _image(picture: Image.Image, name: str) -> str:
    file = io.BytesIO()
    picture.resize((THUMB, THUMB)).save(file, "JPEG", quality=70)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{name}" width="{THUMB}" height="{THUMB}" src="data:image/jpeg;base64,{data}">'


def _text(words: Sequence[Words]) -> str:
    left, parts = CHARACTERS, []
    for each in words:
        text = escape(each.text[:left])
        parts.append(f"<mark>{text}</mark>" if each.is_learnt else text)
        left -= len(each.text)
        if left <= 0:
            parts.append(" <em>cut here</em>")
            break
    return "".join(parts).replace("\n", "<br>")
