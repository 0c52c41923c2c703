"""How evenly the ranks of a step are loaded, before and after balancing, on the seeded workloads.

python -m benchmarks.bench_balance                measure, print, write benchmarks/results/balance.json
python -m benchmarks.bench_balance --quick        a tenth of the samples; prints only
python -m benchmarks.bench_balance --write-docs   put the tables of the last results into docs/ranks.md
python -m benchmarks.plot_balance                 draw docs/images/balance_steps.png
pytest benchmarks/bench_balance.py                the same calls as tests, on few samples

Ranks are simulated: loads follow from the plan. Times are CPU times of one thread, medians over windows.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np
import pytest

from benchmarks.bench_pack import cpu_name
from vlmpack.packing import plan
from vlmpack.packing.workloads import BUDGET, WORKLOADS, costs_of
from vlmpack.ranks import load_imbalance
from vlmpack.ranks.order import Balancing, Stage, epoch_order, even

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from vlmpack.ranks import Balance

    Int64s = npt.NDArray[np.int64]

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "balance.json"
DOCS = HERE.parent / "docs" / "ranks.md"
BEGIN, END = "<!-- bench_balance: begin -->", "<!-- bench_balance: end -->"
NUM_SAMPLES = 100_000
TARGET = 1.03
PATCHES_A_TILE = 1024
LOADS = ("patches", "attention")


class Shape(NamedTuple):
    """How steps are made."""

    world_size: int
    batch_size: int = 1
    window: int | None = None


SHAPES = (
    Shape(2),
    Shape(8, window=256),
    Shape(8),
    Shape(8, window=4096),
    Shape(8, batch_size=2),
    Shape(8, batch_size=4),
    Shape(32, window=1024),
    Shape(32),
    Shape(64, window=1024),
    Shape(64),
    Shape(64, batch_size=2),
)


@lru_cache
def planned(workload: str, num_samples: int) -> tuple[Int64s, Int64s]:
    """Return where each pack begins, and the loads of all samples before each place."""
    costs = costs_of(workload, num_samples)
    samples, starts = plan(costs, BUDGET).members()
    loads = np.stack([PATCHES_A_TILE * costs[samples, 2], costs[samples, 0] ** 2], axis=1)
    return starts, np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(loads, axis=0)])


class Epoch:
    """The packs of a workload in the order of an epoch.

    Args:
        workload: Its name.
        num_samples: To pack.
        balance: What is balanced.
        shape: How steps are made.
    """

    def __init__(self, workload: str, num_samples: int, balance: Balance | None, shape: Shape) -> None:
        starts, prefix = planned(workload, num_samples)
        self._order = Balancing(balance=balance, window=shape.window, seed=0, load_prefix=prefix)
        self._shape = shape
        spans = np.stack([starts[:-1], starts[1:]], axis=1)
        self._spans = even(epoch_order(spans, seed=0, epoch=0), shape.world_size)

    def loads(self) -> Int64s:
        """Return int64 [packs, 2], step by step."""
        self._seconds = []
        blocks, start = [], time.process_time()
        stage = Stage(self._shape.world_size, self._shape.batch_size, 0)
        for block in self._order.blocks(self._spans, stage, epoch=0):
            blocks.append(block)
            self._seconds.append((time.process_time() - start) * 1024 / len(block))
            start = time.process_time()
        return self._order.loads(np.concatenate(blocks))

    def seconds(self) -> float:
        """Return the CPU time for 1,024 packs in the latest pass, the median over its windows."""
        return statistics.median(self._seconds)

    def figures(self) -> dict[str, Any]:
        """Return the figures of the epoch, and the share of steps that stay over 1.1."""
        shape = self._shape
        found = load_imbalance(self.loads(), world_size=shape.world_size, batch_size=shape.batch_size)
        plain: dict[str, Any] = found.as_dict()
        for load in LOADS:
            plain[load]["over_1.1"] = float((getattr(found, load).per_step > 1.1).mean())
        return plain


def measure_targets(num_samples: int) -> Iterator[dict[str, Any]]:
    for workload in WORKLOADS:
        shape = Shape(8, window=1024)
        balanced = Epoch(workload, num_samples, "both", shape)
        yield {
            "workload": workload,
            "before": Epoch(workload, num_samples, None, shape).figures(),
            "after": balanced.figures(),
            "seconds": balanced.seconds(),
        }


def measure_shapes(num_samples: int) -> Iterator[dict[str, Any]]:
    for workload in ("vlm_tiles", "anticorrelated"):
        for shape in SHAPES:
            balanced = Epoch(workload, num_samples, "both", shape)
            yield {
                "workload": workload,
                **shape._asdict(),
                "before": Epoch(workload, num_samples, None, shape).figures(),
                "after": balanced.figures(),
                "seconds": balanced.seconds(),
            }


def measure_choices(num_samples: int) -> Iterator[dict[str, Any]]:
    for workload in ("vlm_tiles", "anticorrelated", "planted_half"):
        for balance in (None, "patches", "attention", "both"):
            yield {
                "workload": workload,
                "balance": balance,
                "figures": Epoch(workload, num_samples, balance, Shape(8)).figures(),  # type: ignore[arg-type]
            }


def measure(num_samples: int) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
        },
        "date": date.today().isoformat(),
        "num_samples": num_samples,
        "targets": list(measure_targets(num_samples)),
        "choices": list(measure_choices(num_samples)),
        "shapes": list(measure_shapes(num_samples)),
    }


def target_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| workload | load | random order: mean | balanced: mean | p95 | worst | run | steps over 1.1 | "
        f"at most {TARGET} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["targets"]:
        for load in LOADS:
            before, after = row["before"][load], row["after"][load]
            if before["worst"] == 1.0:
                continue  # a workload without images has no patches to balance
            lines.append(
                f"| {row['workload']} | {load} | {before['mean']:.3f} | {after['mean']:.3f} | "
                f"{after['p95']:.3f} | {after['worst']:.2f} | {after['total']:.3f} | "
                f"{100 * after['over_1.1']:.1f} % | {'yes' if after['mean'] <= TARGET else '**no**'} |"
            )
    return lines


def shape_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| workload | ranks | packs a batch | window | patches: random | balanced | run | "
        "attention: random | balanced | run | CPU time for 1,024 packs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["shapes"]:
        window = f"{row['window']:,}" if row["window"] else "default"
        cells = [f"{row[when][load]['mean']:.3f}" for load in LOADS for when in ("before", "after")]
        runs = [f"{row['after'][load]['total']:.3f}" for load in LOADS]
        cells = [*cells[:2], runs[0], *cells[2:], runs[1]]
        lines.append(
            f"| {row['workload']} | {row['world_size']} | {row['batch_size']} | {window} | "
            f"{' | '.join(cells)} | {1e3 * row['seconds']:.0f} ms |"
        )
    return lines


def choice_table(data: dict[str, Any]) -> list[str]:
    lines = ["| workload | `balance` | patches: mean | attention: mean |", "|---|---|---|---|"]
    for row in data["choices"]:
        cells = " | ".join(f"{row['figures'][load]['mean']:.3f}" for load in LOADS)
        lines.append(f"| {row['workload']} | `{row['balance']!r}` | {cells} |")
    return lines


def tables(data: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return [
        f"{data['num_samples']:,} samples of each workload; {data['cpu']}, {versions}, {data['date']}; "
        "`python -m benchmarks.bench_balance`.",
        "",
        "Eight ranks, a pack a rank, windows of 1,024 packs. Workloads without images have no patches.",
        "",
        *target_table(data),
        "",
        "Other shapes; means over steps, and the run:",
        "",
        *shape_table(data),
        "",
        "One load alone, or both, eight ranks:",
        "",
        *choice_table(data),
    ]


def write_docs(data: dict[str, Any]) -> None:
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    DOCS.write_text(before + "\n".join([BEGIN, "", *tables(data), "", END]) + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples; nothing is written")
    parser.add_argument("--write-docs", action="store_true", help="only renew docs/ranks.md")
    arguments = parser.parse_args()
    if arguments.write_docs:
        write_docs(json.loads(RESULTS.read_text(encoding="utf-8")))
        return
    data = measure(NUM_SAMPLES // 10 if arguments.quick else NUM_SAMPLES)
    print("\n".join(tables(data)))
    if not arguments.quick:
        RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


# ---- the same as tests -------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["vlm_tiles", "anticorrelated"])
def test_balance(benchmark: Any, workload: str) -> None:
    epoch = Epoch(workload, 10_000, "both", Shape(8, window=1024))
    before = Epoch(workload, 10_000, None, Shape(8)).figures()
    assert len(benchmark(epoch.loads)) > 1_000
    assert epoch.figures()["attention"]["mean"] < TARGET < before["attention"]["mean"]


def test_tables_are_those_of_the_published_results() -> None:
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert "\n".join(tables(data)) in DOCS.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
