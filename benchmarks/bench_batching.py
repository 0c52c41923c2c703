"""The goals of the batch-size control, each measured against its target.

python -m benchmarks.bench_batching           measure, print; write results/batching.json, docs/batching.md
python -m benchmarks.bench_batching --quick   a tenth of it; prints only
pytest benchmarks/bench_batching.py           the quick one as a test
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from benchmarks.bench_pack import cpu_name

if TYPE_CHECKING:
    from benchmarks.goal_rows import Row

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "batching.json"
DOCS = HERE.parent / "docs" / "batching.md"
BEGIN, END = "<!-- bench_batching: begin -->", "<!-- bench_batching: end -->"


def measure(*, quick: bool) -> list[Row]:
    """Return all rows, in the order of the goals; rows without a goal stay behind the one they compare to."""
    logging.disable()
    try:
        found = list(import_module("benchmarks.recovery_goals").rows(quick=quick))
        if (HERE / "batching_goals.py").exists():
            found += import_module("benchmarks.batching_goals").rows()
    finally:
        logging.disable(logging.NOTSET)
    numbered, number = [], 0.0
    for at, each in enumerate(found):
        number = float(each["goal"][1:]) if each["goal"] else number
        numbered.append((number, at, each))
    return [each for _, _, each in sorted(numbered, key=lambda item: item[:2])]


def table(rows: list[Row]) -> list[str]:
    lines = ["| goal | what | target | measured | met |", "|---|---|---|---|---|"]
    for each in rows:
        met = ("yes" if each["met"] else "**no**") if each["goal"] else ""
        lines.append(f"| {each['goal']} | {each['what']} | {each['target']} | {each['measured']} | {met} |")
    return lines


def machine() -> str:
    return (
        f"{cpu_name()}, one thread; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {date.today().isoformat()}; "
        "`python -m benchmarks.bench_batching`."
    )


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(quick=arguments.quick)
    print("\n".join(table(rows)))
    if arguments.quick:
        return
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    text = "\n".join([before + BEGIN, *table(rows), "", machine(), END + rest.split(END)[1]])
    DOCS.write_text(text, encoding="utf-8")


@pytest.mark.timeout(600)
def test_goals(benchmark: Any) -> None:
    rows = benchmark.pedantic(measure, kwargs={"quick": True}, rounds=1)
    assert {row["goal"] for row in rows} >= {"G5", "G6", "G7", "G9", "G11", "G12", "G15"}
    # times and fills of a tenth of the data prove nothing; what must never fail does not depend on size
    assert all(row["met"] for row in rows if row["goal"] in {"G5", "G6", "G7", "G12"})


if __name__ == "__main__":
    main()
