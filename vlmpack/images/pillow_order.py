"""Which axis this Pillow resizes first: the pixels depend on it, and Pillow's versions differ.

A resize rounds to 8 bits between its two passes, so width first and height first differ by a few levels.
Up to 12.1 width always comes first; 12.2 begins with the height of pictures more than a hundred times as
tall as wide; 13.0 begins with it whenever that takes more rows away than twice the columns. So this Pillow
is asked, once, with pictures of a few pixels. A Pillow that follows none of these rules does the resizing
itself, eight times slower and right.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Rule: TypeAlias = Callable[[tuple[int, int], tuple[int, int]], bool]
    Resize: TypeAlias = Callable[[npt.NDArray[np.uint8], tuple[int, int], bool], npt.NDArray[np.uint8]]


def _never(_size: tuple[int, int], _target: tuple[int, int]) -> bool:
    return False


def _very_tall(size: tuple[int, int], target: tuple[int, int]) -> bool:
    return size[0] > 100 * size[1] and target[0] < size[0]


def _fewer_rows(size: tuple[int, int], target: tuple[int, int]) -> bool:
    return target[0] < size[0] and size[0] - target[0] > 2 * (size[1] - target[1])


_RULES: Final[tuple[Rule, ...]] = (_fewer_rows, _very_tall, _never)
"""(height, width) before and after -> whether height comes first; the newest Pillow's rule first."""

_PROBES: Final = (
    ((60, 60), (19, 40)), ((60, 60), (20, 40)), ((60, 60), (59, 70)), ((60, 60), (60, 70)),
    ((60, 60), (80, 40)), ((120, 60), (79, 40)), ((120, 60), (80, 40)), ((201, 2), (150, 4)),
    ((200, 2), (150, 4)), ((350, 3), (349, 1)), ((5, 700), (3, 90)),
)  # fmt: skip
"""Sizes on both sides of each rule's edge."""


@cache
def height_first(resize: Resize) -> Rule | None:
    """Return the rule that this Pillow follows, None if it is another or `resize` is not bit-equal here.

    Args:
        resize: Our own: pixels [H, W, 3], (height, width), and whether height comes first.
    """
    rng = np.random.default_rng(0)
    rules = list(_RULES)
    for size, target in _PROBES:
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        expected = np.asarray(Image.fromarray(pixels).resize(target[::-1], Image.Resampling.BICUBIC))
        ways = [first for first in (False, True) if np.array_equal(resize(pixels, target, first), expected)]
        rules = [rule for rule in rules if rule(size, target) in ways]
    return rules[0] if rules else None
