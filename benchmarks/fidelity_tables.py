"""The tables of docs/fidelity.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "fidelity.md"
TARGET = 1e-5
"""Packed and separate differ by no more, in float32."""
WHAT = ("logits", "loss", "gradients")
_NAMES = {"flash": "flash (emulated)"}


def isolation_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| family | attention | batch | logits | loss | gradients | unisolated: logits | loss | gradients |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in data["isolation"]:
        ours = " | ".join(f"{case[f'ours_{what}']:.0e}" for what in WHAT)
        theirs = " | ".join(f"{case[f'unisolated_{what}']:.2f}" for what in WHAT)
        lines.append(
            f"| {case['family']} | {_NAMES.get(case['kernel'], case['kernel'])} | {case['shape']} | {ours} | "
            f"{theirs} |"
        )
    return lines


def summary(data: dict[str, Any]) -> str:
    cases = data["isolation"]
    worst = max(case[f"ours_{what}"] for case in cases for what in WHAT)
    several = [case for case in cases if case["shape"] != "text only"]
    verdict = "met" if worst <= TARGET else "MISSED"
    return (
        f"{len(cases)} cases. Packed by vlmpack, the largest difference of a logit, a loss or a gradient is "
        f"{worst:.1e} (target {TARGET:.0e}: {verdict}). Packed without isolation, logits are off by "
        f"{min(case['unisolated_logits'] for case in several):.1f} to "
        f"{max(case['unisolated_logits'] for case in several):.1f} where rows hold images. "
        f"torch {data['torch']}, transformers {data['transformers']}."
    )


def tiles_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| family | largest difference, levels of 255 | vlmpack, bytes | normalised | own processor | "
        "times faster, bytes | normalised |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["tiles"]:
        ours, normalised, theirs = (row[f"{key}_ms"] for key in ("ours", "ours_float", "theirs"))
        lines.append(
            f"| {row['family']} | {row['levels']} | {ours:.1f} ms | {normalised:.1f} ms | {theirs:.1f} ms | "
            f"{theirs / ours:.1f} | {theirs / normalised:.1f} |"
        )
    return lines


def page_with(data: dict[str, Any], page: str) -> str:
    """Return the page with both tables between their marks."""
    page = _between(page, "isolation", [summary(data), "", *isolation_table(data)])
    return _between(page, "tiles", tiles_table(data))


def _between(page: str, name: str, lines: list[str]) -> str:
    begin, end = f"<!-- {name}: benchmarks/bench_fidelity.py -->", f"<!-- end of {name} -->"
    head, rest = page.split(begin)
    return f"{head}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{rest.split(end)[1]}"
