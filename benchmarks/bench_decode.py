"""From compressed pictures to tiles: against the reference pipeline, against the floor, and part by part.

    python -m benchmarks.bench_decode [rounds]   writes results/decode.json and the tables of docs/images.md

CPU seconds of one thread, user and system, medians over rounds in which all variants take turns, so that a
busy machine slows all of them. The floor is the fastest decoder at hand and one write of the tiles' bytes
into warm memory. As tests (`pytest benchmarks --benchmark-disable`) each part runs once, on few pictures.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final
from unittest import mock

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import baseline_nanovlm, mix
from benchmarks.decode_tables import HASHING, PAGE, tables, write_page
from vlmpack.corpus import load_tokenizer
from vlmpack.geometry import Tiling
from vlmpack.images import accelerate, empty_tiles, read_header, tile_image, to_float
from vlmpack.images.pixels import read_picture
from vlmpack.images.resample import resize
from vlmpack.packing import ConstantLengthDataset
from vlmpack.stages import VQADataset, add_image_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RESULTS: Final = Path(__file__).parent / "results" / "decode.json"
RULES: Final = {"2048": Tiling(resize_to_max_side=True), "rounded up": Tiling()}
"""Every picture's longer side becomes 2048, as nanoVLM ships it; or the next multiple of the tile."""


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def medians(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return each variant's median CPU seconds, warmed once; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()  # a collection takes longer than a picture, and would hit whoever is at it
    try:
        for turn in range(rounds + 1):
            for name, function in variants.items():
                start = cpu_s()
                function()
                if turn:
                    times[name].append(cpu_s() - start)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def without_extras() -> Iterator[None]:
    """Run as if simplejpeg and deflate were not installed."""
    with mock.patch.object(accelerate, "module", lambda name: np if name == "numba" else None):
        yield


def tiled(file: bytes, tiling: Tiling, mode: str = "exact") -> torch.Tensor:
    header = read_header(file)
    geometry = tiling.image(header.height, header.width)
    return tile_image(file, geometry, tile_size=tiling.tile_size, mode=mode)


def alone(files: list[bytes], tiling: Tiling) -> None:
    with without_extras():
        for file in files:
            tiled(file, tiling)


def floor(files: list[bytes], tiling: Tiling, memory: torch.Tensor) -> None:
    """The fastest decoder, and one write of the tiles."""
    for file in files:
        picture = read_picture(file)
        geometry = tiling.image(picture.height, picture.width)
        memory[: geometry.num_tiles].fill_(7)


def by_class(rounds: int, count: int, only: tuple[str, ...] = ()) -> dict[str, dict[str, dict[str, float]]]:
    """Return milliseconds a picture: rule -> class -> variant, all of them or some."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    memory = empty_tiles(17, 512)
    for rule, tiling in RULES.items():
        figures[rule] = {}
        for name in mix.SHARES:
            files = mix.pictures(name, count)

            def reference(files: list[bytes] = files, tiling: Tiling = tiling) -> None:
                for file in files:
                    baseline_nanovlm.tiles_of(file, 512, 2048, tiling.resize_to_max_side)

            def ours(mode: str, files: list[bytes] = files, tiling: Tiling = tiling) -> None:
                for file in files:
                    tiled(file, tiling, mode)

            def as_float(files: list[bytes] = files, tiling: Tiling = tiling) -> None:
                for file in files:
                    to_float(tiled(file, tiling))

            variants = {
                "baseline": reference,
                "exact": lambda ours=ours: ours("exact"),
                "fast": lambda ours=ours: ours("fast"),
                "alone": lambda files=files, tiling=tiling: alone(files, tiling),
                "float": as_float,
                "floor": lambda files=files, tiling=tiling: floor(files, tiling, memory),
            }
            found = medians({key: variants[key] for key in only or variants}, rounds)
            figures[rule][name] = {key: value / count * 1e3 for key, value in found.items()}
    return figures


def pipelines(rounds: int, scale: float = 1.0) -> dict[str, dict[str, float]]:
    """Return milliseconds a sample of whole pipelines, rows to packs: rule -> variant."""
    rows = mix.rows(scale)
    figures = {}
    memory = empty_tiles(17, 512)
    for rule, tiling in RULES.items():
        tokenizer = load_tokenizer()
        add_image_tokens(tokenizer, tiling)
        files = [file for row in rows for file in row["images"]]

        def ours(tiling: Tiling = tiling, tokenizer=tokenizer) -> None:
            samples = VQADataset(rows, tokenizer, tiling=tiling)
            for _ in ConstantLengthDataset(samples, lookahead=256, decode_threads=0):
                pass

        def ours_alone(ours=ours) -> None:
            with without_extras():
                ours()

        def reference(tiling: Tiling = tiling, tokenizer=tokenizer) -> None:
            for _ in baseline_nanovlm.packs(rows, tokenizer, to_largest=tiling.resize_to_max_side):
                pass

        found = medians(
            {
                "baseline": reference,
                "exact": ours,
                "alone": ours_alone,
                "floor": lambda files=files, tiling=tiling: floor(files, tiling, memory),
            },
            rounds,
        )
        figures[rule] = {key: value / len(rows) * 1e3 for key, value in found.items()}
    return figures


def resizes(rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of one resize, ours and those that lost: sizes -> variant."""
    figures = {}
    whole = Image.open(io.BytesIO(mix.pictures("photo 4000x3000", 1)[0])).convert("RGB")
    for size, target in (
        ((640, 480), (2048, 1536)),
        ((1920, 1080), (2048, 1536)),
        ((4000, 3000), (2048, 1536)),
        ((4000, 3000), (512, 512)),
    ):
        image = whole.resize(size)
        pixels = np.asarray(image).copy()
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        warm = torch.empty((1, *target[::-1], 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        variants = {
            "Pillow": lambda image=image, target=target: image.resize(target, Image.Resampling.BICUBIC),
            "torch, uint8": lambda batch=batch, target=target: F.interpolate(
                batch, target[::-1], mode="bicubic", antialias=True
            ),
            "torch, float32": lambda batch=batch, target=target: F.interpolate(
                batch.float(), target[::-1], mode="bicubic", antialias=True
            ),
            "kernels": lambda pixels=pixels, target=target: resize(pixels, target[::-1], height_first=False),
        }
        operator = torch.ops.aten._upsample_bicubic2d_aa
        if "out" in operator.overloads():
            variants["torch, uint8, into warm memory"] = (
                lambda batch=batch, warm=warm, target=target, operator=operator: operator.out(
                    batch, list(target[::-1]), False, None, None, out=warm
                )
            )
        found = medians(variants, rounds)
        key = f"{size[0]}x{size[1]} to {target[0]}x{target[1]}"
        figures[key] = {name: value * 1e3 for name, value in found.items()}
    return figures


def differences(count: int) -> dict[str, float]:
    """Return levels between fast and exact tiles, and between exact ones and Pillow's, over the mix."""
    grid = beyond = whole = mean = pillow = 0.0
    for name in mix.SHARES:
        for file in mix.pictures(name, count):
            for tiling in (*RULES.values(), Tiling(max_side=512), Tiling(max_side=256, tile_size=256)):
                header = read_header(file)
                geometry = tiling.image(header.height, header.width)
                exact, fast = tiled(file, tiling).int(), tiled(file, tiling, "fast").int()
                apart = (exact - fast).abs()
                own = int(geometry.has_global_tile)
                shrinks = min(header.height / geometry.height, header.width / geometry.width) > 8
                grid = max(grid, 0.0 if shrinks else apart[own:].max().item())
                beyond = max(beyond, apart[own:].max().item() if shrinks else 0.0)
                if own:
                    whole = max(whole, apart[0].max().item())
                    mean = max(mean, apart[0].float().mean().item())
                image = Image.open(io.BytesIO(file))
                if image.mode == "RGB":
                    resized = image.resize((geometry.width, geometry.height), Image.Resampling.BICUBIC)
                    cut = torch.from_numpy(np.array(resized)).view(
                        geometry.grid.rows, tiling.tile_size, geometry.grid.columns, tiling.tile_size, 3
                    )
                    cut = cut.permute(0, 2, 4, 1, 3).flatten(0, 1).int()
                    pillow = max(pillow, (exact[own:] - cut).abs().max().item())
    return {
        "fast grid max": grid,
        "fast grid max, shrinking": beyond,
        "fast global max": whole,
        "fast global mean": mean,
        "exact grid from Pillow": pillow,
    }


def scaling(function: Callable[[bytes], object], files: list[bytes]) -> float:
    """Return how much sooner two threads are through with the files than one, by the clock."""

    def elapsed(num: int) -> float:
        with ThreadPoolExecutor(num) as pool:
            list(pool.map(function, files[:4]))  # each thread's scratch
            start = time.perf_counter()
            list(pool.map(function, files))
            return time.perf_counter() - start

    return elapsed(1) / elapsed(2)


def threads(rounds: int, patience: int) -> dict[str, float]:
    """Return what two decode threads gain while two processors are free.

    Free they are if hashing, which needs neither the interpreter's lock nor memory, gains at least 1.8 before
    and after. Where that never happens, all rounds count, and the share of hashing's gain says more.
    """
    files = mix.pictures("photo 1024x768", 8) * 2
    blocks = [bytes(8 << 20)] * 16
    found: list[tuple[float, float, bool]] = []
    for _ in range(patience):
        before = scaling(lambda block: hashlib.sha256(block).digest(), blocks)
        gain = scaling(lambda file: tiled(file, RULES["2048"]), files)
        after = scaling(lambda block: hashlib.sha256(block).digest(), blocks)
        found.append((gain, gain * 2 / (before + after), min(before, after) >= 1.8))
        if sum(free for *_, free in found) >= rounds:
            break
    free = [entry for entry in found if entry[2]]
    return {
        "threads": statistics.median(gain for gain, *_ in free or found),
        HASHING: statistics.median(share for _, share, _ in free or found),
        "rounds with two free processors": len(free),
        "load": os.getloadavg()[0],
    }


def faults(count: int) -> dict[str, float]:
    """Return fresh pages a picture of 640 x 480, 2048 rule."""
    files = mix.pictures("photo 640x480", count)

    def pages(function: Callable[[bytes], object]) -> float:
        function(files[0])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for file in files:
            function(file)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / count

    return {
        "pages baseline": pages(lambda file: baseline_nanovlm.tiles_of(file, 512, 2048, True)),
        "pages exact": pages(lambda file: tiled(file, RULES["2048"])),
    }


def ratios(figures: dict) -> dict[str, float]:
    """Return what the targets are about."""
    found = {**figures["differences"], **figures["threads"]}
    for rule, of_class in figures["classes"].items():
        shares = mix.SHARES
        total = {
            key: sum(share * of_class[name][key] for name, share in shares.items())
            for key in ("baseline", "exact", "fast", "alone", "floor")
        }
        found[f"images {rule} times"] = total["baseline"] / total["exact"]
        found[f"images {rule} fast times"] = total["baseline"] / total["fast"]
        found[f"images {rule} over floor"] = total["exact"] / total["floor"]
        found[f"images {rule} fast over floor"] = total["fast"] / total["floor"]
        found[f"images {rule} alone times"] = total["baseline"] / total["alone"]
        whole = figures["pipelines"][rule]
        found[f"mix {rule} times"] = whole["baseline"] / whole["exact"]
        found[f"mix {rule} over floor"] = whole["exact"] / whole["floor"]
        found[f"mix {rule} alone times"] = whole["baseline"] / whole["alone"]
    found["float slowest times"] = min(
        values["baseline"] / values["float"]
        for of_class in figures["classes"].values()
        for values in of_class.values()
    )
    return found


def machine() -> dict[str, str]:
    versions = {name: version or "none" for name, version in accelerate.accelerators().items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.machine() + " " + torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        **versions,
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors",
    }


def measure(rounds: int, count: int, scale: float, patience: int) -> dict:
    figures: dict = {"machine": machine()}
    figures["classes"] = by_class(rounds, count)
    figures["pipelines"] = pipelines(max(rounds // 2, 1), scale)
    figures["resizes"] = resizes(rounds)
    figures["differences"] = differences(count)
    figures["threads"] = threads(rounds, patience)
    figures["faults"] = faults(count)
    figures["ratios"] = ratios(figures)
    return figures


def main() -> None:
    torch.set_num_threads(1)
    figures = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 9, 4, 1.0, 40)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    write_page(tables(figures))
    print(tables(figures))


@pytest.mark.slow
def test_every_part_runs_and_fills_the_page(tmp_path):
    figures = measure(1, 1, 0.05, 1)
    assert all(
        value > 0
        for of_class in figures["classes"].values()
        for v in of_class.values()
        for value in v.values()
    )
    assert figures["differences"]["exact grid from Pillow"] == 0
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    write_page(tables(figures), page)
    written = page.read_text(encoding="utf-8")
    assert written.count("| must | aim | measured |") == 1
    write_page(tables(figures), page)
    assert page.read_text(encoding="utf-8") == written


if __name__ == "__main__":
    main()
