"""How close batch-size searches come to the largest size that fits, and after how many tries.

python -m benchmarks.bench_search                print the table, write its results and its page
python -m benchmarks.bench_search --worlds 200   fewer worlds; prints only
pytest benchmarks/bench_search.py                the same on a few worlds
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.search_worlds import (
    CAP,
    KINDS,
    LIMIT,
    Score,
    Search,
    accelerate,
    lightning_binsearch,
    lightning_power,
    make_world,
    nemo,
    play,
)
from vlmpack.batching.search_rules import DocumentedRule, GuidedRule, Rule, Trial, bounds

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "search.json"
DOCS = HERE.parent / "docs" / "batch_size_search.md"
BEGIN, END = "<!-- bench_search: begin -->", "<!-- bench_search: end -->"
GOALS = {"worlds_at_98": 0.98, "mean_probes": 4.5, "max_probes": 8, "mean_ooms": 1.6}
CALIBRATED_PROBES = 3.1


def by_rule(rule: Rule) -> Search:
    """Return the search that follows a rule, without log, ranks and files."""

    def search(probe: Any, start: int) -> int:
        trials: list[Trial] = []
        while (size := rule.next_size(trials, start, CAP)) is not None:
            peak = probe(size)
            trials.append(Trial(size, peak is not None, None if peak is None else int(peak)))
        return bounds(trials, CAP)[0]

    return search


SEARCHES: dict[str, Search] = {
    "guided": by_rule(GuidedRule(limit_bytes=LIMIT)),
    "documented": by_rule(DocumentedRule()),
    "accelerate, x 0.9": accelerate,
    "Lightning, power": lightning_power,
    "Lightning, binsearch": lightning_binsearch,
    "NeMo OOMptimizer": nemo,
}


def scores(name: str, factor: float, num_worlds: int, seed: int = 0) -> dict[str, list[Score]]:
    """Return the scores by kind of world; every search meets the same worlds and starts."""
    rng = np.random.default_rng([seed, int(100 * factor)])
    found: dict[str, list[Score]] = {kind: [] for kind in KINDS}
    for index in range(num_worlds):
        kind = KINDS[index % len(KINDS)]
        world = make_world(rng, kind)
        error = math.exp(rng.uniform(-math.log(factor), math.log(factor)))
        static = world.static * math.exp(rng.uniform(-0.05, 0.05))
        start = max(1, round(world.largest * error))
        if name == "guided, calibrated":
            search = by_rule(GuidedRule(limit_bytes=LIMIT, static_bytes=static))
        else:
            search = SEARCHES[name]
        found[kind].append(play(world, search, start))
    return found


def summary(name: str, factor: float, num_worlds: int) -> dict[str, Any]:
    by_kind = scores(name, factor, num_worlds)
    all_scores = [score for each in by_kind.values() for score in each]
    shares, probes, ooms = (np.array([score[field] for score in all_scores]) for field in range(3))
    return {
        "search": name,
        "start_wrong_by": factor,
        "worlds": len(all_scores),
        "worlds_at_98": float(np.mean(shares >= 0.98)),
        "worst_kind_at_98": min(float(np.mean([s.share >= 0.98 for s in each])) for each in by_kind.values()),
        "mean_share": float(shares.mean()),
        "mean_probes": float(probes.mean()),
        "max_probes": int(probes.max()),
        "mean_ooms": float(ooms.mean()),
    }


def measure(num_worlds: int) -> list[dict[str, Any]]:
    rows = [summary(name, factor, num_worlds) for factor in (2.0, 4.0) for name in SEARCHES]
    return [*rows, summary("guided, calibrated", 1.05, num_worlds)]


def meets(row: dict[str, Any]) -> bool:
    """Return whether a row meets the goals; a calibrated start has fewer tries."""
    most = CALIBRATED_PROBES if row["search"] == "guided, calibrated" else GOALS["mean_probes"]
    return bool(
        row["worlds_at_98"] >= GOALS["worlds_at_98"]
        and row["mean_probes"] <= most
        and row["max_probes"] <= GOALS["max_probes"]
        and row["mean_ooms"] <= GOALS["mean_ooms"]
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{rows[0]['worlds']:,} worlds a row; goals: 98 % of the largest size in 98 % of the worlds, 4.5 "
        "tries on average (3.1 from a calibrated model), 8 at most, 1.6 of them OOM.",
        "",
        "| start wrong by up to | search | worlds with 98 % of the largest size | worst kind | mean share | "
        "tries, mean | most | OOM, mean | all goals |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wrong = f"x {row['start_wrong_by']:g}" if row["start_wrong_by"] >= 2 else "5 %"
        lines.append(
            f"| {wrong} | {row['search']} | {row['worlds_at_98']:.1%} | {row['worst_kind_at_98']:.1%} | "
            f"{row['mean_share']:.3f} | {row['mean_probes']:.1f} | {row['max_probes']} | "
            f"{row['mean_ooms']:.1f} | {'yes' if meets(row) else 'no'} |"
        )
    return lines


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--worlds", type=int, default=1000)
    arguments = parser.parse_args()
    logging.disable()
    rows = measure(arguments.worlds)
    print("\n".join(table(rows)))
    if arguments.worlds < 1000:
        return
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    DOCS.write_text("\n".join([before + BEGIN, *table(rows), END + rest.split(END)[1]]), encoding="utf-8")


# ---- the same as tests -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SEARCHES, "guided, calibrated"])
def test_search(benchmark: Any, name: str) -> None:
    found = benchmark(scores, name, 2.0, 40)
    assert sum(len(each) for each in found.values()) == 40


if __name__ == "__main__":
    main()
