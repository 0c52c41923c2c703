"""nanoVLM's data code, written plainly from its specification, to compare with. Slow where it is slow.

Not its source: behaviour only, as measured by running it. Kept are the things that cost: every picture is
decoded, resized and cut before anything is known about its pack; ToTensor makes two float copies, cutting
one, the global tile and `cat` another; conversations are rendered and tokenised whole and turn by turn; the
text has 64 image tokens a tile; packs are lists of tensors without dimensions, stacked.

No thread: CPU seconds are compared, and a thread only adds some.
"""

from __future__ import annotations

import io
import itertools
import math
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedTokenizerBase

TOKENS_PER_TILE: Final = 64
IGNORED: Final = -100
DELTA: Final = 5
"""Spare packs that the knapsack opens."""


def resized(image: Image.Image, side: int, largest: int, to_largest: bool) -> Image.Image:
    """The longer side becomes `largest` or a multiple of `side`, the shorter follows, rounded up."""
    width, height = image.size
    long, short = (width, height) if width >= height else (height, width)
    target_long = largest if to_largest else min(largest, math.ceil(long / side) * side)
    scale = target_long / long
    target_short = max(math.ceil(short * scale / side) * side, side)
    size = (target_long, target_short) if width >= height else (target_short, target_long)
    return image.resize(size, Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """float32 [3, H, W] from 0 to 1."""
    levels = torch.from_numpy(np.array(image, copy=True))
    return levels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def cut(picture: torch.Tensor, side: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """[n, 3, side, side] with the whole picture first, unless it is one tile; and the grid."""
    _, height, width = picture.shape
    rows, columns = height // side, width // side
    tiles = picture.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
    tiles = tiles.reshape(rows * columns, 3, side, side)
    if rows == columns == 1:
        return tiles, (1, 1)
    whole = F.interpolate(picture[None], (side, side), mode="bilinear", antialias=True, align_corners=False)
    return torch.cat([whole, tiles]), (rows, columns)


def tiles_of(data: bytes, side: int, largest: int, to_largest: bool) -> tuple[torch.Tensor, tuple[int, int]]:
    """A file -> float tiles and their grid."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return cut(to_tensor(resized(image, side, largest, to_largest)), side)


def image_string(grids: list[tuple[int, int]], has_global: bool = True) -> str:
    text = ""
    for index, (rows, columns) in enumerate(grids):
        if len(grids) > 1:
            text += f"<image: {index}>"
        if has_global:
            text += "<|global_image|>" + "<|image|>" * TOKENS_PER_TILE
            if rows == columns == 1:
                continue
        for row, column in itertools.product(range(1, rows + 1), range(1, columns + 1)):
            text += f"<row_{row}_col_{column}>" + "<|image|>" * TOKENS_PER_TILE
    return text


def prefix_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the template puts before an assistant's words."""
    mark = "xzyvd"
    rendered = tokenizer.apply_chat_template([{"role": "assistant", "content": mark}], tokenize=False)
    return len(tokenizer.encode(rendered[: rendered.find(mark)], add_special_tokens=False))


def ids_and_labels(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and shifted labels: the whole conversation once, each turn once more for the mask."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    mask, at = [0] * len(ids), 0
    for message in messages:
        length = len(tokenizer.apply_chat_template([message], tokenize=True, return_dict=False))
        if message["role"] == "assistant":
            start, end = at + prefix, at + length
            mask[start:end] = [1] * (end - start)
        at += length
    input_ids = torch.tensor(ids)
    labels = input_ids.clone().masked_fill(~torch.tensor(mask).to(torch.bool), IGNORED).roll(-1)
    labels[-1] = IGNORED
    return input_ids, labels


def item_of(
    row: dict[str, object],
    tokenizer: PreTrainedTokenizerBase,
    prefix: int,
    side: int,
    largest: int,
    to_largest: bool,
) -> dict[str, object]:
    """A row -> ids, labels, a mask and float tiles."""
    tiled = [tiles_of(data, side, largest, to_largest) for data in row["images"]]  # type: ignore[attr-defined]
    messages = []
    for turn in row["texts"]:  # type: ignore[attr-defined]
        messages += [
            {"role": "user", "content": turn["user"]},
            {"role": "assistant", "content": turn["assistant"]},
        ]
    if tiled:
        messages[0]["content"] = image_string([grid for _, grid in tiled]) + messages[0]["content"]
    input_ids, labels = ids_and_labels(tokenizer, messages, prefix)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": torch.ones_like(input_ids),
        "images": [tiles for tiles, _ in tiled],
    }


def knapsack(lengths: list[int], images: list[int], length: int, most_images: int) -> list[list[int]]:
    """Worst-fit decreasing: each sample into the least loaded pack that takes it."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = math.ceil(sum(lengths) / length) + DELTA
    load, held, groups = [0] * count, [0] * count, [[] for _ in range(count)]
    for i in order:
        for pack in sorted(range(len(load)), key=lambda p: load[p]):
            if load[pack] + lengths[i] <= length and held[pack] + images[i] <= most_images:
                break
        else:
            pack = len(load)
            load.append(0)
            held.append(0)
            groups.append([])
        load[pack] += lengths[i]
        held[pack] += images[i]
        groups[pack].append(i)
    return [group for group in groups if group]


def packed(items: list[dict[str, object]], length: int) -> dict[str, object]:
    """One pack: lists of tensors without dimensions, then stacked."""
    joined: dict[str, list[torch.Tensor]] = {
        "input_ids": [],
        "labels": [],
        "attention_mask": [],
        "images": [],
    }
    for item in items:
        for name, values in joined.items():
            values.extend(item[name])  # type: ignore[arg-type]
    if len(joined["input_ids"]) > length:
        raise ValueError(f"packed length {len(joined['input_ids'])} is over {length}")
    return {
        name: values if name == "images" else torch.stack(list(values)) for name, values in joined.items()
    }


def packs(
    rows: Iterable[dict[str, object]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    side: int = 512,
    largest: int = 2048,
    to_largest: bool = True,
    length: int = 4096,
    num_sequences: int = 8,
    most_images: int = 18,
) -> Iterator[dict[str, object]]:
    """The whole pipeline: rows -> packs of `length` tokens."""
    prefix = prefix_length(tokenizer)
    pad = tokenizer.eos_token_id
    buffer: list[dict[str, object]] = []
    waiting = 0

    def flush() -> Iterator[dict[str, object]]:
        lengths = [len(item["input_ids"]) for item in buffer]  # type: ignore[arg-type]
        images = [len(item["images"]) for item in buffer]  # type: ignore[arg-type]
        for group in knapsack(lengths, images, length, most_images):
            yield packed([buffer[i] for i in group], length)

    for row in rows:
        item = item_of(row, tokenizer, prefix, side, largest, to_largest)
        if len(item["input_ids"]) >= length or len(item["images"]) > 4:  # type: ignore[arg-type]
            continue
        for name, value in (("input_ids", pad), ("labels", IGNORED), ("attention_mask", 0)):
            item[name] = torch.cat([item[name], torch.tensor([value])])  # type: ignore[list-item]
        buffer.append(item)
        waiting += len(item["input_ids"])  # type: ignore[arg-type]
        if waiting >= length * num_sequences:
            yield from flush()
            buffer, waiting = [], 0
    if buffer:
        yield from flush()
