"""`vlmpack simulate`: packs costs alone, by several methods and look-aheads, and compares what comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from vlmpack.cli import settings as setting
from vlmpack.cli.console import STANDARD_OUTPUT, check_folder, errors_in_one_line, results, write_json
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from vlmpack.budget import PackBudget
    from vlmpack.packing.engine import Balance
    from vlmpack.packing.inputs import Int64s
    from vlmpack.packing.methods import Method
    from vlmpack.packing.simulate import Simulation

_ALL = "all"
_WORK = "How the work is done"


def simulate(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A named workload: text, vlm_tiles, planted_half, over_half or anticorrelated; or a Parquet "
            "or CSV file with a row a sample and the columns num_tokens and, where there are images, "
            "num_images and num_tiles or num_patches.",
        ),
    ],
    report: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - prints them."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the figures; .pdf and .svg work too.")
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(min=1, help="Draw so many (100,000 where not given), or take only so many rows."),
    ] = None,
    seq_length: setting.SeqLength = 4096,
    max_images: setting.MaxImages = 18,
    max_tiles: setting.MaxTiles = 48,
    max_patches: setting.MaxPatches = None,
    patches_per_tile: setting.PatchesPerTile = 1024,
    method: Annotated[
        str,
        typer.Option(metavar="NAME,...", help="Packing algorithms, with commas.", rich_help_panel=_WORK),
    ] = "auto",
    lookahead: Annotated[
        str,
        typer.Option(
            metavar="N|all,...",
            help="Samples that may wait for a pack, with commas; all plans the whole data set at once.",
            rich_help_panel=_WORK,
        ),
    ] = "256,1024,4096,all",
    balance: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS",
            help="Spread patches, attention or both evenly over packs.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Decides the draw and the order of packs.", rich_help_panel=_WORK),
    ] = 0,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Pack the costs of samples alone, without data, and compare methods and look-aheads."""
    arguments = dict(locals())  # taken first: these are the options by name
    given = {
        name
        for name in ("max_tiles", "max_patches")
        if (found := context.get_parameter_source(name)) and found.name == "COMMANDLINE"
    }
    with errors_in_one_line(traceback=traceback):
        _simulate(arguments, given)


def _simulate(arguments: Mapping[str, Any], given: set[str]) -> None:
    from vlmpack.cli.figures import show_figures
    from vlmpack.cli.summary import refusal_table

    report_file, picture = arguments["report"], arguments["plot"]
    check_folder("--json", report_file)
    check_folder("--plot", picture)
    budget = _budget(arguments, given)
    runs = list(product(_methods(arguments["method"]), _lookaheads(arguments["lookahead"])))
    _check_runs(runs, budget, arguments["balance"])
    if picture is not None:
        _check_picture(picture)
    costs = _costs(arguments)
    done = _run(costs, budget, runs, arguments, results(aside=True))
    if picture is not None:
        _draw(done, arguments["source"], picture)
    screen = results(aside=report_file == STANDARD_OUTPUT)
    show_figures(screen, done, title=f"Simulated {arguments['source']}")
    if done[0].report.num_refused:
        screen.print()
        screen.print(refusal_table(done[0].report))
    if picture is not None:
        screen.print(f"picture: {picture}", soft_wrap=True)
    figures = {
        "source": arguments["source"],
        "num_samples": costs.shape[0],
        "seed": arguments["seed"],
        "patches_per_tile": arguments["patches_per_tile"],
        "budget": asdict(budget),
        "simulations": [simulation.as_dict() for simulation in done],
    }
    write_json(figures, report_file)


def _budget(arguments: Mapping[str, Any], given: set[str]) -> "PackBudget":
    """Return what a pack may hold, in patches whichever way it was said.

    Raises:
        ConfigError: If a limit is wrong, or said in both ways.
    """
    from vlmpack.budget import PackBudget

    if len(given) == 2:
        raise ConfigError("--max-tiles and --max-patches limit the same; give one of them")
    per_tile = arguments["patches_per_tile"]
    limits = (("seq_length", 1), ("max_images", 0), ("max_tiles", 0), ("max_patches", 0))
    for name, least in (*limits, ("patches_per_tile", 1)):
        value = arguments[name]
        if value is not None and not least <= value <= _LARGEST:
            raise ConfigError(
                f"{setting.option_name(name)} must be from {least} to {_LARGEST:,}, got {value}"
            )
    max_tiles, max_patches = arguments["max_tiles"], arguments["max_patches"]
    if "max_patches" not in given:
        max_patches = None if max_tiles is None else max_tiles * per_tile
    return PackBudget(
        max_tokens=arguments["seq_length"], max_images=arguments["max_images"], max_patches=max_patches
    )


_LARGEST = 10**9
"""A larger limit is a slip of the hand; products of two limits stay in 64 bits."""


def _methods(names: str) -> list["Method"]:
    from vlmpack.packing.methods import METHODS

    known = {str(method): method for method in METHODS}
    for name in _parts("--method", names):
        if name not in known:
            raise ConfigError(f"--method: no packing method {name!r}; choose of {', '.join(METHODS)}")
    return [known[name] for name in _parts("--method", names)]


def _lookaheads(names: str) -> list[int | None]:
    parts = _parts("--lookahead", names)
    for name in parts:
        if name != _ALL and not (name.isascii() and name.isdigit() and int(name)):
            raise ConfigError(f"--lookahead must be numbers of at least 1, or {_ALL}, got {name!r}")
    return [None if name == _ALL else int(name) for name in parts]


def _check_runs(
    runs: Sequence[tuple["Method", int | None]], budget: "PackBudget", balance: "Balance | None"
) -> None:
    """Let the packer refuse what it cannot do before anything is read.

    Raises:
        ConfigError: If it cannot.
    """
    from vlmpack.packing import StreamPacker
    from vlmpack.packing.engine import Balance

    if balance is not None and balance not in get_args(Balance):
        raise ConfigError(f"--balance must be one of {', '.join(get_args(Balance))}, got {balance!r}")
    for method, lookahead in runs:
        StreamPacker(budget, method=method, lookahead=lookahead or 1, balance=balance)


def _parts(option: str, names: str) -> list[str]:
    """Return what stands between commas, each once.

    Raises:
        ConfigError: If there is nothing between two of them.
    """
    parts = [name.strip() for name in names.split(",")]
    if not all(parts):
        raise ConfigError(f"{option} must be names with commas between them, got {names!r}")
    return list(dict.fromkeys(parts))


def _check_picture(file: Path) -> None:
    from vlmpack.packing.plot import figure_class

    kinds = figure_class()().canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in kinds:
        raise ConfigError(f"--plot: {file.name} must end in one of .{', .'.join(sorted(kinds))}")


def _costs(arguments: Mapping[str, Any]) -> "Int64s":
    from vlmpack.cli.costs import read_costs

    return read_costs(
        arguments["source"],
        num_samples=arguments["num_samples"],
        seed=arguments["seed"],
        patches_per_tile=arguments["patches_per_tile"],
    )


def _run(
    costs: "Int64s",
    budget: "PackBudget",
    runs: Sequence[tuple["Method", int | None]],
    arguments: Mapping[str, Any],
    console: "Console",
) -> list["Simulation"]:
    """Pack the costs once for each run, and show how far it is if the console is a terminal."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    from vlmpack.cli.figures import lookahead_name
    from vlmpack.packing.simulate import simulate as simulate_packing

    columns = (SpinnerColumn("dots"), BarColumn(24), TextColumn("{task.description}", markup=False))
    done = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(runs))
        for number, (method, lookahead) in enumerate(runs):
            words = f"{number + 1} of {len(runs)} · {method}, look-ahead {lookahead_name(lookahead)}"
            progress.update(task, description=words, refresh=True)

            def show(share: float, number: int = number) -> None:
                progress.update(task, completed=number + share)

            simulation = simulate_packing(
                costs,
                budget,
                method=method,
                lookahead=lookahead,
                seed=arguments["seed"],
                balance=arguments["balance"],
                patches_per_tile=arguments["patches_per_tile"],
                on_progress=show,
            )
            done.append(simulation)
    return done


def _draw(done: Sequence["Simulation"], source: str, file: Path) -> None:
    from vlmpack.packing.charts import plot_simulations

    plot_simulations(done, subtitle=f"vlmpack simulate {source}").savefig(file, dpi=150)
