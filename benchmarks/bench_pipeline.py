"""From rows to batches in another process: every row of the throughput table of docs/performance.md.

    python -m benchmarks.bench_pipeline [rounds]   writes results/pipeline.json and the table

The whole pipeline over the mix, the float tiles and the threads come from `benchmarks.bench_decode`; here are
text and plan without pixels, batches from a worker, and the memory of the look-ahead. CPU seconds, user and
system, medians over rounds in which all variants take turns; ratios within one run. As tests
(`pytest benchmarks --benchmark-disable`) each case runs once, on few rows.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from benchmarks import baseline_nanovlm, mix
from benchmarks.bench_decode import RULES, by_class, differences, machine, medians, pipelines, threads
from benchmarks.pipeline_tables import write_page
from vlmpack.budget import PackBudget
from vlmpack.corpus import load_corpus, load_tokenizer
from vlmpack.geometry import Tiling
from vlmpack.images import empty_tiles, read_header, warm_kernels
from vlmpack.packing import Assembler, ConstantLengthDataset
from vlmpack.samples import Sample
from vlmpack.stages import SpooledSamples, VQADataset, add_image_tokens
from vlmpack.stages.placeholders import IGNORE_INDEX
from vlmpack.transfer import SharedBatches

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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


def text_and_plan(rounds: int, scale: float = 1.0) -> dict[str, float]:
    """Return milliseconds a sample of everything but pixels, over the mix: the baseline's and ours."""
    rows = mix.rows(scale)
    tiling = RULES["2048"]
    tokenizer = load_tokenizer()
    add_image_tokens(tokenizer, tiling)
    prefix = baseline_nanovlm.prefix_length(tokenizer)
    grids = [[grid_of(file, tiling) for file in row["images"]] for row in rows]

    def reference() -> None:
        items = []
        for row, of_row in zip(rows, grids, strict=True):  # it knows the grids, having decoded every picture
            messages = [
                {"role": role, "content": turn[role]}
                for turn in row["texts"]
                for role in ("user", "assistant")
            ]
            messages[0]["content"] = baseline_nanovlm.image_string(of_row) + messages[0]["content"]
            ids, labels = baseline_nanovlm.ids_and_labels(tokenizer, messages, prefix)
            mask = torch.ones_like(ids)
            items.append({"input_ids": ids, "labels": labels, "attention_mask": mask, "images": []})
        kept = [item for item in items if len(item["input_ids"]) < 4096]
        lengths = [len(item["input_ids"]) for item in kept]
        for group in baseline_nanovlm.knapsack(lengths, [0] * len(kept), 4096, 18):
            baseline_nanovlm.packed([kept[i] for i in group], 4096)

    def ours() -> None:
        samples = VQADataset(rows, tokenizer, tiling=tiling)
        for _ in ConstantLengthDataset(samples, lookahead=256, decode=False, decode_threads=0):
            pass

    found = medians({"baseline": reference, "ours": ours}, rounds)
    return {name: value / len(rows) * 1e3 for name, value in found.items()}


def grid_of(file: bytes, tiling: Tiling) -> tuple[int, int]:
    header = read_header(file)
    grid = tiling.image(header.height, header.width).grid
    return grid.rows, grid.columns


class Packs(IterableDataset):
    """The same full pack of 52 tiles, over and over."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        row = {
            name: torch.zeros((1, 4096), dtype=torch.int64)
            for name in ("input_ids", "labels", "position_ids")
        }
        tiles = empty_tiles(52, 512).fill_(3)
        for _ in range(self.count):
            yield {**row, "tiles": tiles}


def first_of(batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return batches[0]


def transfer(count: int) -> dict[str, float]:
    """Return main-process milliseconds to receive a batch of one pack from a worker, and to read it then.

    Reading is copying its tiles into memory that was used before, as pinning does.
    """
    figures = {}
    warm = empty_tiles(52, 512).fill_(0)
    for name, collate in (("usual way", first_of), ("shared", SharedBatches(first_of))):
        batches = iter(DataLoader(Packs(count + 4), batch_size=1, collate_fn=collate, num_workers=1))
        receive, read = [], []
        for _ in range(count + 4):
            start = time.process_time()
            batch = next(batches)
            received = time.process_time()
            warm.copy_(batch["tiles"])
            done = time.process_time()
            del batch
            receive.append(received - start + time.process_time() - done)
            read.append(done - received)
        figures[f"receive, {name}"] = statistics.median(receive[4:]) * 1e3
        figures[f"read, {name}"] = statistics.median(read[4:]) * 1e3
    return figures


def resident_mib(which: str) -> float:
    """Return "VmRSS" or "VmHWM", the peak, of this process; getrusage's peak is inherited from the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def look_ahead_memory(num_rows: int, kind: str) -> dict[str, float]:
    """Return peak resident MiB over the start, and MiB of compressed images, for a full look-ahead.

    Args:
        num_rows: Samples in it.
        kind: "mix" for the mix at the 2048 rule, "mix on disk" for the same with images that wait there,
            "photographs" for 640 x 480, rounded up.
    """
    samples = corpus_samples(1)
    planned_packs(samples)  # compile the kernels, load the tokenizer
    warm_kernels()
    files = photographs(16) if kind == "photographs" else [f for row in mix.rows(0.25) for f in row["images"]]
    tiling = RULES["rounded up" if kind == "photographs" else "2048"]
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten

    def rows() -> Iterator[dict[str, object]]:
        for number in range(num_rows):
            # A copy with a comment behind the image's end: other bytes, as in a real data set.
            image = files[number % len(files)] + number.to_bytes(4, "little")
            yield {"images": [image], "texts": [{"user": "What is shown?", "assistant": "A photograph."}]}

    dataset = VQADataset(rows(), samples.tokenizer, tiling=tiling)
    waiting = SpooledSamples(dataset) if kind == "mix on disk" else dataset
    packs = ConstantLengthDataset(waiting, lookahead=num_rows, num_of_sequences=num_rows, queue_size=4)
    iterator = iter(packs)
    for _ in range(8):
        next(iterator, None)  # a few rows make fewer packs
    after = resident_mib("VmHWM")
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
    assert look_ahead_memory(64, "photographs")["compressed_mib"] > 0.5


@pytest.mark.slow
def test_the_rest_of_the_table_is_measured():
    figures = {"text": text_and_plan(1, 0.05), "transfer": transfer(2)}
    assert all(value > 0 for part in figures.values() for value in part.values())
    assert set(figures["transfer"]) >= {"receive, shared", "receive, usual way"}


def measured(rounds: int) -> dict:
    """Return all figures."""
    figures: dict = {"machine": machine(), "pipelines": pipelines(rounds)}
    figures["classes"] = by_class(rounds, 2, ("baseline", "float"))
    figures["text"] = text_and_plan(2 * rounds + 1)
    figures["transfer"] = transfer(40)
    for kind in ("photographs", "mix", "mix on disk"):
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.bench_pipeline", "memory", kind],
            check=True,
            capture_output=True,
            text=True,
        )
        figures[f"memory of {kind}"] = json.loads(child.stdout)
    figures["differences"] = differences(2)
    figures["threads"] = threads(rounds, 4 * rounds)
    figures["join"] = join_figures()
    figures["load at the end"] = os.getloadavg()[0]
    return figures


def join_figures() -> dict[str, float]:
    """Return milliseconds to join the token ids of a pack, and as the reference pipeline does it."""
    pack = full_pack(corpus_samples())
    join_s = median_cpu_s(lambda: [assembler()(pack) for _ in range(20)]) / 20
    return {"ours": join_s * 1e3, "as lists": median_cpu_s(lambda: join_with_lists(pack)) * 1e3}


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["memory"]:
        print(json.dumps(look_ahead_memory(4096, sys.argv[2])))
        return
    if sys.argv[1:2] == ["write"]:
        write_page(json.loads(RESULTS.read_text()))
        return
    figures = measured(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    runs = json.loads(RESULTS.read_text()).get("runs", []) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps({"runs": [*runs, figures][-2:]}, indent=1) + "\n")
    write_page(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
