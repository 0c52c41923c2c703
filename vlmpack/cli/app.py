"""The commands, put together. One file a command; what they import is imported when they run."""

from typing import Annotated

import typer

import vlmpack
from vlmpack.cli.demo import demo
from vlmpack.cli.estimate import estimate
from vlmpack.cli.find_batch_size import find_batch_size
from vlmpack.cli.index import index
from vlmpack.cli.pack import pack
from vlmpack.cli.plan import plan
from vlmpack.cli.prepack import prepack
from vlmpack.cli.report import inspect, report
from vlmpack.cli.simulate import simulate
from vlmpack.cli.train_demo import train_demo

app = typer.Typer(
    name="vlmpack",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlmpack {vlmpack.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Pack vision-language data into dense training batches."""


app.command()(pack)
app.command()(demo)
app.command()(simulate)
app.command()(estimate)
app.command()(train_demo)
app.command(context_settings={"allow_extra_args": True})(find_batch_size)  # --max-crops-list 12 13 14
app.command()(index)
app.command()(plan)
app.command()(prepack)
app.command()(report)
app.command()(inspect)
