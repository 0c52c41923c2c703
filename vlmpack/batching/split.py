"""Split a step into micro-batches by predicted cost, and a pack at the boundaries of its segments.

    costs  4 4 3 5 2     cap 12    ->   [4 4 3] [5 2]       first so many that each fits: 11 and 7
                                   ->   [4 4]   [3 5 2]     then as even as contiguous parts get: 8 and 10

Order is kept, so a step's samples meet the same neighbours however often it is split.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from vlmpack.packing.assemble import PackedSequence

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROUNDS: Final = 20
"""Halvings of the range in which the even cost is looked for: a millionth of it."""


def split_by_cost(costs: Sequence[float], cap: float) -> list[range]:
    """Return contiguous parts whose costs stay within the cap, as few and then as even as possible.

    A single item over the cap is a part of its own. O(items x log(precision)).

    Args:
        costs: Of each item, in order, at least 0.
        cap: What a part may cost.
    """
    parts = _fill(costs, cap)
    if len(parts) < 2:
        return parts
    low = max(sum(costs) / len(parts), max(costs))
    best, high = parts, max(sum(costs[part.start : part.stop]) for part in parts)
    for _ in range(_ROUNDS):
        if high - low <= 1e-3 * high:
            break
        middle = (low + high) / 2
        tried = _fill(costs, middle)
        if len(tried) <= len(parts):
            best, high = tried, middle
        else:
            low = middle
    return best


def _fill(costs: Sequence[float], cap: float) -> list[range]:
    parts: list[range] = []
    start, load = 0, 0.0
    for index, cost in enumerate(costs):
        if index > start and load + cost > cap:
            parts.append(range(start, index))
            start, load = index, 0.0
        load += cost
    if len(costs) > start:
        parts.append(range(start, len(costs)))
    return parts


def divide_item(item: Any) -> tuple[Any, Any] | None:
    """Return the two halves of a pack that holds several samples, or None: other items are one sample.

    Args:
        item: A `PackedSequence`, or anything.
    """
    if isinstance(item, PackedSequence) and len(item.keys) > 1:
        return split_pack(item)
    return None


def split_pack(pack: PackedSequence) -> tuple[PackedSequence, PackedSequence]:
    """Return two packs, cut at the boundary between segments that halves the costs best.

    Segments stay whole, with their images, appended padding and masked first labels: training on both
    adds up to training on the pack.

    Args:
        pack: With at least two samples.
    """
    assert len(pack.keys) > 1, "a pack of one sample cannot be split"
    tokens, patches = ([getattr(cost, name) for cost in pack.costs] for name in ("num_tokens", "num_patches"))
    weights = [
        token / max(sum(tokens), 1) + patch / max(sum(patches), 1)
        for token, patch in zip(tokens, patches, strict=True)
    ]
    total = sum(weights)
    at = min(range(1, len(weights)), key=lambda cut: abs(sum(weights[:cut]) - total / 2))
    return _cut(pack, 0, at), _cut(pack, at, len(pack.keys))


def _cut(pack: PackedSequence, start: int, stop: int) -> PackedSequence:
    """Return the samples start..stop of a pack as a pack."""
    first = sum(cost.num_tokens for cost in pack.costs[:start])
    last = first + sum(cost.num_tokens for cost in pack.costs[start:stop])
    image_first = sum(cost.num_images for cost in pack.costs[:start])
    image_last = image_first + sum(cost.num_images for cost in pack.costs[start:stop])
    tile_first = sum(pack.tiles_per_image[:image_first])
    tile_last = tile_first + sum(pack.tiles_per_image[image_first:image_last])
    segments = pack.segment_ids[first:last]
    return replace(
        pack,
        input_ids=pack.input_ids[first:last],
        labels=pack.labels[first:last],
        segment_ids=(segments - start).clamp(min=0),
        position_ids=pack.position_ids[first:last],
        tiles=pack.tiles[tile_first:tile_last],
        tiles_per_image=pack.tiles_per_image[image_first:image_last],
        keys=pack.keys[start:stop],
        costs=pack.costs[start:stop],
        images=pack.images[image_first:image_last] if pack.images else (),
    )
