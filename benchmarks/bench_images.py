"""Header parse and tiling of one 640 x 480 picture, each beside what Pillow alone would take.

python -m pytest benchmarks/bench_images.py --benchmark-enable -o python_files='bench_*.py'
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vlmpack.geometry import Tiling
from vlmpack.images import decode, empty_tiles, read_header, tile_image

torch.set_num_threads(1)


def photograph(file_format, **options):
    """Coarse colours under fine grain: about as hard to compress as a photograph."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), 3)
    pixels = np.asarray(coarse, np.int16) + rng.integers(-6, 7, (480, 640, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, file_format, **options)
    return file.getvalue()


FILES = {"jpeg": photograph("JPEG", quality=90), "png": photograph("PNG"), "webp": photograph("WEBP")}


@pytest.mark.parametrize("name", FILES)
def test_read_header(benchmark, name):
    benchmark.group = f"header {name}"
    assert benchmark(read_header, FILES[name]).width == 640


@pytest.mark.parametrize("name", FILES)
def test_pillow_open(benchmark, name):
    benchmark.group = f"header {name}"
    assert benchmark(lambda: Image.open(io.BytesIO(FILES[name])).size) == (640, 480)


@pytest.mark.parametrize("enlarge", [False, True], ids=["5 tiles", "13 tiles"])
def test_tile_image(benchmark, enlarge):
    benchmark.group = f"tiles enlarge={enlarge}"
    geometry = Tiling(resize_to_max_side=enlarge).image(480, 640)
    out = empty_tiles(geometry.num_tiles, 512)
    benchmark(tile_image, FILES["jpeg"], geometry, tile_size=512, out=out)


@pytest.mark.parametrize("enlarge", [False, True], ids=["5 tiles", "13 tiles"])
def test_pillow_decode_and_resize(benchmark, enlarge):
    """What a bit-equal result costs without kernels, before it is cut."""
    benchmark.group = f"tiles enlarge={enlarge}"
    geometry = Tiling(resize_to_max_side=enlarge).image(480, 640)
    size = (geometry.width, geometry.height)
    benchmark(lambda: decode(FILES["jpeg"]).resize(size, Image.Resampling.BICUBIC))
