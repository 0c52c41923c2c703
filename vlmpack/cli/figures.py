"""Figures: simulations as tables for people, a line for each method and look-ahead."""

from __future__ import annotations

import math
import re
from itertools import groupby
from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table
from rich.text import Text

from vlmpack.budget import AXES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from vlmpack.packing.simulate import Simulation

_NO_FIGURE: Final = "-"
_WIDE: Final = 100
"""Characters a line from which the name of a method stands in one line."""


def show_figures(console: Console, simulations: Sequence[Simulation], *, title: str) -> None:
    """Print how many packs there are and how full, then what they hold and how long samples waited.

    Args:
        console: Where to.
        simulations: Of the same costs under the same budget, at least one; those of a method together.
        title: What was simulated.
    """
    report = simulations[0].report
    pairs = zip(AXES, report.budget.as_tuple(), strict=True)
    limits = ", ".join(f"{limit:,} {axis}" for axis, limit in pairs if limit is not None)
    refused = f", {report.total_refused:,} refused" if report.total_refused else ""
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(
        f"{report.num_packed:,} samples{refused}; a pack holds {limits}: "
        f"any packing needs at least {simulations[0].lower_bound:,} packs"
    )
    console.print(_packs(simulations, console.width))
    console.print(_loads(simulations, console.width))
    choices: dict[str, list[str]] = {}
    for run in simulations:
        if run.chosen != run.method:
            choices.setdefault(f"{run.method} chose {run.chosen}", []).append(lookahead_name(run.lookahead))
    for choice, lookaheads in choices.items():
        console.print(f"{choice} for {', '.join(lookaheads)}")


def lookahead_name(lookahead: int | None) -> str:
    """Return a look-ahead as people read it."""
    return "all" if lookahead is None else f"{lookahead:,}"


def _packs(simulations: Sequence[Simulation], width: int) -> Table:
    fills = [f"fill:\n{axis}" for axis in AXES]
    table = _table("packs", "over\nbound", *fills, "samples\na pack", "samples\na second")
    for name, run in zip(_names(simulations, width), simulations, strict=True):
        shares = (run.report.fill[axis] for axis in AXES)
        table.add_row(
            name,
            lookahead_name(run.lookahead),
            f"{run.report.num_packs:,}",
            f"{run.over_bound:.2%}",
            *(_NO_FIGURE if share is None else f"{share:.1%}" for share in shares),
            f"{run.samples_per_pack:.1f}",
            _short(run.samples_per_second),
        )
    return table


def _loads(simulations: Sequence[Simulation], width: int) -> Table:
    table = _table("patches\na pack", "\np95", "\nmax", "atten-\ntion", "mean\ndelay", "max\ndelay")
    for name, run in zip(_names(simulations, width), simulations, strict=True):
        table.add_row(
            name,
            lookahead_name(run.lookahead),
            f"{run.report.patches_per_pack_mean:,.0f}",
            f"{run.report.patches_per_pack_p95:,}",
            f"{run.report.patches_per_pack_max:,}",
            f"x {run.attention_factor:.1f}",
            *(_samples(delay) for delay in (run.mean_delay, run.max_delay)),
        )
    return table


def _table(*figures: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", style="cyan", no_wrap=True)
    for name in ("look-\nahead", *figures):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    return table


def _names(simulations: Sequence[Simulation], width: int) -> list[str]:
    """Return what stands for the method in each line: its name once, over several lines where it is long."""
    names: list[str] = []
    for method, runs in groupby(simulations, key=lambda run: run.method):
        num_lines = len(list(runs))
        pieces = [method] if width >= _WIDE else _pieces(method)
        lines = [*pieces[: num_lines - 1], "\n".join(pieces[num_lines - 1 :])]
        names += lines + [""] * (num_lines - len(lines))
    return names


def _pieces(name: str) -> list[str]:
    """Cut a long name behind underscores: worst_fit_decreasing -> worst_fit_, decreasing."""
    pieces = [""]
    for word in re.findall(r"[^_]*_|[^_]+", name):
        if len(pieces[-1] + word) > _NARROW:
            pieces.append("")
        pieces[-1] += word
    return [piece for piece in pieces if piece]


_NARROW: Final = 12
"""Characters of a piece."""


def _samples(delay: float | None) -> str:
    if delay is None:
        return _NO_FIGURE
    return f"{delay:,.0f}" if delay >= 100 or delay == int(delay) else f"{delay:.1f}"


def _short(number: float) -> str:
    """Return three digits and a unit: 1.29 M, 175 k."""
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if number >= size:
            digits = max(0, 2 - int(math.log10(number / size)))
            return f"{number / size:,.{digits}f}{unit}"
    return f"{number:.0f}"
