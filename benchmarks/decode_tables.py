"""The tables of docs/images.md, from the figures of benchmarks/bench_decode.py, and what they were to be."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).parent.parent / "docs" / "images.md"
HASHING: Final = "threads, share of hashing's gain"

TARGETS: Final = (
    # what, key of the ratio, must, aim, whether smaller is better
    ("mix, 2048 rule, over the baseline", "mix 2048 times", 12.0, 18.0, False),
    ("mix, 2048 rule, over the floor", "mix 2048 over floor", 3.0, 2.3, True),
    ("mix, rounded-up rule, over the baseline", "mix rounded up times", 8.0, 12.0, False),
    ("mix, rounded-up rule, over the floor", "mix rounded up over floor", 2.5, 2.0, True),
    ("Pillow and torch alone, 2048 rule", "mix 2048 alone times", 8.0, 10.0, False),
    ("Pillow and torch alone, rounded-up rule", "mix rounded up alone times", 5.0, 6.0, False),
    ("float32 drop-in output, slowest class", "float slowest times", 4.0, 8.0, False),
    ("largest difference of a grid tile, fast mode", "fast grid max", 2.0, 2.0, True),
    ("the same, shrinking more than eightfold", "fast grid max, shrinking", 7.0, 2.0, True),
    ("two decode threads over one", "threads", 1.6, 1.6, False),
)


def tables(figures: dict) -> str:
    """Return the tables of docs/images.md."""
    found = figures["ratios"]
    lines = _targets(found)
    for rule, of_class in figures["classes"].items():
        lines += _classes(rule, of_class)
    lines += [
        "",
        "CPU milliseconds a sample, whole pipeline from rows to packs, in one thread.",
        "",
        "| rule | baseline | exact | without extras | floor |",
        "|---|---|---|---|---|",
    ]
    for rule, v in figures["pipelines"].items():
        lines.append(
            f"| {rule} | {v['baseline']:.1f} | {v['exact']:.2f} | {v['alone']:.2f} | {v['floor']:.2f} |"
        )
    lines += _resizes(figures["resizes"])
    free = "" if found["rounds with two free processors"] else "never "
    pages = figures["faults"]
    return "\n".join([
        *lines,
        "",
        f"Fresh pages a picture of 640 x 480, 2048 rule: {pages['pages baseline']:,.0f} for the baseline, "
        f"{pages['pages exact']:,.0f} here. Fast mode's global tile differs by "
        f"{found['fast global max']:.0f} levels at most, by {found['fast global mean']:.2f} on average in "
        f"the worst picture. Exact tiles differ from Pillow's by {found['exact grid from Pillow']:.0f}. "
        f"Two processors were {free}free for the threads' figure; two threads had "
        f"{found[HASHING]:.2f} of what hashing gains from two.",
        "",
        "Measured with " + ", ".join(f"{key} {value}" for key, value in figures["machine"].items()) + ".",
    ])


def _targets(found: dict[str, float]) -> list[str]:
    lines = ["| | must | aim | measured |", "|---|---|---|---|"]
    for what, key, must, aim, smaller in TARGETS:
        value = found[key]
        good = (value <= must) if smaller else (value >= must)
        aimed = (value <= aim) if smaller else (value >= aim)
        mark = "" if aimed else (", short of the aim" if good else ", **short**")
        sign = "" if smaller else " x"
        lines.append(f"| {what} | {must:g}{sign} | {aim:g}{sign} | {value:.3g}{sign}{mark} |")
    return lines


def _classes(rule: str, of_class: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "",
        f"CPU milliseconds a picture, rule: {rule}.",
        "",
        "| | baseline | exact | fast | without extras | float32 | floor | baseline / exact | exact / floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, v in of_class.items():
        lines.append(
            f"| {name} | {v['baseline']:.1f} | {v['exact']:.2f} | {v['fast']:.2f} | {v['alone']:.2f} | "
            f"{v['float']:.2f} | {v['floor']:.2f} | {v['baseline'] / v['exact']:.1f} x | "
            f"{v['exact'] / v['floor']:.2f} |"
        )
    return lines


def _resizes(figures: dict[str, dict[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for v in figures.values() for name in v))
    lines = [
        "",
        "CPU milliseconds of a bicubic resize alone.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for size, v in figures.items():
        lines.append(
            f"| {size} | " + " | ".join(f"{v[name]:.1f}" if name in v else "-" for name in names) + " |"
        )
    return lines


def write_page(text: str, page: Path = PAGE) -> None:
    """Put the tables between the page's marks."""
    begin, end = "<!-- tables: benchmarks/bench_decode.py -->", "<!-- end of tables -->"
    old = page.read_text(encoding="utf-8")
    head, rest = old.split(begin)
    tail = rest.split(end)[1]
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", encoding="utf-8")
