"""Which pack each rank has when: the order of an epoch, and what is left of it after some steps.

    spans        (start, stop) in the plan's pack-by-pack order of samples: a pack, or half of one
    epoch_order  all packs in seeded random order
    even         as many for each rank: the fullest ones by count are split in two
    windows      whole steps; each window is put into balanced steps when its turn comes
    Stage        a part of the run with one number of ranks and packs a batch

What is left after a stage is a list of spans again, and the next stage, with other ranks, begins from it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from vlmpack.errors import ConfigError
from vlmpack.ranks.balance import COLUMNS, balanced_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmpack.packing.inputs import Int64s
    from vlmpack.ranks.balance import Balance

_PACKS: Final = 1
"""Third word of the seed. numpy pads a seed with zeros, so [seed, 0] is the plan's own seed: in epoch 0 that
order undid the plan's shuffle, and text came longest first."""
_STEPS: Final = 2
"""The same for the order of steps in a window."""

LEAST_WINDOW: Final = 1024
"""Packs of a window, where the user does not say."""
LEAST_STEPS: Final = 128
"""Steps of a window, where the user does not say: fewer are too few to find alike packs among."""


class Stage(NamedTuple):
    """A part of an epoch, run with the same settings."""

    world_size: int
    """Ranks."""
    batch_size: int
    """Packs a rank and step."""
    num_had: int
    """Packs that all ranks together had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Balancing:
    """How steps are balanced."""

    balance: Balance | None
    """What the ranks of a step share evenly; None keeps the random order."""
    window: int | None
    """Packs that are put into steps together; None: 1,024, and at least 128 steps."""
    seed: int
    """Of the run."""
    load_prefix: Int64s = field(repr=False)
    """int64 [samples + 1, 2]: ViT patches and attention of all samples before each place; may wrap around."""

    def loads(self, spans: Int64s) -> Int64s:
        """Return int64 [packs, 2]: the ViT patches and the attention of each span."""
        # Differences are right even where the sums passed 2^63 and wrapped.
        return self.load_prefix[spans[:, 1]] - self.load_prefix[spans[:, 0]]

    def bounds(self, num_packs: int, world_size: int, batch_size: int) -> list[int]:
        """Return where each window begins, and where the last one ends; whole steps, spread evenly.

        Args:
            num_packs: In all, dividing by the ranks.
            world_size: Ranks.
            batch_size: Packs a rank and step.
        """
        size = world_size * batch_size
        window = self.window or max(LEAST_WINDOW, LEAST_STEPS * size)
        num_steps = -(-num_packs // size)
        num_windows = -(-num_steps // max(window // size, 1))
        begins = [num_steps * number // num_windows * size for number in range(num_windows)]
        return [*begins, num_packs]

    def arranged(self, spans: Int64s, world_size: int, batch_size: int, *, epoch: int, begin: int) -> Int64s:
        """Return the packs of a window in balanced steps; as they are where nothing is balanced.

        Args:
            spans: int64 [packs, 2].
            world_size: Ranks.
            batch_size: Packs a rank and step.
            epoch: From 0.
            begin: Where the window begins in its stage.
        """
        if self.balance is None:
            return spans
        loads = self.loads(spans)[:, COLUMNS[self.balance]]
        rng = np.random.default_rng([self.seed, epoch, _STEPS, begin])
        return spans[balanced_steps(loads, world_size, batch_size, rng)]

    def blocks(self, spans: Int64s, stage: Stage, *, epoch: int) -> Iterator[Int64s]:
        """Yield what is left of a stage's packs, window by window, in the order of its steps.

        Each window is arranged when it is asked for, 10 to 30 ms for 1,024 packs.

        Args:
            spans: int64 [packs, 2]: what the stage began with, even over its ranks.
            stage: Its settings, and how much of it was had.
            epoch: From 0.
        """
        bounds = self.bounds(len(spans), stage.world_size, stage.batch_size)
        for number in range(bisect_right(bounds, stage.num_had) - 1, len(bounds) - 1):
            begin, end = bounds[number], bounds[number + 1]
            block = self.arranged(
                spans[begin:end], stage.world_size, stage.batch_size, epoch=epoch, begin=begin
            )
            yield block[max(stage.num_had - begin, 0) :]

    def after(self, spans: Int64s, stage: Stage, *, epoch: int) -> Int64s:
        """Return the packs that a stage leaves: of the window it stopped in, then of those behind it.

        Args:
            spans: int64 [packs, 2]: what the stage began with, even over its ranks.
            stage: Its settings, and how much of it was had.
            epoch: From 0.
        """
        bounds = self.bounds(len(spans), stage.world_size, stage.batch_size)
        number = bisect_right(bounds, stage.num_had) - 1
        if number >= len(bounds) - 1 or bounds[number] == stage.num_had:
            return spans[stage.num_had :]
        first = next(self.blocks(spans, stage, epoch=epoch))
        return np.concatenate([first, spans[bounds[number + 1] :]])


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
