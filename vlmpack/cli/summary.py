"""Summary: a `PackingReport` as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from vlmpack.budget import AXES

if TYPE_CHECKING:
    from rich.console import Console

    from vlmpack.packing import PackingReport


def show_summary(console: Console, report: PackingReport, *, title: str, seconds: float) -> None:
    """Print what was packed, how full the packs are, and what was refused.

    Args:
        console: Where to.
        report: Of a finished pass.
        title: What was packed.
        seconds: How long it took.
    """
    console.print(_packs(report, title, seconds))
    if report.num_refused:
        console.print(refusal_table(report))


def _packs(report: PackingReport, title: str, seconds: float) -> Table:
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    over = report.num_packs - report.lower_bound
    table.add_row(
        "packs",
        f"{report.num_packs:,}",
        f"{over:,} over the lower bound of {report.lower_bound:,}"
        if over
        else "no packing of these samples needs fewer",
    )
    table.add_row(
        "samples",
        f"{report.num_packed:,}",
        f"of {report.num_read:,} rows, {report.num_packed / report.num_packs:.1f} a pack",
    )
    for axis, used, limit in zip(AXES, report.load.as_tuple(), report.budget.as_tuple(), strict=True):
        share = report.fill[axis]
        table.add_row(
            f"fill: {axis}",
            "no limit" if share is None else f"{share:.1%}",
            f"{used:,}" if not limit else f"{used:,} of {report.num_packs:,} x {limit:,}",
        )
    fewer = report.num_packed / report.num_packs
    table.add_row(
        "padding",
        f"{report.padding:.1%}",
        f"{report.padding_unpacked:.1%} with one sample a row, which takes {fewer:.1f} times as many rows",
    )
    table.add_row("images", f"{report.load.num_images:,}", f"{report.num_tiles:,} tiles")
    table.add_row(
        "supervised tokens",
        f"{report.num_supervised:,}",
        f"{report.num_supervised / report.load.num_tokens:.1%} of all tokens",
    )
    for count, what, note in (
        (report.num_shrunk, "made to fit", f"samples, by {report.num_tokens_removed:,} tokens"),
        (report.num_texts_with_image_token, "image tokens in texts", "texts out of which one was removed"),
    ):
        if count:
            table.add_row(what, f"{count:,}", note)
    if report.decoders:
        table.add_row("decoders", f"{sum(map(bool, report.decoders.values()))}", _decoders(report.decoders))
    table.add_row("refused", f"{report.total_refused:,}", "rows" if report.total_refused else "no row")
    table.add_row(
        "time",
        f"{seconds:.1f} s",
        f"{report.num_read / max(seconds, 1e-9):,.0f} rows a second, once the kernel is compiled",
    )
    return table


def _decoders(decoders: dict[str, str | None]) -> str:
    used = ", ".join(f"{name} {version}" for name, version in decoders.items() if version)
    missing = ", ".join(name for name, version in decoders.items() if not version)
    return (
        f"{used or 'none'}; Pillow {f'for the rest and in place of {missing}' if missing else 'for the rest'}"
    )


def refusal_table(report: PackingReport) -> Table:
    """Return the reasons for which rows were refused, each with its first example.

    Args:
        report: With refusals.
    """
    table = Table(title="Refused rows", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("reason", style="yellow", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("for example")
    for reason, count in report.num_refused.most_common():
        example = next(refusal for refusal in report.refusals if refusal.reason == reason)
        table.add_row(reason, f"{count:,}", Text.assemble((f"{example.key}: ", "bold"), example.message))
    return table
