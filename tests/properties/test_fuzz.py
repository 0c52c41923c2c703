"""Records broken at random: no hang, no crash, and counts that add up."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from tests.fakes import jpeg, packs_of, picture, png, png_promising, row
from vlmpack.errors import REASONS

pytestmark = pytest.mark.timeout(900)

ODD: list[Any] = [
    None, True, -1, 10**30, 1.5, float("nan"), "", "x" * 20_000, "\ud800", b"", b"\x00" * 50, [], [[]], {},
    {"bytes": 3}, {"bytes": None, "path": "../../etc/passwd"}, ("a",), object(), np.zeros((0, 3)),
    np.zeros((4, 4, 3), np.uint8), png_promising(60_000, 60_000), png_promising(0, 5),
    png_promising(2**31 - 1, 1), range(3), lambda: None, int, "<image>" * 3, "<|image|>",
    "data:image/png;base64,AAAA", "/dev/zero", "a\x00b",
]  # fmt: skip
"""Values where something else should be: other types, absurd sizes, near misses."""

SEEDS = [
    row("What is it?", "A cat.", images=[jpeg(70, 40)]),
    row("Which?", "This.", images=[png(33, 64), png(20, 20, mode="P")]),
    row("No picture", "None."),
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
                  {"role": "assistant", "content": "Yes."}], "images": [jpeg(40, 90)]},
    {"conversations": [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "Ho"}],
     "image": png(50, 30)},
    row("Opened", "Yes.", images=[picture(30, 30)]),
]  # fmt: skip


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, cut the end off, double a stretch, or put zeros into a file."""
    if not data:
        return data
    values = bytearray(data)
    match int(rng.integers(4)):
        case 0:
            for at in rng.integers(0, len(values), int(rng.integers(1, 12))).tolist():
                values[at] ^= 1 << int(rng.integers(8))
        case 1:
            del values[int(rng.integers(len(values))) :]
        case 2:
            start = int(rng.integers(len(values)))
            values[start:start] = values[start : start + int(rng.integers(1, 400))]
        case _:
            start = int(rng.integers(len(values)))
            stop = min(start + int(rng.integers(1, 60)), len(values))
            values[start:stop] = bytes(stop - start)
    return bytes(values)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the way to each value inside a row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for name, item in inner for place in places(item, (*path, name)))]


def value_at(value: Any, place: tuple) -> Any:
    """Return the value that a way leads to."""
    for name in place:
        value = value[name]
    return value


def fuzzed(rng: np.random.Generator) -> Any:
    """Return a row of which something was changed, as often as not beyond recognition."""
    whole = [copy.deepcopy(SEEDS[int(rng.integers(len(SEEDS)))])]
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        every = places(whole)[1:]
        files = [place for place in every if isinstance(value_at(whole, place), bytes)]
        every = files if files and rng.random() < 0.7 else every
        *way, last = every[int(rng.integers(len(every)))]
        holder = value_at(whole, tuple(way))
        value = holder[last]
        if isinstance(value, bytes) and rng.random() < 0.8:
            holder[last] = flipped(value, rng)
        elif isinstance(holder, dict) and rng.random() < 0.2:
            holder[f"{last}s"] = holder.pop(last)
        elif isinstance(value, list) and rng.random() < 0.3:
            holder[last] = value * int(rng.integers(0, 8))
        else:
            holder[last] = copy.deepcopy(ODD[int(rng.integers(len(ODD)))])
    return whole[0]


def run(num_rows: int, seed: int) -> tuple[int, int]:
    """Pack fuzzed rows; return how many were packed and refused."""
    rng = np.random.default_rng(seed)
    rows = [fuzzed(rng) for _ in range(num_rows)]
    rows[0] = SEEDS[2]  # a pass without a single pack is an error of its own
    dataset = packs_of(
        rows, seq_length=300, lookahead=64, oversize=("drop", "fewer_tiles", "truncate_text")[seed % 3]
    )
    packed: list[str] = []
    for pack in dataset:
        assert not dataset.budget.exceeded_by(pack.cost)
        assert len(pack.tiles) == sum(pack.tiles_per_image)
        packed += pack.keys
    report = dataset.report
    assert len(set(packed)) == len(packed) == report.num_packed
    assert report.num_read == num_rows == report.num_packed + report.total_refused
    assert set(report.num_refused) <= set(REASONS)
    assert not {refusal.key for refusal in report.refusals} & set(packed)
    return report.num_packed, report.total_refused


@pytest.mark.parametrize("seed", range(3))
def test_fuzzed_rows_are_packed_or_refused(seed):
    num_packed, num_refused = run(200, seed)
    assert num_packed > 10, "some were harmed little"
    assert num_refused > 50, "most were harmed"


@pytest.mark.slow
def test_ten_thousand_of_them():
    outcomes = [run(1000, seed) for seed in range(100, 110)]
    assert sum(map(sum, outcomes)) == 10_000
