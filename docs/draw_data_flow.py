"""Draw docs/images/data_flow.svg: `python docs/draw_data_flow.py`.

The picture has a light card of its own behind it, so it reads the same on a light and a dark page.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUT = Path(__file__).parent / "images" / "data_flow.svg"
INK, MUTED, CARD, LINE = "#1d2433", "#4d566b", "#f7f8fa", "#8b94a7"
COLOURS = {"text": "#dbe7fb", "plan": "#fdecc8", "pixels": "#dcf1e0", "refuse": "#f9dcdc"}

# name, what it holds, who makes it, colour
BOXES = (
    (
        "rows",
        "any Hugging Face\ndata set, list or\niterable; images\ncompressed",
        "RowSource\nRowParser",
        "text",
    ),
    (
        "samples",
        "token ids, labels;\nimage sizes from\nheaders, so the\ncost is exact",
        "VQADataset\nAdmission",
        "text",
    ),
    ("plan", "which samples\nshare a pack, by\ntokens, images\nand ViT patches", "StreamPacker", "plan"),
    ("packs", "one sequence\neach, isolated;\nimages decoded,\nresized, tiled", "Assembler", "pixels"),
    ("batches", "stacked, padded;\nrefused if over\nthe device's\nbudget", "VQACollator", "pixels"),
)
WIDTH, HEIGHT, GAP, TOP, LEFT = 1.3, 1.0, 0.26, 1.42, 0.16


def left_of(number: int) -> float:
    return LEFT + number * (WIDTH + GAP)


def box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], colour: str) -> None:
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, facecolor=colour, edgecolor=LINE, lw=1))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    line = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=9, color=MUTED, lw=1.1, shrinkA=0, shrinkB=0
    )
    axes.add_patch(line)


def draw_stages(axes: Axes) -> None:
    for number, (name, holds, maker, colour) in enumerate(BOXES):
        left = left_of(number)
        middle = left + WIDTH / 2
        box(axes, (left, TOP), (WIDTH, HEIGHT), COLOURS[colour])
        axes.text(
            middle, TOP + HEIGHT - 0.15, name, ha="center", va="center", size=9.5, weight="bold", color=INK
        )
        axes.text(middle, TOP + 0.41, holds, ha="center", va="center", size=7.2, color=INK, linespacing=1.3)
        axes.text(
            middle,
            TOP + HEIGHT + 0.06,
            maker,
            ha="center",
            va="bottom",
            size=7,
            color=MUTED,
            family="monospace",
        )
        if number:
            arrow(axes, (left - GAP + 0.03, TOP + HEIGHT / 2), (left - 0.03, TOP + HEIGHT / 2))


def draw_waiting(axes: Axes) -> None:
    """Draw the look-ahead buffer: how samples get to their pack without passing through the plan."""
    left, right = left_of(1) + WIDTH / 2, left_of(3) + WIDTH / 2
    height = TOP + HEIGHT + 0.56
    axes.plot([left, left], [TOP + HEIGHT + 0.36, height], color=MUTED, lw=1.1)
    axes.plot([left, right], [height, height], color=MUTED, lw=1.1)
    arrow(axes, (right, height), (right, TOP + HEIGHT + 0.22))
    axes.text(
        (left + right) / 2,
        height + 0.06,
        "look-ahead buffer: token ids and compressed images wait here, never pixels",
        ha="center",
        va="bottom",
        size=7.6,
        color=INK,
    )


def draw_report(axes: Axes) -> None:
    bottom, height = 0.16, 0.5
    box(axes, (LEFT, bottom), (left_of(4) + WIDTH - LEFT, height), COLOURS["refuse"])
    axes.text(
        (LEFT + left_of(4) + WIDTH) / 2,
        bottom + height / 2,
        "PackingReport\nevery row is packed once, or refused with its key, a reason and the numbers",
        ha="center",
        va="center",
        size=7.6,
        color=INK,
        linespacing=1.5,
    )
    for number, fault in (
        (0, "bad row,\nbroken header"),
        (1, "no label, too long,\nover a budget"),
        (3, "broken\npixels"),
    ):
        middle = left_of(number) + WIDTH / 2
        arrow(axes, (middle, TOP - 0.04), (middle, bottom + height + 0.04))
        axes.text(middle + 0.07, (TOP + bottom + height) / 2, fault, va="center", size=7, color=MUTED)


def main() -> None:
    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "vlmpack", "font.family": "DejaVu Sans"})
    right, top = left_of(4) + WIDTH + LEFT, TOP + HEIGHT + 0.88
    figure, axes = plt.subplots(figsize=(right, top))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, right), ylim=(0, top))
    axes.axis("off")
    style = "round,pad=0,rounding_size=0.1"
    axes.add_patch(
        FancyBboxPatch((0.01, 0.01), right - 0.02, top - 0.02, boxstyle=style, facecolor=CARD, edgecolor=LINE)
    )
    draw_stages(axes)
    draw_waiting(axes)
    draw_report(axes)
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
