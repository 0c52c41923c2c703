"""What planning costs before any pixel, what the look-ahead holds, and what joining a pack costs.

    python -m benchmarks.bench_pipeline            prints the table and writes results/pipeline.json

As tests (`pytest benchmarks --benchmark-disable`) each case runs once, on few rows.
"""

from __future__ import annotations

import io
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vlmpack.budget import PackBudget
from vlmpack.corpus import load_corpus, load_tokenizer
from vlmpack.geometry import Tiling
from vlmpack.packing import Assembler, ConstantLengthDataset
from vlmpack.samples import Sample
from vlmpack.stages import VQADataset, add_image_tokens
from vlmpack.stages.placeholders import IGNORE_INDEX

RESULTS = Path(__file__).parent / "results" / "pipeline.json"
ROUNDS = 7


def corpus_samples(rows: int | None = None) -> VQADataset:
    """Return the shipped corpus as samples, default tiling."""
    tokenizer = load_tokenizer()
    add_image_tokens(tokenizer, Tiling())
    dataset = load_corpus()
    return VQADataset(dataset if rows is None else dataset.select(range(rows)), tokenizer)


def photographs(count: int) -> list[bytes]:
    """Return 640 x 480 JPEG files at quality 90 of the most detailed photograph of the corpus."""

    def as_jpeg(image) -> bytes:
        file = io.BytesIO()
        image.resize((640, 480)).save(file, "JPEG", quality=90)
        return file.getvalue()

    photos = [
        image
        for row in load_corpus()
        for image in row["images"]
        if image.format == "JPEG" and image.mode == "RGB" and min(image.size) >= 400
    ]
    detailed = max(photos, key=lambda image: len(as_jpeg(image)))
    rng, (width, height) = np.random.default_rng(0), detailed.size
    corners = [(int(rng.integers(0, width // 8)), int(rng.integers(0, height // 8))) for _ in range(count)]
    return [as_jpeg(detailed.crop((x, y, x + width * 7 // 8, y + height * 7 // 8))) for x, y in corners]


def join_with_lists(samples: list[Sample]) -> torch.Tensor:
    """Join token ids as the reference pipeline does: a list of 0-d tensors, then stack."""
    joined: list[torch.Tensor] = []
    for sample in samples:
        joined.extend(torch.from_numpy(sample.input_ids))
    return torch.stack(joined)


def assembler() -> Assembler:
    """Return an assembler that joins without pixels."""
    return Assembler(
        budget=PackBudget(max_tokens=4096),
        tile_size=512,
        pad_token_id=0,
        append_pad=True,
        max_pixels=1 << 26,
        decode=False,
    )


def full_pack(dataset: VQADataset) -> list[Sample]:
    """Return samples that fill 4,096 tokens as far as they go in order."""
    chosen, used = [], 0
    for item in dataset:
        if isinstance(item, Sample) and used + item.cost.num_tokens + 1 <= 4096:
            chosen.append(item)
            used += item.cost.num_tokens + 1
    return chosen


def median_cpu_s(function, rounds: int = ROUNDS) -> float:
    """Return the median CPU seconds of `function()`, warmed once."""
    function()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def planned_packs(samples: VQADataset, lookahead: int = 4096) -> int:
    """Plan and join packs without decoding; return their number."""
    packs = ConstantLengthDataset(
        samples, max_patches=48 * 1024, lookahead=lookahead, decode=False, decode_threads=0
    )
    return sum(1 for _ in packs)


def look_ahead_memory(num_rows: int) -> dict[str, float]:
    """Return peak resident MiB over the start, and MiB of compressed images, for a full look-ahead."""
    samples = corpus_samples(1)
    planned_packs(samples)  # compile the kernels, load the tokenizer
    files = photographs(16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def rows():
        for number in range(num_rows):
            # A copy with a comment behind the image's end: other bytes, as in a real data set.
            image = files[number % len(files)] + number.to_bytes(4, "little")
            yield {"images": [image], "texts": [{"user": "What is shown?", "assistant": "A photograph."}]}

    dataset = VQADataset(rows(), samples.tokenizer)
    packs = ConstantLengthDataset(
        dataset, lookahead=num_rows, num_of_sequences=num_rows, max_patches=48 * 1024, queue_size=4
    )
    iterator = iter(packs)
    for _ in range(8):
        next(iterator)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    iterator.close()
    held = sum(len(files[number % len(files)]) for number in range(num_rows)) / 2**20
    return {"peak_mib": after - before, "compressed_mib": held}


def test_plan_without_pixels(benchmark):
    samples = corpus_samples(24)
    assert benchmark(planned_packs, samples) >= 1


def test_join_a_pack(benchmark):
    samples = full_pack(corpus_samples(40))
    pack, refusals = benchmark(assembler(), samples)
    assert not refusals
    real = pack.input_ids[pack.segment_ids != 0]
    assert torch.equal(real, join_with_lists(samples))
    assert (pack.labels != IGNORE_INDEX).any()


def test_look_ahead_memory_is_measured():
    figures = look_ahead_memory(64)
    assert figures["compressed_mib"] > 0.5


def main() -> None:
    if sys.argv[1:] == ["memory"]:
        print(json.dumps(look_ahead_memory(4096)))
        return
    torch.set_num_threads(1)
    samples = corpus_samples()
    num_rows = len(load_corpus())
    plan_s = median_cpu_s(lambda: planned_packs(samples)) / num_rows
    tokenise_s = median_cpu_s(lambda: list(samples)) / num_rows
    pack = full_pack(samples)
    join_s = median_cpu_s(lambda: [assembler()(pack) for _ in range(20)]) / 20
    lists_s = median_cpu_s(lambda: join_with_lists(pack))
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_pipeline", "memory"],
        check=True,
        capture_output=True,
        text=True,
    )
    memory = json.loads(child.stdout)
    figures = {
        "samples_per_cpu_s_rows_to_plan": 1 / plan_s,
        "samples_per_cpu_s_rows_to_samples": 1 / tokenise_s,
        "join_pack_ms": join_s * 1e3,
        "join_pack_as_lists_ms": lists_s * 1e3,
        "lists_over_join": lists_s / join_s,
        "look_ahead_4096_peak_mib": memory["peak_mib"],
        "look_ahead_4096_compressed_mib": memory["compressed_mib"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for name, value in figures.items():
        print(f"{name:40s} {value:,.2f}" if isinstance(value, float) else f"{name:40s} {value}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
