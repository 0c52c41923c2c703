"""Seeded sample costs for comparing packers: what the names mean, and how they are drawn.

Each workload is int64 [n, 3]: tokens, images, tiles (a tile is 1,024 ViT patches; the packers do not care
about the unit). The budget is 4,096 tokens, 18 images and 48 tiles.

| name | what it stands for | what it tests |
|---|---|---|
| text | text-only conversations | one axis binds |
| vlm_tiles | photos, documents and charts cut into tiles | two axes bind within half a percent |
| planted_half | packs cut out of full ones, one sample just above half | a known optimum, exactly full |
| over_half | nine in ten just above half | no two of them share a pack: the L2 bound is tight |
| anticorrelated | long texts, and short texts with many tiles | only a good mix fills both axes |

Shapes: n samples, the axes tokens, images and tiles in this order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]
    Draw = Callable[[int, np.random.Generator], Int64s]

MAX_TOKENS: Final[int] = 4096
"""Tokens that a pack may hold."""
MAX_IMAGES: Final[int] = 18
"""Images that a pack may hold."""
MAX_TILES: Final[int] = 48
"""Tiles that a pack may hold."""
BUDGET: Final[Int64s] = np.array([MAX_TOKENS, MAX_IMAGES, MAX_TILES], np.int64)
"""int64 [3], the three limits; no sample of a workload is over one of them."""

_TILE_SIDE: Final = 512
_MAX_SIDE: Final = 2048
_TOKENS_PER_TILE: Final = 65
"""64 image tokens and the position token before them."""


def costs_of(name: str, n: int, seed: int = 0) -> Int64s:
    """Return the costs of n samples of a workload. O(n); a function of the arguments only.

    A draw of fewer samples is no part of a draw of more: n takes part in the seeding.

    Args:
        name: One of `WORKLOADS`.
        n: Samples.
        seed: Decides the draw; at least 0.

    Returns:
        C-contiguous int64 [n, 3]: tokens, images, tiles.

    Raises:
        ConfigError: If there is no such workload, or n or the seed is negative.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"no workload {name!r}; choose one of {', '.join(WORKLOADS)}")
    if min(n, seed) < 0:
        raise ConfigError(f"n and seed must be at least 0, got {n} and {seed}")
    if n == 0:
        return np.empty((0, BUDGET.size), np.int64)
    return np.ascontiguousarray(WORKLOADS[name](n, np.random.default_rng([seed, n])))


def tiles_of_images(n: int, rng: np.random.Generator) -> Int64s:
    """Draw the tiles of n images: 60 % photos, 25 % documents, 15 % charts, each kind with its own sizes.

    The sides are cut as `Tiling` does, but in whole numbers: up to the next multiple of 512 pixels, at most
    2,048 a side, and a global tile where there is more than one.

    Args:
        n: Images.
        rng: Where the numbers come from.

    Returns:
        int64 [n], 1 to 17 tiles.
    """
    kind = rng.choice(3, n, p=[0.60, 0.25, 0.15])
    long_side = np.choose(
        kind, [_lognormal(950, 0.55, n, rng), _lognormal(1700, 0.35, n, rng), _lognormal(850, 0.4, n, rng)]
    )
    aspect = np.choose(
        kind,
        [
            rng.choice([1.0, 4 / 3, 3 / 2, 16 / 9], n, p=[0.2, 0.45, 0.25, 0.1]),
            rng.choice([2**0.5, 11 / 8.5], n, p=[0.4, 0.6]),
            rng.uniform(1.1, 2.0, n),
        ],
    )
    # Whole pixels: a 4:3 photo of 1333 x 1000 needs four rows of tiles, one of 1334 x 1000 needs three.
    pixels = np.maximum(np.rint(long_side), 2)
    short_pixels = np.maximum(np.rint(pixels / aspect), 1)
    target = np.clip(np.ceil(pixels / _TILE_SIDE), 1, _MAX_SIDE // _TILE_SIDE)  # tiles along the long side
    rows = np.maximum(np.ceil(short_pixels * target / pixels), 1)
    grid: Int64s = (target * rows).astype(np.int64)
    return grid + (grid > 1)


def _lognormal(mean: float, sigma: float, n: int, rng: np.random.Generator) -> Floats:
    """Draw lognormal numbers with this mean (of the numbers, not of their logarithms)."""
    return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, n)


def _whole(values: Floats, low: int, high: int) -> Int64s:
    return np.clip(np.rint(values), low, high).astype(np.int64)


def _text(n: int, rng: np.random.Generator) -> Int64s:
    """Draw texts of 450 tokens on average, a few of them as long as a pack."""
    costs = np.zeros((n, 3), np.int64)
    costs[:, 0] = _whole(_lognormal(450, 1.0, n, rng), 1, MAX_TOKENS)
    return costs


def _vlm_tiles(n: int, rng: np.random.Generator) -> Int64s:
    """Draw image conversations, again where one is over a budget."""
    costs = _image_conversations(n, rng)
    while (over := np.flatnonzero((costs > BUDGET).any(axis=1))).size:
        costs[over] = _image_conversations(over.size, rng)
    return costs


def _image_conversations(n: int, rng: np.random.Generator) -> Int64s:
    """Draw 1 to 4 images each, and a text of 200 tokens on average."""
    images = rng.choice([1, 2, 3, 4], n, p=[0.85, 0.08, 0.04, 0.03])
    each = tiles_of_images(4 * n, rng).reshape(n, 4)
    tiles = np.where(np.arange(4) < images[:, None], each, 0).sum(axis=1)
    tokens = _TOKENS_PER_TILE * tiles + _whole(_lognormal(200, 0.9, n, rng), 1, 1 << 20)
    return np.stack([tokens, images, tiles], axis=1)


def _planted_half(n: int, rng: np.random.Generator) -> Int64s:
    """Cut full packs into one part just above half and one to three others; images and tiles at random."""
    half = MAX_TOKENS // 2
    parts: list[Int64s] = []
    count = 0
    while count < n:
        packs = max((n - count) // 3 + 1, 1)
        large = rng.integers(half + 1, half + 201, packs)
        rest = MAX_TOKENS - large
        pieces = rng.integers(1, 4, packs)
        cuts = np.sort(rng.integers(1, rest[:, None], (packs, 2)), axis=1)
        first = np.where(pieces > 1, cuts[:, 0], rest)
        second = np.where(pieces == 3, cuts[:, 1] - cuts[:, 0], np.where(pieces == 2, rest - cuts[:, 0], 0))
        block = np.stack([large, first, second, MAX_TOKENS - large - first - second], axis=1).reshape(-1)
        parts.append(block[block > 0])
        count += parts[-1].size
    costs = np.empty((n, 3), np.int64)
    costs[:, 0] = np.concatenate(parts)[:n]
    costs[:, 1] = rng.integers(0, 5, n)
    costs[:, 2] = np.where(costs[:, 1] > 0, rng.integers(1, 13, n), 0)
    return costs[rng.permutation(n)]


def _over_half(n: int, rng: np.random.Generator) -> Int64s:
    """Draw nine in ten samples just above half of the tokens, and short ones; no images."""
    half = MAX_TOKENS // 2
    costs = np.zeros((n, 3), np.int64)
    above = rng.random(n) < 0.9
    costs[:, 0] = np.where(above, rng.integers(half + 1, half + 201, n), rng.integers(32, 601, n))
    return costs


def _anticorrelated(n: int, rng: np.random.Generator) -> Int64s:
    """Draw 45 % long texts, and short ones with 1 to 6 images of 16 tokens a tile."""
    long_text = rng.random(n) < 0.45
    images = np.where(long_text, 0, rng.integers(1, 7, n))
    tiles = np.where(long_text, 0, rng.integers(8, 25, n))
    prose = _whole(_lognormal(1400, 0.6, n, rng), 1, MAX_TOKENS)
    caption = 16 * tiles + _whole(_lognormal(60, 0.8, n, rng), 1, 800)
    return np.stack([np.where(long_text, prose, caption), images, tiles], axis=1)


WORKLOADS: Final[dict[str, Draw]] = {
    "text": _text,
    "vlm_tiles": _vlm_tiles,
    "planted_half": _planted_half,
    "over_half": _over_half,
    "anticorrelated": _anticorrelated,
}
"""Name -> what draws n samples of it."""
