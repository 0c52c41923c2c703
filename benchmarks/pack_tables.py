"""The targets of packing, and the tables of what `bench_pack` measured."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from vlmpack.packing.methods import METHODS


class Target(NamedTuple):
    """What a method should reach on a workload with a million samples."""

    workload: str
    method: str
    packs: float
    """Packs over the larger of L1 and L2, at most."""
    argsorts: float
    """Multiples of a stable argsort, at most."""


TARGETS = (
    Target("text", "auto", 1.001, 0.15),
    Target("vlm_tiles", "fast", 1.020, 5),
    Target("vlm_tiles", "balanced", 1.011, 9),
    Target("vlm_tiles", "balanced", 1.008, 5),
    Target("vlm_tiles", "best", 1.009, 20),
    Target("anticorrelated", "balanced", 1.025, 12),
    Target("anticorrelated", "best", 1.018, 20),
    Target("planted_half", "balanced", 1.002, 5),
    Target("planted_half", "auto", 1.002, 30),
    Target("over_half", "balanced", 1.000, 30),
)
STREAM_FILL = {  # of tokens, over the whole stream, flush included
    ("vlm_tiles", "balanced"): 0.989,
    ("vlm_tiles", "best"): 0.991,
    ("text", "balanced"): 0.9997,
}


def exponent(rows: list[dict[str, Any]]) -> float:
    """Return the slope of log time over log n."""
    logs = np.log([[row["n"], row["seconds"]] for row in rows])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def target_table(data: dict[str, Any]) -> list[str]:
    measured = {(row["workload"], row["method"]): row for row in data["targets"]}
    lines = [
        "| workload | method | packs / max(L1, L2) | target | packs / best bound | x argsort | target | "
        "million a second | working memory | packs over a budget | met |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        row = measured[target.workload, target.method]
        met = row["over_classic"] <= target.packs and row["argsorts"] <= target.argsorts
        lines.append(
            f"| {target.workload} | {target.method} | {row['over_classic']:.4f} | {target.packs:.3f} | "
            f"{row['over_best']:.4f} | {row['argsorts']:.2f} | {target.argsorts:g} | "
            f"{row['million_a_second']:.1f} | {row['peak_bytes'] / 2**20:.0f} MiB | "
            f"{row['packs_over_budget']} | {'yes' if met else '**no**'} |"
        )
    return lines


def scaling_table(data: dict[str, Any]) -> list[str]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in data["scaling"]:
        groups.setdefault((row["workload"], row["method"]), []).append(row)
    sizes = sorted({row["n"] for row in data["scaling"]})
    lines = [
        "| workload | method | "
        + " | ".join(f"{n:.0e}".replace("e+0", "e") for n in sizes)
        + " | exponent | from 1e5 on |",
        "|---|---|" + "---|" * (len(sizes) + 2),
    ]
    for (workload, method), rows in groups.items():
        times = {row["n"]: f"{1e9 * row['seconds'] / row['n']:.0f} ns" for row in rows}
        cells = " | ".join(times.get(n, "") for n in sizes)
        late = exponent([row for row in rows if row["n"] > sizes[0]])
        lines.append(f"| {workload} | {method} | {cells} | {exponent(rows):.2f} | {late:.2f} |")
    return lines


def stream_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| workload | method | 64 | 256 | 1,024 | 4,096 | target | longest wait at 256, packs | samples | "
        "million a second at 256 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in data["streams"]:
        groups.setdefault((row["workload"], row["method"]), {})[row["lookahead"]] = row
    for key, rows in groups.items():
        fills = " | ".join(f"{100 * rows[lookahead]['fill'][0]:.2f} %" for lookahead in sorted(rows))
        target = f"{100 * STREAM_FILL[key]:.2f} %" if key in STREAM_FILL else ""
        wait, delay = rows[256]["longest_wait_packs"], rows[256]["longest_delay_samples"]
        speed = rows[256]["million_a_second"]
        lines.append(f"| {key[0]} | {key[1]} | {fills} | {target} | {wait} | {delay} | {speed:.1f} |")
    push = data["push"]["million_a_second"]
    return [*lines, "", f"One `push` a sample takes {push:.2f} million a second, whatever the method."]


def method_table(data: dict[str, Any]) -> list[str]:
    workloads = list(dict.fromkeys(row["workload"] for row in data["methods"]))
    lines = [
        "| method | " + " | ".join(f"{name}: packs / bound, ns" for name in workloads) + " |",
        "|---|" + "---|" * len(workloads),
    ]
    for method in METHODS:
        rows = [row for row in data["methods"] if row["method"] == method]
        cells = [f"{row['over_best']:.4f}, {1e9 * row['seconds'] / row['n']:.0f}" for row in rows]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def balance_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| tokens | balance | packs | patches a pack, p95 / mean | attention a pack, p95 / mean |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['max_tokens']:,} | {row['balance'] or 'no'} | {row['num_packs']:,} | "
        f"{row['patches_p95']:.3f} | {row['attention_p95']:.3f} |"
        for row in data["balance"]
    ]
    return lines


def optimum_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| workload | samples | L1 | crossed | configurations | packs by `best` | above the best bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["optimum"]:
        known = max(row["l1"], row["crossed"], row["configuration"])
        more = "" if row["is_converged"] else " (stopped)"
        lines.append(
            f"| {row['workload']} | {row['n']:,} | {row['l1']:,} | {row['crossed']:,} | "
            f"{row['configuration']:,}{more} | {row['best']:,} | {100 * (row['best'] / known - 1):.2f} % |"
        )
    return lines


def tables(data: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    parts = (
        ("Targets, one million samples", target_table(data)),
        ("Time a sample, and how it grows", scaling_table(data)),
        ("Streams: tokens filled over the whole stream, by look-ahead", stream_table(data)),
        ("Every method, 100,000 samples", method_table(data)),
        ("What balance costs", balance_table(data)),
        ("How far from the optimum", optimum_table(data)),
    )
    lines = [
        f"Measured on {data['date']}, {data['cpu']}, one thread, {versions}.",
        "`python -m benchmarks.bench_pack` makes these tables; `benchmarks/results/pack.json` has all runs.",
    ]
    for title, table in parts:
        lines += ["", f"### {title}", "", *table]
    return lines
