"""Small charts as SVG text: crisp at any size, without a library, and nothing in them asks for anything."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections import Counter

WIDTH: Final = 560
HEIGHT: Final = 190
_LEFT, _BOTTOM, _TOP, _RIGHT = 46, 34, 14, 30
_BARS: Final = 48


def histogram(counts: Counter[int], label: str, *, line: tuple[float, str] | None = None) -> str:
    """Return a histogram: packs by what they hold.

    Args:
        counts: How many packs hold so much.
        label: What is counted, with its unit.
        line: A value to mark and what it is, such as what a GPU takes.
    """
    values = np.array(sorted(counts), np.float64)
    weights = np.array([counts[int(value)] for value in values], np.float64)
    top = max(float(values.max(initial=1)), line[0] if line else 0.0) * 1.02
    is_whole = len(values) <= _BARS and top <= _BARS
    edges = np.arange(0.5, top + 1.5) if is_whole else np.linspace(0, top, _BARS + 1)
    heights, _ = np.histogram(values, bins=edges, weights=weights)
    tallest = max(float(heights.max(initial=1)), 1.0)
    low, span = edges[0], edges[-1] - edges[0]

    def x(value: float) -> float:
        return float(_LEFT + (value - low) / span * (WIDTH - _LEFT - _RIGHT))

    def y(height: float) -> float:
        return float(HEIGHT - _BOTTOM - height / tallest * (HEIGHT - _BOTTOM - _TOP))

    bars = [
        f'<rect x="{x(left) + 0.5:.1f}" y="{y(height):.1f}" width="{max(x(right) - x(left) - 1, 0.5):.1f}" '
        f'height="{y(0) - y(height):.1f}" class="bar"><title>{_between(left, right, whole=is_whole)}: '
        f"{height:,.0f} packs</title></rect>"
        for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True)
        if height
    ]
    ticks = [low + span * share for share in (0, 0.25, 0.5, 0.75, 1)]
    axis = [
        f'<text x="{x(tick):.1f}" y="{HEIGHT - 18}" class="tick" text-anchor="middle">{tick:,.0f}</text>'
        for tick in ticks
    ]
    marks = []
    if line is not None:
        at = x(line[0])
        anchor = "end" if at > WIDTH / 2 else "start"
        marks = [
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" class="limit"/>',
            f'<text x="{at + (-5 if anchor == "end" else 5):.1f}" y="{_TOP + 10}" class="limit-text" '
            f'text-anchor="{anchor}">{escape(line[1])}</text>',
        ]
    return "\n".join([
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        *bars,
        f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}" class="axis"/>',
        *axis,
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" class="tick" text-anchor="end">{tallest:,.0f}</text>',
        f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 3}" class="label" text-anchor="middle">'
        f"{escape(label)}</text>",
        *marks,
        "</svg>",
    ])


def _between(left: float, right: float, *, whole: bool) -> str:
    return f"{left + 0.5:,.0f}" if whole else f"{left:,.0f} to {right:,.0f}"
