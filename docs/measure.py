"""Print the figures of docs/experiments.md: `python -m docs.measure`, from the repository's root.

Medians of CPU seconds, one thread, and the spread (largest - smallest) / median.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import re
import statistics
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.workloads import BUDGET, MAX_TOKENS, costs_of
from vlmpack import Sample, Tiling, VQADataset, add_image_tokens
from vlmpack.corpus import load_corpus, load_tokenizer
from vlmpack.geometry import resize_target
from vlmpack.images import MAX_PIXELS, decode, read_header, tile_image
from vlmpack.packing import StreamPacker

if TYPE_CHECKING:
    from collections.abc import Callable

TILING = Tiling()
IMAGE_BLOCK = re.compile(r"(<\|global_image\|>)(<\|image\|>){64}((<row_\d_col_\d>)(<\|image\|>){64})*")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def median_s(function: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median CPU seconds of `function()`, warmed once, and their spread."""
    function()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    middle = statistics.median(times)
    return middle, (max(times) - min(times)) / middle


def tiles_of(data: bytes) -> torch.Tensor:
    header = read_header(data)
    geometry = TILING.image(header.height, header.width)
    out = torch.empty((geometry.num_tiles, 3, TILING.tile_size, TILING.tile_size), dtype=torch.uint8)
    size = (header.height, header.width)
    tile_image(data, geometry, tile_size=TILING.tile_size, out=out, max_pixels=MAX_PIXELS, expected_size=size)
    return out


def headers() -> None:
    table = load_corpus().with_format("arrow")[:]
    files = [image["bytes"] for row in table["images"].to_pylist() for image in row]
    say(f"images: {len(files)}, {sum(map(len, files)) / 2**20:.2f} MiB compressed")
    say(f"  tiles of all of them: {sum(tiles_of(file).nbytes for file in files) / 2**20:.0f} MiB")
    for name, function, rounds in (
        ("header", lambda: [read_header(file) for file in files], 15),
        ("decode", lambda: [decode(file) for file in files], 5),
        ("decode, resize, tile", lambda: [tiles_of(file) for file in files], 3),
    ):
        median, spread = median_s(function, rounds)
        say(f"  {name}: {median / len(files) * 1e6:,.1f} us an image, spread {spread:.0%}")


def placeholders() -> None:
    tokenizer = load_tokenizer()
    add_image_tokens(tokenizer, TILING)
    samples = [item for item in VQADataset(load_corpus(), tokenizer) if isinstance(item, Sample)]
    whole = [tokenizer.decode(sample.input_ids) for sample in samples]
    short = [IMAGE_BLOCK.sub("<|image|>", text) for text in whole]

    def encode(texts: list[str]) -> list[np.ndarray]:
        backend = tokenizer.backend_tokenizer
        return [np.array(backend.encode(text, add_special_tokens=False).ids, np.int64) for text in texts]

    equal = sum(
        np.array_equal(ids, sample.input_ids) for ids, sample in zip(encode(whole), samples, strict=True)
    )
    say(f"samples: {len(samples)}; spliced ids equal those of the whole text in {equal}")
    for name, texts in (("whole text", whole), ("one token an image", short)):
        median, spread = median_s(lambda texts=texts: encode(texts), 7)
        tokens = sum(map(len, encode(texts)))
        say(f"  {name}: {tokens:,} tokens, {median / len(texts) * 1e6:.0f} us a sample, spread {spread:.0%}")


def exact_target(height: int, width: int, *, up: bool) -> tuple[int, int]:
    """Return what `resize_target` would be in exact integers."""
    tile, most = TILING.tile_size, TILING.max_side
    long, short = max(height, width), min(height, width)
    long_to = most if up else min(most, -(-long // tile) * tile)
    short_to = max(-(-short * long_to // (long * tile)) * tile, tile)
    return (short_to, long_to) if width >= height else (long_to, short_to)


def float_arithmetic(largest: int = 2500) -> None:
    for up in (True, False):
        differ = total = 0
        for width in range(1, largest + 1):
            for height in range(1, width + 1):
                total += 1
                differ += resize_target(
                    height,
                    width,
                    tile_size=TILING.tile_size,
                    max_side=TILING.max_side,
                    resize_to_max_side=up,
                ) != exact_target(height, width, up=up)
        say(f"sizes: {total:,}, resize_to_max_side={up}: float differs from exact in {differ}")


def spare_packs() -> None:
    for window in (8, 16, 32, 64, 128, 256):
        fills = []
        for delta in (0, 5):
            of_seeds = []
            for seed in range(5):
                costs = costs_of("vlm_tiles", 20_000, seed)
                packer = StreamPacker(
                    BUDGET,
                    lookahead=len(costs),
                    method="worst_fit_decreasing",
                    max_waiting_tokens=MAX_TOKENS * window,
                    delta=delta,
                )
                packs = sum(len(packer.push(cost)) for cost in costs.tolist()) + len(packer.flush())
                of_seeds.append(costs[:, 0].sum() / (packs * MAX_TOKENS))
            fills.append(statistics.median(of_seeds))
        say(f"buffer of {window} packs: token fill {fills[0]:.3f}, with 5 spare packs {fills[1]:.3f}")


def main() -> None:
    torch.set_num_threads(1)
    say(f"{time.strftime('%Y-%m-%d')} {platform.machine()} Python {platform.python_version()}")
    headers()
    placeholders()
    float_arithmetic()
    spare_packs()


if __name__ == "__main__":
    main()
