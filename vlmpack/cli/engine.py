"""The options of what runs a corpus' files, and the bar that shows how far it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from vlmpack.cli.console import results

if TYPE_CHECKING:
    from vlmpack.offline import Engine

_WORK = "How the work is done"
EngineName: TypeAlias = Annotated[
    Literal["pool", "ray"], typer.Option(help="Processes of this machine, or Ray.", rich_help_panel=_WORK)
]
Workers: TypeAlias = Annotated[
    int | None,
    typer.Option(min=0, help="Processes; a core each where not given, 0 for none.", rich_help_panel=_WORK),
]
Address: TypeAlias = Annotated[
    str | None, typer.Option(help="Of a running Ray cluster.", rich_help_panel=_WORK)
]


def engine_of(name: Literal["pool", "ray"], num_workers: int | None, address: str | None) -> "Engine":
    """Return the engine that the options ask for.

    Args:
        name: Of the engine.
        num_workers: Processes or tasks at a time.
        address: Of a Ray cluster.
    """
    from vlmpack.offline import Engine

    return Engine(name=name, num_workers=num_workers, address=address)


@contextmanager
def file_progress(unit: str) -> Iterator[Callable[[object, int], None]]:
    """Show a bar on a terminal; yields what is called with each thing done and the number of things.

    Args:
        unit: What is counted.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=results(aside=True), transient=True) as bar:
        task = bar.add_task(unit, total=None)

        def advance(_: object, total: int) -> None:
            bar.update(task, advance=1, total=total)

        yield advance
