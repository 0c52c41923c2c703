"""The throughput table of docs/performance.md, from the figures of benchmarks/bench_pipeline.py."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.decode_tables import HASHING

PAGE: Final = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN: Final = "<!-- bench_decode: begin -->"
END: Final = "<!-- bench_decode: end -->"

ROWS: Final = (
    # what, key, must, aim, whether smaller is better, unit
    ("2048 rule, over the baseline", "2048 times", 12.0, 18.0, False, " x"),
    ("2048 rule, over the floor", "2048 over floor", 3.0, 2.3, True, " x"),
    ("rounded-up rule, over the baseline", "rounded up times", 8.0, 12.0, False, " x"),
    ("rounded-up rule, over the floor", "rounded up over floor", 2.5, 2.0, True, " x"),
    ("Pillow and torch alone, 2048 rule", "2048 alone", 8.0, 10.0, False, " x"),
    ("Pillow and torch alone, rounded-up rule", "rounded up alone", 5.0, 6.0, False, " x"),
    ("float32 drop-in output, slowest class", "float slowest", 4.0, 8.0, False, " x"),
    ("text, plan and pack without pixels, over the baseline", "text times", 20.0, 40.0, False, " x"),
    ("the same, a sample", "text ms", 0.4, 0.4, True, " ms"),
    ("main process, to receive a pack of 41 MB from a worker", "receive ms", 3.0, 1.0, True, " ms"),
    ("peak memory, look-ahead of 4,096 photographs of 92 kB", "photographs MB", 500.0, 250.0, True, " MB"),
    ("peak memory, look-ahead of 4,096 pictures of the mix", "mix MB", 500.0, 250.0, True, " MB"),
    ("the same, images waiting on disk (SpooledSamples)", "mix on disk MB", 500.0, 250.0, True, " MB"),
    ("largest difference of a grid tile, fast mode", "fast", 2.0, 2.0, True, " levels"),
    ("the same, shrinking more than eightfold", "fast, shrinking", 7.0, 2.0, True, " levels"),
    ("two decode threads over one, by the clock", "threads", 1.6, 1.6, False, " x"),
)


def ratios(figures: dict) -> dict[str, float]:
    """Return the figures that the targets are about, those that were measured."""
    found: dict[str, float] = {}
    for rule, whole in figures.get("pipelines", {}).items():
        found[f"{rule} times"] = whole["baseline"] / whole["exact"]
        found[f"{rule} over floor"] = whole["exact"] / whole["floor"]
        found[f"{rule} alone"] = whole["baseline"] / whole["alone"]
    if "classes" in figures:
        found["float slowest"] = min(
            v["baseline"] / v["float"] for of_class in figures["classes"].values() for v in of_class.values()
        )
    if "text" in figures:
        found["text times"] = figures["text"]["baseline"] / figures["text"]["ours"]
        found["text ms"] = figures["text"]["ours"]
    if "transfer" in figures:
        found["receive ms"] = figures["transfer"]["receive, shared"]
    for kind in ("photographs", "mix", "mix on disk"):
        if f"memory of {kind}" in figures:
            found[f"{kind} MB"] = figures[f"memory of {kind}"]["peak_mib"] * 2**20 / 1e6
    if "differences" in figures:
        found["fast"] = figures["differences"]["fast grid max"]
        found["fast, shrinking"] = figures["differences"]["fast grid max, shrinking"]
    if "threads" in figures:
        found["threads"] = figures["threads"]["threads"]
    return found


def table(results: dict) -> str:
    """Return the block: the latest figures, those of the run before, and what they are made of.

    A run may have measured some parts only; the others are of the run before.
    """
    runs = [{}, *(ratios(run) for run in results["runs"])]
    latest: dict = {}
    for run in results["runs"]:
        latest |= run
    lines = ["| | must | aim | measured | the run before | |", "|---|---|---|---|---|---|"]
    for what, key, must, aim, smaller, unit in ROWS:
        value = (runs[-2] | runs[-1])[key]
        good, aimed = ((value <= limit) if smaller else (value >= limit) for limit in (must, aim))
        mark = "" if aimed else ("short of the aim" if good else "**short**")
        before = _figure(runs[-2][key]) if key in runs[-1] and key in runs[-2] else ""
        lines.append(f"| {what} | {must:g} | {aim:g}{unit} | {_figure(value)} | {before} | {mark} |")
    lines += [
        "",
        "Float32 drop-in output over the baseline:",
        "",
        "| rule | " + " | ".join(next(iter(latest["classes"].values()))) + " |",
        "|---" * (1 + len(next(iter(latest["classes"].values())))) + "|",
    ]
    for rule, of_class in latest["classes"].items():
        values = (f"{v['baseline'] / v['float']:.1f} x" for v in of_class.values())
        lines.append(f"| {rule} | " + " | ".join(values) + " |")
    return "\n".join([*lines, "", _notes(latest)])


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _notes(run: dict) -> str:
    sent, threads = run["transfer"], run["threads"]
    samples = "; ".join(
        f"{rule}: baseline {v['baseline']:.1f}, here {v['exact']:.2f}, without extras {v['alone']:.2f}, "
        f"floor {v['floor']:.2f}"
        for rule, v in run["pipelines"].items()
    )
    held = " and ".join(
        f"{run[f'memory of {kind}']['compressed_mib']:.0f} MiB" for kind in ("photographs", "mix")
    )
    machine = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
    return (
        f"CPU milliseconds a sample, whole pipeline: {samples}.\n\n"
        f"A pack sent the usual way takes the main process {sent['receive, usual way']:.2f} ms, and "
        f"{sent['read, usual way']:.1f} ms to read it once; through shared slots "
        f"{sent['receive, shared']:.2f} ms and {sent['read, shared']:.1f}. The look-aheads' compressed files "
        f"are {held}. Two processors were free in {threads['rounds with two free processors']} rounds of the "
        f"threads' figure; two threads had {threads[HASHING]:.2f} of what hashing gains from two.\n\n"
        f"Measured with {machine}; load {run['load at the end']:.1f} at the end."
    )


def write_page(results: dict, page: Path = PAGE) -> None:
    """Put the table between the page's marks."""
    old = page.read_text(encoding="utf-8")
    head, rest = old.split(BEGIN)
    tail = rest.split(END)[1]
    page.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{tail}", encoding="utf-8")
