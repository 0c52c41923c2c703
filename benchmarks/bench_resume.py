"""What resuming a stream costs: bytes of a position, rows that are read again, and time.

    python -m benchmarks.bench_resume        # the table, on the seeded workloads

Costs alone are packed, without tokenising: a row that is read again costs a run about 0.35 ms more.
"""

from __future__ import annotations

import json
import time
from itertools import islice
from statistics import median

import numpy as np
import pytest

from vlmpack.budget import SampleCost
from vlmpack.corpus import load_tokenizer
from vlmpack.geometry import Tiling
from vlmpack.packing import ConstantLengthDataset
from vlmpack.packing.workloads import MAX_IMAGES, MAX_TILES, MAX_TOKENS, costs_of
from vlmpack.samples import Sample

LOOKAHEADS = (256, 4096, 16384)


class Costs:
    """Samples that cost what a workload says and hold nothing else; each pass begins again."""

    def __init__(self, name: str, num_rows: int) -> None:
        self.tokenizer = load_tokenizer()
        self.tiling = Tiling()
        self.max_pixels = 1
        self._costs = costs_of(name, num_rows)
        self._row = 0

    def __iter__(self):
        while self._row < len(self._costs):
            tokens, images, tiles = self._costs[self._row].tolist()
            self._row += 1
            cost = SampleCost(num_tokens=tokens, num_images=images, num_patches=1024 * tiles)
            ids = np.zeros(tokens, np.int64)
            yield Sample(
                key=str(self._row),
                input_ids=ids,
                labels=ids,
                images=(),
                geometries=(),
                image_starts=(),
                cost=cost,
            )

    def retile(self, sample, _tiling):
        return sample

    def set_epoch(self, _epoch):
        self._row = 0

    def state_dict(self):
        return {"row": self._row}

    def load_state_dict(self, state):
        self._row = state["row"]


def packs_of(name: str, num_rows: int, lookahead: int) -> ConstantLengthDataset:
    return ConstantLengthDataset(
        Costs(name, num_rows),
        seq_length=MAX_TOKENS,
        max_images_per_knapsack=MAX_IMAGES,
        max_images_per_example=None,
        max_patches=1024 * MAX_TILES,
        max_sample_length=MAX_TOKENS + 1,
        lookahead=lookahead,
        num_of_sequences=1 << 20,
        append_pad=False,
        decode=False,
        decode_threads=0,
    )


def measure(name: str, lookahead: int, num_places: int = 12) -> dict[str, float]:
    """Stop a run at many places of its second half; return the largest figures and median times."""
    num_rows = 7 * lookahead + 2000
    sizes, replays, asked_s, resumed_s = [], [], [], []
    dataset = packs_of(name, num_rows, lookahead)
    num_packs = sum(1 for _ in packs_of(name, num_rows, lookahead))
    running = iter(dataset)
    at = num_packs // 2
    next(islice(running, at - 1, at))
    for _ in range(num_places):
        next(islice(running, max(num_packs // 2 // num_places - 1, 0), None), None)
        began = time.process_time()
        state = dataset.state_dict()
        asked_s.append(time.process_time() - began)
        if state["ended"]:
            break
        sizes.append(len(json.dumps(state)))
        again = packs_of(name, num_rows, lookahead)
        again.load_state_dict(state)
        began = time.process_time()
        next(iter(again), None)
        resumed_s.append(time.process_time() - began)
        replays.append(again.report.num_read - state["stretch"]["rows"][0])
    return {
        "bytes": max(sizes),
        "replay": max(replays) / lookahead,
        "asked_ms": 1e3 * median(asked_s),
        "resumed_ms": 1e3 * median(resumed_s),
        "packs": num_packs,
    }


@pytest.mark.parametrize("name", ["text", "vlm_tiles"])
def test_a_position_stays_small_and_the_way_back_short(name):
    figures = measure(name, 256, num_places=4)
    assert figures["bytes"] < 4096
    assert figures["replay"] < 8


def main() -> None:
    print(
        "| workload | look-ahead | bytes of a position | rows read again / look-ahead "
        "| asking, ms | first pack, ms |"
    )
    print("|---|---|---|---|---|---|")
    for name in ("text", "vlm_tiles"):
        for lookahead in LOOKAHEADS:
            figures = measure(name, lookahead)
            print(
                f"| {name} | {lookahead:,} | {figures['bytes']:,} | {figures['replay']:.1f} | "
                f"{figures['asked_ms']:.2f} | {figures['resumed_ms']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
