"""What index, plan and prepack cost a row, and from it what a billion rows would take.

    python -m benchmarks.bench_offline            prints, writes results/offline.json and docs/scale.md
    python -m benchmarks.bench_offline --quick    fewer rows; prints only
    pytest benchmarks/bench_offline.py            each step once, on few rows

Rows are 640 x 480 JPEG photographs with a short text, as Parquet. CPU times of one process, medians; copying
is reading every row of the same files and writing its columns again.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.bench_pipeline import photographs
from benchmarks.workloads import costs_of
from vlmpack.offline import Engine, PlanSettings, build_index, build_plan, prepack
from vlmpack.offline.files import SourceFile
from vlmpack.offline.index import SCHEMA, Index, IndexedFile

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "offline.json"
DOCS = HERE.parent / "docs" / "scale.md"
BEGIN, END = "<!-- bench_offline: begin -->", "<!-- bench_offline: end -->"
ALONE = Engine(num_workers=0)
DOLLARS_A_CORE_HOUR = 0.04
"""A core of a rented machine without an accelerator, about, in 2026."""
BILLION = 1_000_000_000


def write_rows(folder: Path, num_rows: int, num_files: int) -> None:
    """Write Parquet files of photographs with a short question and answer."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = photographs(64)
    for number in range(num_files):
        rows = [
            {
                "images": [{"bytes": pictures[(number + row) % len(pictures)], "path": None}],
                "texts": [{"user": f"What is shown in picture {row}?", "assistant": "A cat, looking away."}],
            }
            for row in range(num_rows // num_files)
        ]
        # A dictionary would keep each of the few pictures once, and make reading a row cheaper than it is.
        pq.write_table(
            pa.Table.from_pylist(rows),
            folder / f"{number:04d}.parquet",
            row_group_size=100,  # what `datasets` writes for images
            use_dictionary=False,
            compression="none",
        )


def cpu(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def copy(source: Path, out: Path) -> None:
    """Read every row group of the files and write it again, uncompressed, as prepack stores images."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.parquet")):
        with (
            pq.ParquetFile(path) as file,
            pq.ParquetWriter(
                out / path.name, file.schema_arrow, compression="none", use_dictionary=False
            ) as writer,
        ):
            for group in range(file.num_row_groups):
                writer.write_table(file.read_row_group(group))


def measure_rows(num_rows: int, rounds: int) -> dict[str, float]:
    """Return CPU seconds a row of index, prepack and copying, interleaved, and what a process spends first.

    The index loads its tokenizer before the first row: that is measured on four rows, and taken off.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_rows(root / "corpus", num_rows, 4)
        write_rows(root / "few", 4, 4)
        warm_index = build_index(root / "corpus", root / "warm", engine=ALONE)
        warm = build_plan(warm_index, root / "plan", PlanSettings(group_bytes=0))
        prepack(warm, root / "warm-packs", engine=ALONE)
        times: dict[str, list[float]] = {"start": [], "index": [], "prepack": [], "copy": []}
        for round_number in range(rounds):
            index, packed, copied = (root / f"{name}{round_number}" for name in ("index", "packed", "copied"))
            times["start"].append(cpu(lambda index=index: build_index(root / "few", index, engine=ALONE)))  # type: ignore[misc]
            shutil.rmtree(index)
            times["index"].append(cpu(lambda index=index: build_index(root / "corpus", index, engine=ALONE)))  # type: ignore[misc]
            plan = build_plan(index, root / "plan", PlanSettings(group_bytes=0))
            times["prepack"].append(cpu(lambda plan=plan, packed=packed: prepack(plan, packed, engine=ALONE)))  # type: ignore[misc]
            times["copy"].append(cpu(lambda copied=copied: copy(root / "corpus", copied)))  # type: ignore[misc]
            for each in (index, packed, copied):
                shutil.rmtree(each)
        size = sum(path.stat().st_size for path in (root / "corpus").iterdir())
        start, index, prepacked, copied = (statistics.median(values) for values in times.values())
        return {
            "start": start,
            "index": max(index - start, 0.0) / num_rows,
            "prepack": prepacked / num_rows,
            "copy": copied / num_rows,
            "bytes_a_row": size / num_rows,
        }


def measure_pool(num_rows: int, num_names: int) -> dict[str, float]:
    """Return the wall seconds that one process and two take to index `num_names` times `num_rows` rows."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_rows(root / "corpus", num_rows, 8)
        for path in list((root / "corpus").iterdir()):
            for number in range(1, num_names):  # the same file under more names: rows without disk space
                (root / "corpus" / f"{path.stem}-{number}.parquet").hardlink_to(path)
        seconds = {"rows": float(num_rows * num_names)}
        for workers in (1, 2):
            start = time.monotonic()
            build_index(root / "corpus", root / f"index{workers}", engine=Engine(num_workers=workers))
            seconds[f"workers_{workers}"] = time.monotonic() - start
        return seconds


def indexed_costs(folder: Path, num_rows: int, num_files: int) -> Index:
    """Write an index of the seeded workload vlm_tiles, without its corpus."""
    from vlmpack.offline.settings import IndexSettings

    (folder / "parts").mkdir(parents=True)
    block = costs_of("vlm_tiles", min(num_rows // num_files, 1_000_000))
    files = []
    for number in range(num_files):
        columns: dict[str, Any] = {
            name: pa.nulls(len(block), field.type) for name, field in zip(SCHEMA.names, SCHEMA, strict=True)
        }
        columns["row"] = np.arange(len(block))
        for axis, name in enumerate(("tokens", "images", "patches")):
            columns[name] = pa.array(np.roll(block[:, axis], number), SCHEMA.field(name).type)
        pq.write_table(pa.Table.from_pydict(columns, schema=SCHEMA), folder / "parts" / f"{number}.parquet")
        files.append(
            IndexedFile(
                file=SourceFile(name=f"{number}.parquet", size=1, digest=str(number)),
                part=f"{number}.parquet",
                rows=len(block),
                refused={},
            )
        )
    return Index(
        folder=folder,
        corpus=folder,
        settings=IndexSettings(),
        fingerprint={},
        pad_token_id=0,
        files=tuple(files),
    )


def measure_plan(num_rows: int) -> dict[str, float]:
    """Return CPU seconds and peak memory of planning, all at once; reading and writing included."""
    with tempfile.TemporaryDirectory() as folder:
        index = indexed_costs(Path(folder) / "index", num_rows, 10)
        settings = PlanSettings(max_images=18, max_patches=48, append_pad=False, group_bytes=0)
        warm = indexed_costs(Path(folder) / "warm", 10_000, 10)
        build_plan(warm, Path(folder) / "warm-plan", settings)
        seconds = cpu(lambda: build_plan(index, Path(folder) / "plan", settings))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"rows": num_rows, "seconds": seconds, "peak_gib": peak / 2**30}


def table(data: dict[str, Any]) -> list[str]:
    rows, plans = data["rows"], data["plans"]
    lines = [
        f"Measured on {data['date']}, {data['machine']}, Python {data['python']}; rows of "
        f"{rows['bytes_a_row'] / 1000:.0f} kB.",
        "",
        "| phase | CPU a row | rows a CPU second | grows with | 1 billion rows, core hours | dollars |",
        "|---|---|---|---|---|---|",
    ]
    per_row = {
        "index": (rows["index"], "rows"),
        "plan": (plans[-1]["seconds"] / plans[-1]["rows"], "rows"),
        "prepack": (rows["prepack"], "bytes"),
    }
    for name, (seconds, grows) in per_row.items():
        hours = seconds * BILLION / 3600
        lines.append(
            f"| {name} | {1e6 * seconds:,.1f} us | {1 / seconds:,.0f} | {grows} | {hours:,.1f} | "
            f"{hours * DOLLARS_A_CORE_HOUR:,.2f} |"
        )
    over_copy, each = rows["prepack"] / rows["copy"], 1e6 * rows["copy"]
    gain = data["pool"]["workers_1"] / data["pool"]["workers_2"]
    lines += [
        "",
        f"Before its first row, a process that indexes spends {rows['start']:.2f} s, most on its tokenizer.",
        f"Prepack takes {over_copy:.2f} times the CPU of copying the rows ({each:.1f} us a row, "
        f"target 1.5). Two processes index {data['pool']['rows']:,.0f} rows {gain:.2f} times as "
        f"fast as one, in wall time, start-up included (load {data['load']:.1f} at the time; target 1.6).",
        "",
        "| rows planned at once | CPU | a row | peak memory of the process |",
        "|---|---|---|---|",
    ]
    for plan in plans:
        nanoseconds = 1e9 * plan["seconds"] / plan["rows"]
        lines.append(
            f"| {plan['rows']:,} | {plan['seconds']:.1f} s | {nanoseconds:,.0f} ns | "
            f"{plan['peak_gib']:.2f} GiB |"
        )
    return lines


def measure(*, quick: bool) -> dict[str, Any]:
    import os

    sizes = [100_000] if quick else [100_000, 1_000_000, 10_000_000]
    return {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "rows": measure_rows(400 if quick else 4000, 1 if quick else 7),
        "pool": measure_pool(400 if quick else 4000, 1 if quick else 24),
        "plans": [measure_plan(size) for size in sizes],
    }


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    data = measure(quick=arguments.quick)
    print("\n".join(table(data)))
    if arguments.quick:
        return
    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    DOCS.write_text("\n".join([before + BEGIN, *table(data), END + rest.split(END)[1]]), encoding="utf-8")


# ---- the same as tests -------------------------------------------------------------------------


def test_each_step_runs_on_few_rows() -> None:
    measured = measure_rows(40, 1)
    assert min(measured["start"], measured["prepack"], measured["copy"], measured["bytes_a_row"]) > 0


def test_a_plan_of_an_index_without_its_corpus() -> None:
    assert measure_plan(1000)["seconds"] > 0


if __name__ == "__main__":
    main()
