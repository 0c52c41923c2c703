"""Draw the figures of docs/packing.md and docs/performance.md: python -m benchmarks.plot_pack.

Reads benchmarks/results/pack.json; the first picture is drawn from a plan made now.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("svg")
import matplotlib.pyplot as plt

from benchmarks.bench_pack import RESULTS
from benchmarks.pack_tables import STREAM_FILL
from benchmarks.workloads import BUDGET, costs_of
from vlmpack.packing.plan import plan

IMAGES = Path(__file__).parent.parent / "docs" / "images"
COLOURS = {
    "fast": "#7fb3d5",
    "balanced": "#1f77b4",
    "best": "#0b3c5d",
    "first_fit_decreasing": "#ff7f0e",
    "worst_fit_decreasing": "#d62728",
    "auto": "#2ca02c",
}


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def draw_filling() -> None:
    """Draw packs as paths of samples from nothing to the corner of the budget."""
    costs = costs_of("vlm_tiles", 4000)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True)
    for axis, method in zip(axes, ("first_fit_decreasing", "balanced"), strict=True):
        made = plan(costs, BUDGET, method=method)  # type: ignore[arg-type]
        for pack in made.as_lists()[:60]:
            path = np.cumsum([[0, 0, 0], *costs[pack].tolist()], axis=0)
            axis.plot(path[:, 0], path[:, 2], "-", color=COLOURS[method], alpha=0.25, linewidth=1)
            axis.plot(*path[-1, [0, 2]], "o", color=COLOURS[method], markersize=3)
        axis.axvline(BUDGET[0], color="black", linewidth=0.8)
        axis.axhline(BUDGET[2], color="black", linewidth=0.8)
        over = made.num_packs / made.lower_bound - 1
        axis.set(title=f"{method}: {100 * over:.1f} % above the bound", xlabel="tokens")
    axes[0].set_ylabel("tiles")
    save(figure, "packing_filling")


def draw_streams(data: dict[str, Any]) -> None:
    workloads = ("text", "vlm_tiles", "anticorrelated")
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4))
    for axis, workload in zip(axes, workloads, strict=True):
        rows = [row for row in data["streams"] if row["workload"] == workload]
        for method in dict.fromkeys(row["method"] for row in rows):
            points = [(row["lookahead"], 100 * row["fill"][0]) for row in rows if row["method"] == method]
            axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[method], label=method, markersize=4)
        axis.set(title=workload, xscale="log", xlabel="look-ahead, samples", xticks=[64, 256, 1024, 4096])
        axis.set_xticklabels(["64", "256", "1,024", "4,096"])
        axis.minorticks_off()
        for (name, _), fill in STREAM_FILL.items():
            if name == workload:
                axis.axhline(100 * fill, color="black", linewidth=0.6, linestyle=":")
    axes[0].set_ylabel("tokens filled, %")
    axes[2].legend(fontsize=7)
    save(figure, "packing_lookahead")


def draw_times(data: dict[str, Any]) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.8))
    rows = data["scaling"]
    for workload, method in dict.fromkeys((row["workload"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["workload"], row["method"]) == (workload, method)]
        points = [(row["n"], 1e9 * row["seconds"] / row["n"]) for row in mine]
        axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[method], label=f"{workload}, {method}")
    sorts = [(row["n"], 1e9 * row["seconds"] / row["argsorts"] / row["n"]) for row in rows]
    sizes = sorted({n for n, _ in sorts})
    medians = [float(np.median([value for m, value in sorts if m == n])) for n in sizes]
    axis.plot(sizes, medians, "k--", label="stable argsort of int64")
    axis.set(xscale="log", yscale="log", xlabel="samples", ylabel="ns a sample")
    axis.legend(fontsize=7)
    save(figure, "packing_time")


def draw_frontier(data: dict[str, Any]) -> None:
    """Draw packs against time for every method on the workload where two axes bind."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    rows = [row for row in data["methods"] if row["workload"] == "vlm_tiles" and row["method"] != "auto"]
    for row in rows:
        x, y = 1e9 * row["seconds"] / row["n"], 100 * (row["over_best"] - 1)
        axis.plot(x, y, "o", color=COLOURS.get(row["method"], "#888888"))
        axis.annotate(row["method"], (x, y), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axis.set(xscale="log", yscale="log", xlabel="ns a sample", ylabel="packs above the lower bound, %")
    axis.set_xlim(right=4 * max(1e9 * row["seconds"] / row["n"] for row in rows))
    save(figure, "packing_methods")


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "vlmpack"
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw_filling()
    draw_streams(data)
    draw_times(data)
    draw_frontier(data)


if __name__ == "__main__":
    main()
