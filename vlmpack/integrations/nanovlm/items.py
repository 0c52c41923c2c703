"""nanoVLM's form of a sample or a pack: shifted labels, float tiles, a padding mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch

from vlmpack.images import to_float
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from vlmpack.packing import PackedSequence


class Item(TypedDict):
    """One sample or one pack. T tokens, tiles of P pixels a side."""

    input_ids: torch.Tensor
    """int64 [T]."""
    labels: torch.Tensor
    """int64 [T], already shifted: labels[t] is the target of position t."""
    attention_mask: torch.Tensor
    """int64 [T], 0 on padding."""
    images: list[torch.Tensor]
    """float32 [num_tiles, 3, P, P] in [0, 1] for each image."""


def as_item(pack: PackedSequence) -> Item:
    """Return the pack in nanoVLM's form: shifted labels, float tiles."""
    labels = pack.labels.roll(-1)
    labels[-1] = IGNORE_INDEX  # the first label of each segment is masked, so no other shift leaks
    return Item(
        input_ids=pack.input_ids,
        labels=labels,
        attention_mask=(pack.segment_ids != 0).to(torch.int64),
        images=[to_float(tiles) for tiles in torch.split(pack.tiles, list(pack.tiles_per_image))],
    )
