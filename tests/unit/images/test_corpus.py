"""Every image of the packaged corpus: ten modes, six formats, rotated ones among them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from datasets import Image as ImageFeature
from PIL import Image

from vlmpack.corpus import load_corpus
from vlmpack.images import decode, read_header


@pytest.fixture(scope="module")
def files():
    return [
        image
        for row in load_corpus().cast_column("images", [ImageFeature(decode=False)])
        for image in row["images"]
    ]


def test_headers_agree_with_pillow_and_with_what_datasets_decodes(files):
    formats, modes, turned, wrong = set(), set(), 0, []
    for file in files:
        found = read_header(file["bytes"])
        with Image.open(io.BytesIO(file["bytes"])) as opened:
            expected = (opened.mode, opened.format)
        handed_out = ImageFeature().decode_example(file)
        if (found.mode, found.format, found.width, found.height) != (*expected, *handed_out.size):
            wrong.append((file["path"], found, expected, handed_out.size))
        formats.add(found.format)
        modes.add(found.mode)
        turned += found.orientation != 1
    assert not wrong
    assert len(files) > 150
    assert len(formats) >= 5
    assert len(modes) >= 8
    assert turned >= 4


def test_opaque_pixels_are_those_of_datasets(files):
    compared = 0
    for file in files:
        if len(file["bytes"]) > 100_000:
            continue
        handed_out = ImageFeature().decode_example(file)
        if handed_out.mode not in {"RGB", "L", "1", "CMYK"} or handed_out.has_transparency_data:
            continue
        np.testing.assert_array_equal(decode(file["bytes"]), handed_out.convert("RGB"))
        compared += 1
    assert compared > 50
