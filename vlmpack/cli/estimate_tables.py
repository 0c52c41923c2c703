"""The answer of `vlmpack estimate` as tables for people. Bytes are in GiB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vlmpack.memory.fit_rule import gib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from vlmpack.cli.question import Answer
    from vlmpack.memory.estimate import Phase
    from vlmpack.memory.fit_rule import FrontPoint
    from vlmpack.memory.real_step import Comparison
    from vlmpack.memory.regime import TrainingRegime
    from vlmpack.memory.remedies import Remedy
    from vlmpack.memory.worst_case import ExampleLine

_GROUPS: Final = {
    "static": ("weights", "gradients", "optimizer", "workspace", "casts", "inputs"),
    "vision": ("vision", "connector"),
    "language": ("language",),
    "logits": ("logits",),
    "passing": ("transient",),
}
"""The columns of the table of phases, and the components in them."""
_SHOWN: Final = 8
"""Remedies and choices that are shown; `--json` has them all."""
_WIDE: Final = 100
"""Characters a line from which there is room for what a remedy costs."""


def show_answer(console: Console, answer: Answer) -> None:
    """Print breakdown, verdict, choices and remedies.

    Args:
        console: Where to.
        answer: To what was asked.
    """
    ask = answer.question
    where = f" on {ask.gpu.name}" if ask.gpu is not None else ""
    pictures = f", {ask.images:,} images" if ask.images is not None else ""
    console.print(Text(f"{ask.model.name}{where}", style="bold"), soft_wrap=True)
    console.print(
        f"{ask.model.num_parameters:,} parameters; {ask.rows} x {ask.tokens:,} tokens{pictures}, "
        f"{ask.tiles:,g} tiles of {ask.model.patches_per_tile:,} patches",
        soft_wrap=True,
    )
    console.print(_regime(ask.regime) + "\n", soft_wrap=True)
    console.print(_phases(answer.step.phases, answer.step.peak))
    console.print(f"\nThe peak is in phase '{answer.step.peak.name}':", soft_wrap=True)
    console.print(_parts(answer))
    if answer.replayed is not None:
        run = answer.replayed
        console.print(
            f"\nReplayed in the allocator: {gib(run.peak_allocated)} allocated, {gib(run.peak_reserved)} "
            "reserved, which is what nvidia-smi shows beside CUDA's context",
            soft_wrap=True,
        )
    if answer.verdict is None:
        return
    console.print(Text.assemble("\n", *_verdict(answer)), soft_wrap=True)
    if answer.front:
        console.print("\nPacks against tiles, of which none is beaten in both:", soft_wrap=True)
        console.print(_front(answer.front))
    if answer.remedies:
        console.print("\nWhat helps, each alone:", soft_wrap=True)
        console.print(_remedies(answer.remedies, wide=console.width >= _WIDE))


def _regime(regime: TrainingRegime) -> str:
    """Return how it is trained: what always matters, and what differs from the defaults."""
    words = [f"{regime.weights} weights", f"{regime.autocast or 'no'} autocast", regime.optimizer]
    words += [f"{regime.attention} attention", f"{regime.mask} mask"]
    told = {"weights", "autocast", "optimizer", "attention", "mask", "workspace_bytes"}
    for name, field in type(regime).model_fields.items():
        value = getattr(regime, name)
        if name not in told and value != field.default:
            named = value if not isinstance(value, tuple) else "+".join(value)
            words.append(name.replace("_", " ") + ("" if value is True else f" {named}"))
    return ", ".join(words)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    for number, name in enumerate(columns):
        table.add_column(
            name,
            style="cyan" if not number else None,
            justify="right" if number else "left",
            no_wrap=True,
            vertical="bottom",
        )
    return table


def _figure(size: float) -> str:
    return f"{size / 2**30:,.2f}"


def _phases(phases: Sequence[Phase], peak: Phase) -> Table:
    table = _table("GiB in phase", *_GROUPS, "total")
    for phase in phases:
        sums = [sum(phase.parts[name] for name in names) for names in _GROUPS.values()]
        table.add_row(
            phase.name,
            *(_figure(size) for size in (*sums, phase.total)),
            style="bold" if phase is peak else None,
        )
    return table


def _parts(answer: Answer) -> Table:
    step = answer.step
    table = _table("component", "GiB")
    for name, size in step.peak.parts.items():
        if size:
            table.add_row(name, _figure(size))
    table.add_row("allocator", _figure(step.allocator_bytes))
    table.add_row("max_memory_allocated", _figure(step.peak_bytes), style="bold")
    table.add_row("CUDA context", _figure(step.context_bytes))
    if answer.verdict is not None:
        table.add_row("margin, fragmentation", _figure(answer.reserve_bytes))
        table.add_row("required", _figure(answer.verdict.required_bytes), style="bold")
    return table


def _verdict(answer: Answer) -> list[str | tuple[str, str]]:
    verdict, limit, budget = answer.verdict, answer.limit, answer.budget
    assert verdict is not None
    room = f"{gib(verdict.required_bytes)} of {gib(verdict.available_bytes)}"
    words: list[str | tuple[str, str]] = (
        [("fits", "bold green"), f": {room}"]
        if verdict.fits
        else [("does not fit", "bold red"), f": {room}, {gib(verdict.short_bytes)} too much"]
    )
    if limit is not None and budget is not None and answer.question.model.vision is not None:
        by = "tokens allow no more" if limit.bound == "tokens" else f"tokens would allow {limit.by_tokens:,}"
        words.append(
            f"\nup to {limit.tiles:,} tiles fit such a batch ({by}): "
            f"max_patches={budget.max_patches:,} a pack"
        )
    return words


def _front(front: Sequence[FrontPoint]) -> Table:
    table = _table("packs", "tiles a pack", "tiles", "GiB")
    for point in front[:_SHOWN]:
        table.add_row(
            str(point.rows), f"{point.tiles_per_row:,}", f"{point.tiles:,}", _figure(point.required_bytes)
        )
    return table


def _remedies(found: Sequence[Remedy], *, wide: bool) -> Table:
    table = _table("remedy", "saves GiB", "fits", "max tiles")
    if wide:
        table.add_column("costs", style="dim", no_wrap=True)
    for remedy in found[:_SHOWN]:
        fits = "yes" if remedy.fits else "no"
        figures = (_figure(remedy.saved_bytes), fits, f"{remedy.max_tiles:,}")
        table.add_row(remedy.name, *figures, *([remedy.cost] if wide else []))
    return table


def show_worked_example(console: Console, lines: Sequence[ExampleLine]) -> None:
    """Print each figure of the reference document beside what it counts and what is right.

    Args:
        console: Where to.
        lines: From `vlmpack.memory.worked_example`.
    """
    console.print(Text("nanoVLM-460M, 2,048-pixel images, packs of 4,096 tokens", style="bold"))
    for line in lines:
        console.print(Text.assemble("\n", (line.claim, "cyan"), f": {line.counted}"))
        console.print(Padding.indent(Text.assemble("= ", line.exact), 2))
        console.print(Padding.indent(Text(line.verdict, style="bold"), 2))


def show_measurement(console: Console, found: Comparison) -> None:
    """Print a real step's bytes beside the estimate's.

    Args:
        console: Where to.
        found: From `vlmpack.memory.real_step.measure_config`.
    """
    console.print(f"Measured on {found.device}: {found.what}", soft_wrap=True)
    console.print(
        f"  measured {gib(found.measured_bytes)}, estimated {gib(found.estimated_bytes)}: {found.error:+.2%}",
        soft_wrap=True,
    )
