"""The order of packs in an epoch, and making their number even over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from vlmpack.packing.inputs import Int64s

_PACKS: Final = 1
"""Third word of the seed. numpy pads a seed with zeros, so [seed, 0] is the plan's own seed: in epoch 0 that
order undid the plan's shuffle, and text came longest first."""


def epoch_order(spans: Int64s, *, seed: int, epoch: int) -> Int64s:
    """Return the packs of an epoch in seeded random order. O(packs).

    Args:
        spans: int64 [packs, 2].
        seed: Of the run.
        epoch: From 0.
    """
    return spans[np.random.default_rng([seed, epoch, _PACKS]).permutation(len(spans))]


def even(spans: Int64s, world_size: int) -> Int64s:
    """Split packs of several samples until their number divides by the ranks; nothing else moves.

    Each split takes the pack with most samples, the last of equals, and leaves its halves side by side.
    O(packs + splits x packs), with fewer splits than ranks.

    Args:
        spans: int64 [packs, 2] of (start, stop).
        world_size: Ranks, at least 1.

    Raises:
        ConfigError: If there are too few samples to give every rank one.
    """
    missing = -len(spans) % world_size
    for _ in range(missing):
        sizes = spans[:, 1] - spans[:, 0]
        if not len(sizes) or sizes.max() < 2:
            raise ConfigError(
                f"{int(sizes.sum())} samples are left, too few to give each of {world_size} ranks as "
                "many packs; use fewer ranks or more data"
            )
        at = len(sizes) - 1 - int(np.argmax(sizes[::-1]))
        start, stop = spans[at].tolist()
        middle = (start + stop) // 2
        halves = np.array([[start, middle], [middle, stop]], np.int64)
        spans = np.concatenate([spans[:at], halves, spans[at + 1 :]])
    return spans
