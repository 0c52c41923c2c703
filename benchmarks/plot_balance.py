"""Draw the load of each rank in each step, before and after balancing: python -m benchmarks.plot_balance.

Writes docs/images/balance_steps.png, 24 steps of eight ranks from `anticorrelated`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from benchmarks.bench_balance import Epoch, Shape
from vlmpack.ranks import load_imbalance

IMAGE = Path(__file__).parent.parent / "docs" / "images" / "balance_steps.png"
RANKS, STEPS = 8, 24
COLOURS = ("#3b76b5", "#e08214")
WAIT = "#d9c9c9"


def draw(axis: Any, loads: Any, colour: str) -> None:
    """Draw a dot for each rank, and what the others wait for as bars."""
    steps = loads[: RANKS * STEPS].reshape(STEPS, RANKS) / loads.mean()
    means, largest = steps.mean(axis=1), steps.max(axis=1)
    axis.bar(range(STEPS), largest - means, bottom=means, width=0.8, color=WAIT)
    for rank in range(RANKS):
        axis.plot(range(STEPS), steps[:, rank], "o", color=colour, markersize=2.2, alpha=0.8)
    axis.set_xlim(-1, STEPS)
    axis.use_sticky_edges = False
    axis.margins(y=0.08)


def main() -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 4.6), sharex=True, sharey="row")
    for column, (balance, name) in enumerate(((None, "random order"), ("both", 'balance="both"'))):
        loads = Epoch("anticorrelated", 100_000, balance, Shape(RANKS)).loads()  # type: ignore[arg-type]
        found = load_imbalance(loads, world_size=RANKS)
        for row, (load, figures) in enumerate((
            ("ViT patches", found.patches),
            ("attention", found.attention),
        )):
            draw(axes[row, column], loads[:, row], COLOURS[row])
            axes[row, column].set_title(f"{load}, {name}: largest / mean {figures.mean:.2f}", fontsize=9)
        axes[1, column].set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("load of a rank / mean")
    figure.tight_layout()
    figure.savefig(IMAGE, dpi=120)


if __name__ == "__main__":
    main()
