"""How full and how fast packing is, on the seeded workloads, beside its targets.

python -m benchmarks.bench_pack                  measure, print, write benchmarks/results/pack.json
python -m benchmarks.bench_pack --quick          a tenth of the samples; prints only
python -m benchmarks.bench_pack --write-docs     put the tables of the last results into docs/performance.md
python -m benchmarks.plot_pack                   draw the last results into docs/images
pytest benchmarks/bench_pack.py                  the same calls as tests, on few samples

Speed is a multiple of `np.argsort(kind="stable")` of as many random int64, sorted in turn with the runs, so
that figures of different machines can be compared. All times are CPU times of one thread, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import pytest

from benchmarks.pack_tables import TARGETS, tables
from benchmarks.workloads import BUDGET, costs_of
from vlmpack.budget import UNLIMITED
from vlmpack.packing.bounds import lower_bounds
from vlmpack.packing.configuration_bound import configuration_bound
from vlmpack.packing.methods import METHODS
from vlmpack.packing.plan import PackPlan, plan
from vlmpack.packing.stream import StreamPacker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "pack.json"
DOCS = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- bench_pack: begin -->", "<!-- bench_pack: end -->"
BLOCK = 1_000_000
"""Larger data sets are draws of this size one after the other."""


def samples(workload: str, n: int) -> Int64s:
    """Return n samples; on text only the tokens, as whoever packs text would pass them."""
    blocks = [costs_of(workload, min(BLOCK, n - low), seed=low // BLOCK) for low in range(0, n, BLOCK)]
    costs = np.concatenate(blocks)
    return np.ascontiguousarray(costs[:, :1]) if workload == "text" else costs


def budget_of(costs: Int64s) -> Int64s:
    return BUDGET[: costs.shape[1]]


def cpu_time(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def sorter(n: int) -> Callable[[], object]:
    values = np.random.default_rng(0).integers(0, 1 << 62, n)
    return lambda: np.argsort(values, kind="stable")


def timed(call: Callable[[], object], n: int) -> dict[str, float]:
    """Return the median time of a call and of an argsort, run in turn."""
    runs = 9 if n <= 100_000 else 5 if n <= BLOCK else 3
    call()
    sort = sorter(n)
    pairs = [(cpu_time(call), cpu_time(sort)) for _ in range(runs)]
    seconds, sorting = ([pair[side] for pair in pairs] for side in (0, 1))
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "argsorts": statistics.median(seconds) / statistics.median(sorting),
        "million_a_second": n / statistics.median(seconds) / 1e6,
    }


def quality(made: PackPlan, costs: Int64s) -> dict[str, Any]:
    bounds = lower_bounds(costs, budget_of(costs))
    classic = max(*bounds.per_axis, *bounds.martello_toth)
    return {
        "chosen": made.method,
        "num_packs": made.num_packs,
        "classic_bound": classic,
        "best_bound": bounds.best,
        "over_classic": made.num_packs / classic,
        "over_best": made.num_packs / bounds.best,
        "packs_over_budget": int((made.loads > budget_of(costs)).any(axis=1).sum()),
    }


def peak_bytes(workload: str, method: str, n: int) -> int:
    """Return the memory that a plan works in: what it adds at its peak, less its result. Linux only.

    In a process of its own, where freed memory goes back to the system at once, after a plan that compiles.
    """
    code = f"""
from pathlib import Path
from benchmarks.bench_pack import budget_of, samples
from vlmpack.packing.plan import plan
costs = samples({workload!r}, {n})
plan(costs[:1000], budget_of(costs), method={method!r})
def read(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = read("VmRSS")
made = plan(costs, budget_of(costs), method={method!r})
print(read("VmHWM") - before - made.pack_ids.nbytes - made.loads.nbytes)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout)


def measure_targets(n: int) -> Iterator[dict[str, Any]]:
    for workload, method in dict.fromkeys((target.workload, target.method) for target in TARGETS):
        costs = samples(workload, n)

        def call(costs: Int64s = costs, method: str = method) -> PackPlan:
            return plan(costs, budget_of(costs), method=method)  # type: ignore[arg-type]

        row = {"workload": workload, "method": method, "n": n, **quality(call(), costs), **timed(call, n)}
        yield {**row, "peak_bytes": peak_bytes(workload, method, n)}


def measure_scaling(sizes: list[int]) -> Iterator[dict[str, Any]]:
    for workload, method in (
        ("text", "auto"),
        ("vlm_tiles", "fast"),
        ("vlm_tiles", "balanced"),
        ("vlm_tiles", "best"),
        ("vlm_tiles", "first_fit_decreasing"),
        ("vlm_tiles", "worst_fit_decreasing"),
    ):
        for n in sizes if method in {"auto", "fast", "balanced", "best"} else sizes[:-1]:
            costs = samples(workload, n)
            made = plan(costs, budget_of(costs), method=method)  # type: ignore[arg-type]
            over = made.num_packs / max(lower_bounds(costs, budget_of(costs)).per_axis)
            row = {"workload": workload, "method": method, "n": n, "over_classic": over}
            yield row | timed(lambda: plan(costs, budget_of(costs), method=method), n)  # noqa: B023


def measure_streams(n: int) -> Iterator[dict[str, Any]]:
    for workload in ("vlm_tiles", "anticorrelated", "text"):
        costs = samples(workload, n)
        for method in ("fast", "balanced", "best", "first_fit_decreasing", "worst_fit_decreasing"):
            for lookahead in (64, 256, 1024, 4096):
                packer = StreamPacker(budget_of(costs), lookahead=lookahead, method=method)  # type: ignore[arg-type]

                def call(packer: StreamPacker = packer, costs: Int64s = costs) -> None:
                    packer.push_many(costs)
                    packer.flush()

                call()  # compiles
                packer = StreamPacker(budget_of(costs), lookahead=lookahead, method=method)  # type: ignore[arg-type]
                seconds = cpu_time(lambda: call(packer))  # noqa: B023
                totals = costs.sum(axis=0) / (packer.num_packs * budget_of(costs))
                yield {
                    "workload": workload,
                    "method": method,
                    "lookahead": lookahead,
                    "n": n,
                    "fill": totals.tolist(),
                    "longest_wait_packs": packer.longest_wait,
                    "longest_delay_samples": packer.longest_delay,
                    "million_a_second": n / seconds / 1e6,
                }


def measure_push(n: int) -> dict[str, float]:
    """Return the speed of one `push` for each sample, which the interpreter decides."""
    costs = [tuple(cost) for cost in costs_of("vlm_tiles", n).tolist()]

    def call() -> None:
        packer = StreamPacker(BUDGET, lookahead=1024)
        for cost in costs:
            packer.push(cost)
        packer.flush()

    call()
    return {"n": n, "million_a_second": n / statistics.median(cpu_time(call) for _ in range(3)) / 1e6}


def measure_methods(n: int) -> Iterator[dict[str, Any]]:
    for workload in ("text", "vlm_tiles", "anticorrelated", "planted_half"):
        costs = samples(workload, n)
        for method in METHODS:
            made = plan(costs, budget_of(costs), method=method)
            row = {"workload": workload, "method": method, "n": n, **quality(made, costs)}
            yield row | timed(lambda: plan(costs, budget_of(costs), method=method), n)  # noqa: B023


def measure_balance(n: int) -> Iterator[dict[str, Any]]:
    costs = costs_of("vlm_tiles", n)
    for tokens in (4096, 16384):
        budget = [tokens, UNLIMITED, UNLIMITED]
        for balance in (None, "patches", "attention", "both"):
            made = plan(costs, budget, method="best", balance=balance)  # type: ignore[arg-type]
            attention = np.bincount(made.pack_ids, weights=costs[:, 0].astype(float) ** 2)
            spreads = [float(np.quantile(load, 0.95) / load.mean()) for load in (made.loads[:, 2], attention)]
            yield {
                "max_tokens": tokens,
                "balance": balance,
                "num_packs": made.num_packs,
                "patches_p95": spreads[0],
                "attention_p95": spreads[1],
            }


def measure_optimum(n: int, time_limit_s: float) -> Iterator[dict[str, Any]]:
    for workload in ("vlm_tiles", "anticorrelated"):
        costs = costs_of(workload, n)
        bound = configuration_bound(costs, BUDGET, time_limit_s=time_limit_s)
        cheap = lower_bounds(costs, BUDGET)
        yield {
            "workload": workload,
            "n": n,
            "l1": max(cheap.per_axis),
            "crossed": cheap.crossed,
            "configuration": bound.num_packs,
            "is_converged": bound.is_converged,
            "best": plan(costs, BUDGET, method="best").num_packs,
        }


def measure(n: int) -> dict[str, Any]:
    """Return all figures; `n` samples for the targets, and up to ten times as many for the exponent."""
    sizes = [n // 100, n // 10, n, 10 * n]
    scaling = list(measure_scaling(sizes))
    return {
        "machine": platform.processor() or platform.machine(),
        "cpu": cpu_name(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
        },
        "date": date.today().isoformat(),
        "targets": list(measure_targets(n)),
        "scaling": scaling,
        "streams": list(measure_streams(n // 10)),
        "push": measure_push(n // 10),
        "methods": list(measure_methods(n // 10)),
        "balance": list(measure_balance(n // 10)),
        "optimum": list(measure_optimum(n // 100, 90.0)),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write_docs(data: dict[str, Any]) -> None:
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    body = "\n".join([BEGIN, *tables(data), END])
    DOCS.write_text(before + body + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples; nothing is written")
    parser.add_argument("--write-docs", action="store_true", help="only renew docs/performance.md")
    arguments = parser.parse_args()
    if arguments.write_docs:
        write_docs(json.loads(RESULTS.read_text(encoding="utf-8")))
        return
    data = measure(BLOCK // 10 if arguments.quick else BLOCK)
    print("\n".join(tables(data)))
    if not arguments.quick:
        RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


# ---- the same as tests -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_plan(benchmark: Any, method: str) -> None:
    costs = costs_of("vlm_tiles", 10_000)
    made = benchmark(plan, costs, BUDGET, method=method)
    assert (made.loads <= BUDGET).all()


def test_one_axis(benchmark: Any) -> None:
    costs = samples("text", 100_000)
    made = benchmark(plan, costs, budget_of(costs))
    assert made.method == "best_fit_decreasing"


def test_argsort(benchmark: Any) -> None:
    assert benchmark(sorter(10_000)).size == 10_000


@pytest.mark.parametrize("method", ["balanced", "worst_fit_decreasing"])
def test_stream(benchmark: Any, method: str) -> None:
    costs = costs_of("vlm_tiles", 10_000)

    def stream() -> int:
        packer = StreamPacker(BUDGET, lookahead=256, method=method)  # type: ignore[arg-type]
        packer.push_many(costs)
        packer.flush()
        return packer.num_packs

    assert benchmark(stream) >= lower_bounds(costs, BUDGET).best


def test_tables_can_be_made_of_the_published_results() -> None:
    lines = tables(json.loads(RESULTS.read_text(encoding="utf-8")))
    assert sum(line.startswith("|") for line in lines) > 40


if __name__ == "__main__":
    main()
