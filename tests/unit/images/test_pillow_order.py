from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlmpack.images.pillow_order import _RULES, height_first
from vlmpack.images.resample import resize


def pillow(pixels, size):
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def by_axes(order):
    """A Pillow that resizes one axis after the other, by this Pillow."""

    def whole(pixels, size):
        height, width = pixels.shape[:2]
        between = (size[0], width) if order((height, width), size) else (height, size[1])
        return pillow(pillow(pixels, between), size)

    return whole


@pytest.mark.parametrize("size", [(60, 60), (201, 2), (3, 90), (97, 31), (40, 120)])
@pytest.mark.parametrize("target", [(20, 40), (19, 40), (150, 4), (64, 32), (30, 8), (61, 128)])
def test_the_rule_that_was_found_is_this_pillows(size, target):
    rule = height_first(resize)
    assert rule is not None
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        resize(pixels, target, height_first=rule(size, target)), pillow(pixels, target)
    )


@pytest.mark.parametrize("number", range(len(_RULES)))
def test_every_rule_is_told_from_the_others(monkeypatch, number):
    # A Pillow of another version: what it would do, done axis by axis with this one.
    other = by_axes(_RULES[number])
    real = Image.Image.resize

    def resized(self, size, resample=None, box=None):
        if (self.width == size[0]) or (self.height == size[1]):
            return real(self, size, resample, box)
        return Image.fromarray(other(np.asarray(self), size[::-1]))

    monkeypatch.setattr(Image.Image, "resize", resized)
    assert height_first.__wrapped__(resize) is _RULES[number]


def test_a_pillow_that_follows_no_rule_is_noticed():
    def off_by_one(pixels, size, height_first):
        made = resize(pixels, size, height_first=height_first)
        made[0, 0, 0] ^= 1
        return made

    assert height_first(off_by_one) is None
