"""Charts: how full packs are, and what a longer look-ahead or another method is worth.

Needs matplotlib, which comes with the extra `plot` and is imported when the first picture is drawn.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import numpy as np

from vlmpack.errors import ConfigError
from vlmpack.packing.plot import FAINT, INK, figure_class

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence

    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmpack.packing.report import PackingReport
    from vlmpack.packing.simulate import Simulation

    Int64s: TypeAlias = npt.NDArray[np.int64]
    Floats: TypeAlias = npt.NDArray[np.float64]

Measure: TypeAlias = Literal["over_bound", "fill"]
"""What a frontier shows: packs over the lower bound, or the fill of the fullest axis."""

_HUES: Final = ("#3b76b5", "#e08214", "#3f9146", "#8e4a94", "#cf4a3f", "#23888a", "#96793a")
_MARKERS: Final = ("o", "s", "D", "^", "v", "P", "X")
_GRID: Final = "#e6e6e6"
_BARS: Final = 40
"""Bars of a histogram with many values."""
_FEW: Final = 12
"""So many bars are drawn even where most of them are nearly empty."""
_OUTSIDE: Final = 2.0
"""Percent of the packs at either end of a histogram that do not stretch it."""
_WIDTH: Final = 13
"""Inches."""


def plot_frontier(
    simulations: Sequence[Simulation], *, measure: Measure = "over_bound", title: str = "", subtitle: str = ""
) -> Figure:
    """Draw packs over the lower bound, or fill, against the look-ahead: a line for each method.

    Args:
        simulations: Of the same costs, by one or more methods and look-aheads.
        measure: What the height is.
        title: The result, in a line.
        subtitle: What it is the result of, in smaller letters.

    Raises:
        ConfigError: If there is no simulation or no such measure, or matplotlib is not installed.
    """
    if measure not in get_args(Measure):
        raise ConfigError(f"measure must be one of {', '.join(get_args(Measure))}, got {measure!r}")
    figure = _figure(simulations, 5.2, title or _result_of(simulations), subtitle)
    _draw_frontier(_with_names(figure, simulations, 0.14, 0.65), simulations, measure)
    return figure


def plot_fill(report: PackingReport, *, title: str = "", subtitle: str = "") -> Figure:
    """Draw how many packs have how many tokens, ViT patches and samples.

    Args:
        report: With at least one pack.
        title: The result, in a line.
        subtitle: What it is the result of, in smaller letters.

    Raises:
        ConfigError: If there is no pack, or matplotlib is not installed.
    """
    figure = _figure(range(report.num_packs), 4.6, title or _fills_of(report), subtitle)
    _draw_histograms(figure, report, bottom=0.145, top=0.755)
    return figure


def plot_simulations(simulations: Sequence[Simulation], *, title: str = "", subtitle: str = "") -> Figure:
    """Draw the frontier of all simulations above the histograms of the one with the fewest packs.

    Args:
        simulations: Of the same costs, by one or more methods and look-aheads.
        title: The result, in a line.
        subtitle: What it is the result of, in smaller letters.

    Raises:
        ConfigError: If there is no simulation, or matplotlib is not installed.
    """
    if len(simulations) == 1:
        run = simulations[0]
        return plot_fill(run.report, title=title or _result_of(simulations), subtitle=subtitle)
    figure = _figure(simulations, 8.6, title or _result_of(simulations), subtitle)
    _draw_frontier(_with_names(figure, simulations, 0.53, 0.345), simulations, "over_bound")
    best = _best(simulations)
    heading = f"The packs of {best.method}, {_lookahead_words(best.lookahead)}. {_fills_of(best.report)}"
    figure.text(0.02, 0.425, heading, fontsize=12, fontweight="bold", color=INK, va="center")
    _draw_histograms(figure, best.report, bottom=0.075, top=0.365)
    return figure


def _figure(drawn: Sequence[object], height: float, title: str, subtitle: str) -> Figure:
    """Return an empty figure with its two lines of title.

    Raises:
        ConfigError: If nothing is to be drawn, or matplotlib is not installed.
    """
    if not drawn:
        raise ConfigError("there is no pack to draw")
    figure = figure_class()(figsize=(_WIDTH, height))
    figure.text(0.02, 1 - 0.36 / height, title, fontsize=15, fontweight="bold", color=INK, va="center")
    figure.text(0.02, 1 - 0.66 / height, subtitle, fontsize=10.5, color=FAINT, va="center")
    return figure


def _best(simulations: Sequence[Simulation]) -> Simulation:
    """Return the one with the fewest packs; of several, the one with the shortest look-ahead."""
    return min(simulations, key=lambda run: (run.report.num_packs, run.lookahead or float("inf")))


def _result_of(simulations: Sequence[Simulation]) -> str:
    if not simulations:
        return ""
    best = _best(simulations)
    return (
        f"{best.report.num_packed:,} samples in {best.report.num_packs:,} packs, {best.over_bound:.2%} over "
        f"the lower bound: {best.method}, {_lookahead_words(best.lookahead)}"
    )


def _lookahead_words(lookahead: int | None) -> str:
    return "whole data set" if lookahead is None else f"look-ahead {lookahead:,}"


def _fills_of(report: PackingReport) -> str:
    """Return the fill of each axis that is used."""
    return "Fill: " + ", ".join(f"{share:.1%} {axis}" for axis, share in report.fill.items() if share)


def _with_names(figure: Figure, simulations: Sequence[Simulation], bottom: float, height: float) -> Axes:
    """Return axes that leave as much room at the right as the names of the methods need."""
    longest = max(len(run.method) for run in simulations)
    return figure.add_axes((0.065, bottom, 0.85 - 0.0073 * longest, height))


def _draw_frontier(axes: Axes, simulations: Sequence[Simulation], measure: Measure) -> None:
    lookaheads = sorted({run.lookahead for run in simulations if run.lookahead is not None})
    at: dict[int | None, float] = {lookahead: float(np.log2(lookahead)) for lookahead in lookaheads}
    names = [f"{lookahead:,}" for lookahead in lookaheads]
    if any(run.lookahead is None for run in simulations):
        at[None] = max(at.values(), default=-1.5) + 1.5
        names.append("whole\ndata set")
    ends = []
    by_method = groupby(sorted(simulations, key=lambda run: run.method), key=lambda run: run.method)
    for number, (method, runs) in enumerate(by_method):
        points = sorted((at[run.lookahead], _height(run, measure)) for run in runs)
        colour = _HUES[number % len(_HUES)]
        marker = _MARKERS[(number + number // len(_HUES)) % len(_MARKERS)]
        _draw_line(axes, points, at.get(None), colour, marker)
        ends.append((points[-1][1], method, colour))
    axes.set_xticks(list(at.values()), names)
    axes.set_xlim(min(at.values()) - 0.3, max(at.values()) + 0.3)
    axes.set_xlabel("look-ahead: samples that may wait for a pack", color=FAINT, loc="left")
    _scale(axes, [_height(run, measure) for run in simulations], measure)
    _name_lines(axes, ends)
    _clean(axes)
    axes.tick_params(axis="x", pad=9)  # below markers that stand on the axis


def _draw_line(
    axes: Axes, points: list[tuple[float, float]], whole: float | None, colour: str, marker: str
) -> None:
    """Draw a method's points, joined; dotted to the last one where that stands for the whole data set."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    num_streamed = len(points) - (xs[-1] == whole)
    axes.plot(xs, ys, color=colour, marker=marker, markersize=7, linewidth=0, clip_on=False)
    axes.plot(xs[:num_streamed], ys[:num_streamed], color=colour, linewidth=2, clip_on=False)
    if 0 < num_streamed < len(points):
        axes.plot(xs[-2:], ys[-2:], color=colour, linewidth=1.4, linestyle=":", clip_on=False)


def _height(run: Simulation, measure: Measure) -> float:
    """Return what is drawn upwards, in percent."""
    if measure == "over_bound":
        return 100 * run.over_bound
    return 100 * max(share for share in run.report.fill.values() if share is not None)


def _scale(axes: Axes, heights: list[float], measure: Measure) -> None:
    from matplotlib.ticker import NullFormatter

    low, high = min(heights), max(heights)
    if measure == "fill":
        axes.set_ylim(low - 0.15 * (100 - low) - 0.01, 100)
        axes.set_ylabel("fill of the fullest axis, %", color=FAINT)
        return
    axes.set_ylabel("packs over the lower bound, %", color=FAINT)
    if low > 0 and high / low > 6:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 1.5)
        ticks = [tick for tick in _LOG_TICKS if low / 1.5 <= tick <= high * 1.5]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.15 * high or 1)


_LOG_TICKS: Final = tuple(digit * 10.0**power for power in range(-4, 4) for digit in (1, 2, 5))


def _name_lines(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each method's name and last value beside its line, without overlap."""
    to_share = axes.transScale + axes.transLimits
    shares = [float(to_share.transform((0, max(value, 1e-9)))[1]) for value, _, _ in ends]
    for (value, method, colour), y in zip(ends, _spread(shares, 0.095), strict=True):
        axes.text(
            1.015,
            y,
            f"{method}  {value:.2f}%",
            transform=axes.transAxes,
            color=colour,
            fontsize=10.5,
            fontweight="bold",
            va="center",
        )


def _spread(places: list[float], gap: float) -> list[float]:
    """Return places in [0, 1], moved until all are `gap` apart; neighbours give way to each other equally."""
    order = np.argsort(places, kind="stable")
    moved = np.array(places, float)[order]
    for _ in range(100):
        missing = np.maximum(gap - np.diff(moved), 0)
        moved[:-1] -= missing / 2
        moved[1:] += missing / 2
    steps = gap * np.arange(len(places))
    moved = np.minimum(np.maximum(moved, steps), 1 + steps - steps[-1])
    back = np.empty(len(places))
    back[order] = moved
    return [float(place) for place in back]


def _draw_histograms(figure: Figure, report: PackingReport, *, bottom: float, top: float) -> None:
    panels: list[tuple[str, Counter[int], int | None, str]] = [
        ("tokens", report.tokens_per_pack, report.budget.max_tokens, _HUES[0]),
        ("ViT patches", report.patches_per_pack, report.budget.max_patches, _HUES[1]),
        ("samples", report.samples_per_pack, None, _HUES[2]),
    ]
    shown = [panel for panel in panels if any(panel[1])]
    left, right, gap = 0.065, 0.985, 0.06
    width = (right - left - gap * (len(shown) - 1)) / len(shown)
    for number, (name, counts, limit, colour) in enumerate(shown):
        axes = figure.add_axes((left + number * (width + gap), bottom, width, top - bottom))
        values = np.array(sorted(counts), np.int64)
        shares = np.array([counts[value] for value in values.tolist()], float)
        shares *= 100 / shares.sum()
        _draw_bars(axes, values, shares, colour)
        _mark(axes, values, shares, limit)
        axes.set_xlabel(f"{name} a pack", color=FAINT, loc="left")
        if number == 0:
            axes.set_ylabel("share of packs, %", color=FAINT)
        _clean(axes)


def _draw_bars(axes: Axes, values: Int64s, shares: Floats, colour: str) -> None:
    """Draw a histogram; the few packs that lie far out are one pale bar at either end."""
    from matplotlib.ticker import MaxNLocator

    upto = np.cumsum(shares)
    first, last = np.searchsorted(upto, (_OUTSIDE, 100 - _OUTSIDE)).tolist()
    if values[-1] < 2 * values[last]:
        last = values.size - 1
    if values[-1] - values[0] < _FEW * _unit(values):
        first, last = 0, values.size - 1
    edges = _edges(values[first : last + 1])
    width = float(edges[1] - edges[0])
    heights, _ = np.histogram(values, edges, weights=shares)
    axes.bar(edges[:-1], heights, width, align="edge", color=colour, edgecolor="white", linewidth=0.5)
    for name, x, height in (
        ("less", edges[0] - 1.5 * width, float(shares[values < edges[0]].sum())),
        ("more", edges[-1] + 1.5 * width, float(shares[values > edges[-1]].sum())),
    ):
        if height:
            axes.bar(x, height, width, color=colour, alpha=0.45)
            axes.annotate(
                name, (x, height), (0, 3), textcoords="offset points", ha="center", fontsize=9, color=FAINT
            )
    axes.set_xlim(edges[0] - 3 * width, edges[-1] + 3 * width)
    ticks = MaxNLocator(4, integer=True).tick_values(edges[0], edges[-1])
    ticks = [tick for tick in ticks if edges[0] <= tick <= edges[-1]]
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])


def _edges(values: Int64s) -> Floats:
    """Return the borders of bars: one for each number where there are few, else at most `_BARS` even ones.

    The last bar ends with the largest number: full packs are what one looks for.
    """
    low, high = int(values[0]), int(values[-1])
    unit = _unit(values)
    num_units = (high - low) // unit + 1
    step = unit * (-(-num_units // _BARS) if num_units > 1.5 * _BARS else 1)
    num_bars = -(-num_units * unit // step)
    return high + unit / 2 - step * np.arange(num_bars, -1, -1.0)


def _unit(values: Int64s) -> int:
    """Return the largest step of which all differences are multiples: 1,024 where patches come by tiles."""
    return int(np.gcd.reduce(np.diff(values))) if values.size > 1 else 1


def _mark(axes: Axes, values: Int64s, shares: Floats, limit: int | None) -> None:
    """Draw mean, p95, maximum and limit as lines, named above the panel; those that agree share a number."""
    p95 = int(values[np.searchsorted(np.cumsum(shares), 95 - 1e-9)])
    marks = {"mean": float((values * shares).sum() / 100), "p95": p95, "max": int(values[-1])}
    if limit is not None:
        marks["limit"] = limit
    names: dict[str, list[str]] = {}
    low, high = axes.get_xlim()
    for name, value in marks.items():
        if low <= value <= high:
            colour, style = _MARKS[name]
            axes.axvline(value, color=colour, linestyle=style, linewidth=1.3)
        number = f"{value:,.1f}" if name == "mean" else f"{value:,.0f}"
        names.setdefault(number, []).append(name)
    text = "  ·  ".join(f"{' = '.join(same)} {number}" for number, same in names.items())
    axes.set_title(text, fontsize=10, color=INK, loc="left", pad=8)


_MARKS: Final = {"mean": (INK, "-"), "p95": (INK, "--"), "max": (INK, ":"), "limit": ("#cf4a3f", "-")}
"""Colour and style of each line, in the order in which they stand from left to right."""


def _clean(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.tick_params(which="both", length=0, colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c9c9c9")
