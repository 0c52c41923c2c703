"""The most tiles that a replay of the allocator takes, with every smaller count as well.

Where free memory lies decides whether a batch runs, so one more tile may run where one less does not: three
rows of a 1.5B model on 80 GB run with 24 tiles and with 36, but not with 26 to 34. What is wanted is the
count up to which all run.

    tiles    0 ........... n0 | n0+1 ........ limit | limit+1
             reserves less    | runs at capacity,   | does not run
             than the device  | counts tried in turn|
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from vlmpack.memory.estimate import estimate
from vlmpack.memory.replay import replay

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.regime import TrainingRegime

REPLAY_MARGIN: Final = 0.01
"""Share of the capacity that is left free. Against traced allocators the replay itself is at most a tile or
two too high."""
_BELOW: Final = 8
"""Counts below the first one in doubt that are tried too."""
_FINENESS: Final = 64
"""From this many tiles on counts are tried in steps of a share of them."""


@lru_cache(maxsize=256)
def replayed_tiles(
    model: ModelShape,
    regime: TrainingRegime,
    capacity: int,
    *,
    rows: int,
    tokens_per_row: int,
) -> int:
    """Return the most tiles up to which every batch runs; -1 if not even text does; cached.

    About 20 to 40 replays of some ten milliseconds.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        capacity: Bytes that the allocator may reserve, CUDA's context left out.
        rows: Packs of the batch.
        tokens_per_row: Positions of each; they do not bound the tiles here.
    """
    usable = int(capacity / (1 + REPLAY_MARGIN))

    def never_full(tiles: int) -> bool:
        run = replay(model, regime, rows=rows, tokens_per_row=tokens_per_row, tiles=tiles)
        return run.peak_reserved <= usable

    def runs(tiles: int) -> bool:
        load = {"rows": rows, "tokens_per_row": tokens_per_row, "tiles": tiles}
        return replay(model, regime, **load, capacity=usable).fits

    def asks_for_less(tiles: int) -> bool:
        step = estimate(model, regime, rows=rows, tokens_per_row=tokens_per_row, tiles=tiles)
        return step.peak_requested <= usable

    most = _last(asks_for_less, -1, rows * tokens_per_row if model.vision is not None else 0)
    low = _last(never_full, -1, most)
    step = max(1, low // _FINENESS)
    found = max(-1, low - _BELOW * step)
    while found < most:
        after = min(most, found + step)
        if not runs(after):
            break
        found = after
    return found


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number up to `high` for which something holds; `low` if for none. By bisection."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
