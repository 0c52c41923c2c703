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
        "any Hugging Face data set,\na list or an iterable;\nimages compressed",
        "RowSource\nRowParser",
        "text",
    ),
    ("samples", "token ids, labels,\nimage sizes from headers,\nexact cost", "VQADataset\nAdmission", "text"),
    (
        "plan",
        "which samples share a pack,\nfrom tokens, images\nand ViT patches alone",
        "StreamPacker",
        "plan",
    ),
    (
        "packs",
        "one sequence each, isolated;\nimages decoded, resized\nand tiled in threads",
        "Assembler",
        "pixels",
    ),
    ("batches", "stacked and padded;\nrefused if over the\ndevice's budget", "VQACollator", "pixels"),
)
WIDTH, HEIGHT, GAP, TOP, LEFT = 2.4, 1.25, 0.5, 2.35, 0.3


def left_of(number: int) -> float:
    return LEFT + number * (WIDTH + GAP)


def box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], colour: str) -> None:
    style = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, facecolor=colour, edgecolor=LINE, lw=1))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, color=MUTED, lw=1.3, connectionstyle=style
        )
    )


def draw_stages(axes: Axes) -> None:
    for number, (name, holds, maker, colour) in enumerate(BOXES):
        left = left_of(number)
        middle = left + WIDTH / 2
        box(axes, (left, TOP), (WIDTH, HEIGHT), COLOURS[colour])
        axes.text(
            middle, TOP + HEIGHT - 0.2, name, ha="center", va="center", size=12, weight="bold", color=INK
        )
        axes.text(middle, TOP + 0.45, holds, ha="center", va="center", size=8.2, color=INK, linespacing=1.35)
        axes.text(
            middle,
            TOP + HEIGHT + 0.12,
            maker,
            ha="center",
            va="bottom",
            size=8,
            color=MUTED,
            family="monospace",
        )
        if number:
            arrow(axes, (left - GAP + 0.04, TOP + HEIGHT / 2), (left - 0.04, TOP + HEIGHT / 2))


def draw_waiting(axes: Axes) -> None:
    """Draw the look-ahead buffer: how samples get to their pack without passing through the plan."""
    left, right = left_of(1) + 1.0, left_of(3) + 1.05
    height = TOP + HEIGHT + 0.92
    axes.plot([left, left], [TOP + HEIGHT + 0.5, height], color=MUTED, lw=1.3)
    axes.plot([left, right], [height, height], color=MUTED, lw=1.3)
    arrow(axes, (right, height), (right, TOP + HEIGHT + 0.34))
    axes.text(
        (left + right) / 2,
        height + 0.1,
        "look-ahead buffer: token ids and compressed images wait here, never pixels",
        ha="center",
        va="bottom",
        size=8.6,
        color=INK,
    )


def draw_report(axes: Axes) -> None:
    bottom, height = 0.35, 0.72
    box(axes, (LEFT, bottom), (left_of(4) + WIDTH - LEFT, height), COLOURS["refuse"])
    axes.text(
        (LEFT + left_of(4) + WIDTH) / 2,
        bottom + height / 2,
        "PackingReport\nevery row is packed once, or refused with its key, a reason and the numbers",
        ha="center",
        va="center",
        size=9,
        color=INK,
        linespacing=1.5,
    )
    for number, fault in (
        (0, "bad row,\nbroken header"),
        (1, "no target, too long,\nover a budget"),
        (3, "broken\npixels"),
    ):
        middle = left_of(number) + WIDTH / 2
        arrow(axes, (middle, TOP - 0.04), (middle, bottom + height + 0.04))
        axes.text(middle + 0.1, (TOP + bottom + height) / 2, fault, va="center", size=8, color=MUTED)


def main() -> None:
    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "vlmpack", "font.family": "DejaVu Sans"})
    right, top = left_of(4) + WIDTH + LEFT, TOP + HEIGHT + 1.45
    figure, axes = plt.subplots(figsize=(right * 0.8, top * 0.8))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, right), ylim=(0, top))
    axes.axis("off")
    style = "round,pad=0,rounding_size=0.15"
    axes.add_patch(
        FancyBboxPatch((0.02, 0.02), right - 0.04, top - 0.04, boxstyle=style, facecolor=CARD, edgecolor=LINE)
    )
    draw_stages(axes)
    draw_waiting(axes)
    draw_report(axes)
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
