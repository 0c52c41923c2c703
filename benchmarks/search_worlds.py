"""Hidden memory functions for batch-size searches, and what others search with.

A world is bytes(batch size) and a limit; a search sees whether a size fits and, if it does, the peak. The
others' searches are written from their descriptions, with their default settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Kind: TypeAlias = Literal["affine", "stepped", "convex", "concave"]
KINDS: Final[tuple[Kind, ...]] = ("affine", "stepped", "convex", "concave")
LIMIT: Final = 80e9
CAP: Final = 1 << 17
Search: TypeAlias = Callable[[Callable[[int], "float | None"], int], int]
"""(probe, start) -> size; the probe returns the peak, or None where the size does not fit."""


class World(NamedTuple):
    kind: Kind
    memory: Callable[[int], float]
    static: float
    """Bytes without a batch."""
    largest: int
    """The largest size that fits."""


def make_world(rng: np.random.Generator, kind: Kind) -> World:
    """Return a world whose largest size is 1 to 1,500, evenly on a log scale; 3 to 80 % of it is static."""
    aimed = math.exp(rng.uniform(0, math.log(1500))) + rng.uniform(0, 1)
    static = rng.uniform(0.03, 0.8) * LIMIT
    exponent = {"convex": rng.uniform(1.02, 1.3), "concave": rng.uniform(0.75, 0.98)}.get(kind, 1.0)
    block = rng.uniform(0.002, 0.02) * LIMIT if kind == "stepped" else 0.0

    def memory(size: int) -> float:
        smooth = static + (LIMIT - static) * (size / aimed) ** exponent
        return math.ceil(smooth / block) * block if block else smooth

    low, high = 0, CAP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory(middle) <= LIMIT else (low, middle)
    return World(kind, memory, static, low) if low else make_world(rng, kind)


class Score(NamedTuple):
    share: float
    """What was found over the largest size."""
    probes: int
    ooms: int


def play(world: World, search: Search, start: int) -> Score:
    counts = [0, 0]

    def probe(size: int) -> float | None:
        counts[0] += 1
        peak = world.memory(size)
        counts[1] += peak > LIMIT
        return peak if peak <= LIMIT else None

    found = search(probe, start)
    assert found == 0 or world.memory(found) <= LIMIT, "a size that was found works"
    return Score(found / world.largest, *counts)


def accelerate(probe: Callable[[int], float | None], start: int) -> int:
    """`find_executable_batch_size`: nine tenths after each OOM, never up, so it begins at twice the start."""
    size = 2 * start
    while size and probe(size) is None:
        size = int(size * 0.9)
    return size


def lightning_power(probe: Callable[[int], float | None], start: int, max_trials: int = 25) -> int:
    """Lightning's "power": twice after a success; half after an OOM, which ends it once something worked."""
    size, best = start, 0
    for _ in range(max_trials):
        if probe(size) is not None:
            best, size = size, size * 2
        elif best:
            break
        else:
            size //= 2
        if not size:
            break
    return best


def lightning_binsearch(probe: Callable[[int], float | None], start: int, max_trials: int = 25) -> int:
    """Lightning's "binsearch": doubling, then bisection to the last sample, then 5 % less."""
    size, low, high = start, 0, None
    for _ in range(max_trials):
        if probe(size) is not None:
            low = size
        else:
            high = size
        if high is None:
            size *= 2
        elif high - low <= 1:
            break
        else:
            size = (low + high) // 2
    return int(low * 0.95) or low


def nemo(probe: Callable[[int], float | None], start: int, gap: float = 0.05) -> int:
    """NeMo's OOMptimizer: doubling or halving to a bracket, then bisection until it is narrower than 5 %."""
    size, low, high = start, 0, None
    while True:
        if probe(size) is not None:
            low = size
        else:
            high = size
        if high is None:
            size *= 2
        elif high - low <= 1 or (low and (high - low) / high < gap):
            return low
        else:
            size = (low + high) // 2 if low else high // 2
        if not size:
            return 0
