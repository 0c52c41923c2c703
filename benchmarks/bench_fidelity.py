"""Training on packs against training on samples, family by family; and our tiles against the processors'.

    python -m benchmarks.bench_fidelity        # measures, writes results/fidelity.json and docs/fidelity.md

Isolation: tiny random models of the real classes, float32, on a CPU. Tiles: each family's published sizes,
on photographs of common sizes; process time of one thread, median of several runs of both in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from benchmarks.fidelity_tables import PAGE, TARGET, page_with
from tests.emulated_flash import emulated
from tests.family_comparison import compare
from tests.family_models import FAMILIES, PLANS
from tests.family_processors import DEFAULTS, image_processor_of
from vlmpack.images import empty_tiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmpack.families import Family

RESULTS = Path(__file__).parent / "results" / "fidelity.json"
KERNELS = ("eager", "sdpa", "flash")
SIZES = ((480, 640), (427, 640), (640, 480), (500, 375), (768, 1024))
"""(height, width) of common photographs."""


def unisolated(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch as the reference pipeline gives it: positions that go on, and a mask of no padding."""
    rows, length = batch["input_ids"].shape
    left_out = ("cu_seq", "max_length", "segment_ids")
    kept = {name: value for name, value in batch.items() if not name.startswith(left_out)}
    if "targets" in batch:  # nanoVLM makes its positions itself
        return kept | {"attention_mask": torch.ones(rows, length, dtype=torch.int64)}
    return kept | {
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        "position_ids": torch.arange(length).expand(rows, length),
    }


def isolation(name: str, kernel: str, plan: str) -> dict[str, Any]:
    """Return the differences of one case, packed by us and as the reference pipeline packs."""
    with emulated() if kernel == "flash" else nullcontext():
        ours = compare(name, kernel, PLANS[plan])
        theirs = compare(name, kernel, PLANS[plan], change=unisolated)
    return {
        "family": name,
        "kernel": kernel,
        "shape": plan,
        **{f"ours_{key}": getattr(ours, key) for key in ("logits", "loss", "gradients")},
        **{f"unisolated_{key}": getattr(theirs, key) for key in ("logits", "loss", "gradients")},
    }


def kernels_of(family: Family) -> tuple[str, ...]:
    """Return the attention implementations that can isolate a family."""
    if not family.is_transformers:
        return ("sdpa",)
    return KERNELS[:2] if family.needs_masks else KERNELS


def photograph(height: int, width: int) -> Image.Image:
    """Return a smooth picture with some noise; content matters little to the time of a resize."""
    rng = np.random.default_rng(height)
    small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def ours_of(family: Family, picture: Image.Image) -> torch.Tensor:
    """Return uint8 tiles: what a pack holds."""
    (geometry,) = family.sample([(picture.height, picture.width)])
    tiles = empty_tiles(geometry.num_tiles, family.tile_size)
    family.cut(picture, geometry, tiles.permute(0, 2, 3, 1).numpy())
    return tiles


def theirs_of(family: Family) -> Callable[[Image.Image], Any]:
    """Return the family's own image processor, which gives normalised floats."""
    processor = image_processor_of(family)
    return lambda picture: processor([[picture]] if family.name in {"idefics3", "smolvlm"} else [picture])


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def tiles(name: str, rounds: int = 5) -> dict[str, Any]:
    """Return the largest difference of a pixel, and the times, of one family."""
    family = DEFAULTS[name]
    processor = theirs_of(family)
    pictures = [photograph(*size) for size in SIZES]
    worst = 0.0
    for picture in pictures:
        theirs = torch.from_numpy(np.asarray(processor(picture)["pixel_values"], np.float32))
        mine = ours_of(family, picture)
        if name.startswith("qwen"):
            mine = mine.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1)
        mine = family.normalise(mine, torch.float32)
        worst = max(worst, float((mine.flatten() - theirs.flatten()).abs().max()) * min(family.image_std))
    times: dict[str, list[float]] = {"ours": [], "ours_float": [], "theirs": []}
    for _ in range(rounds):
        for picture in pictures:
            times["ours"].append(seconds(lambda picture=picture: ours_of(family, picture)))
            times["ours_float"].append(
                seconds(lambda picture=picture: family.normalise(ours_of(family, picture), torch.float32))
            )
            times["theirs"].append(seconds(lambda picture=picture: processor(picture)))
    return {
        "family": name,
        "levels": round(worst * 255),
        "rest": worst,
        **{f"{key}_ms": 1e3 * statistics.median(values) for key, values in times.items()},
    }


def measure() -> dict[str, Any]:
    """Return everything that the page shows."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [
            isolation(name, kernel, plan)
            for name, family in FAMILIES.items()
            for kernel in kernels_of(family)
            for plan in PLANS
        ]
        processors = [tiles(name) for name in DEFAULTS]
    versions = {name: version(name) for name in ("torch", "transformers", "pillow")}
    return {
        "machine": platform.processor() or platform.machine(),
        **versions,
        "isolation": cases,
        "tiles": processors,
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_case_of_the_table(kernel):
    case = isolation("smolvlm", kernel, "2 rows")
    assert max(case[f"ours_{key}"] for key in ("logits", "loss", "gradients")) <= TARGET
    assert case["unisolated_logits"] > 0.5


def test_the_published_page_shows_the_published_figures():
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert page_with(data, PAGE.read_text(encoding="utf-8")) == PAGE.read_text(encoding="utf-8")
    assert {case["family"] for case in data["isolation"]} == set(FAMILIES)


@pytest.mark.parametrize("name", DEFAULTS)
def test_tiles_of_a_photograph(benchmark, name):
    tiles_N = benchmark(ours_of, DEFAULTS[name], photograph(480, 640))
    assert len(tiles_N) == DEFAULTS[name].image(480, 640).num_tiles


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", action="store_true", help="only write the page from the stored results")
    if not parser.parse_args().pages:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page_with(data, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
