"""`vlmpack train-demo`: the whole training loop on the corpus that ships, on the CPU, with simulated OOMs."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlmpack.cli.console import errors_in_one_line, hush, results

if TYPE_CHECKING:
    from vlmpack.batching.config import Surgery
    from vlmpack.batching.demo import DemoResult


def train_demo(
    out: Annotated[Path, typer.Option(help="Folder for metrics and the report.")] = Path("train-demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 6,
    memory_gb: Annotated[float, typer.Option(min=2.0, help="What the pretended GPU has.")] = 4.0,
    formula: Annotated[
        bool, typer.Option(help="Begin with a memory formula, by which steps are planned and split.")
    ] = False,
    surgery: Annotated[
        Literal["none", "pcgrad", "gradvac"],
        typer.Option(help="What to do about tasks whose gradients point against each other."),
    ] = "none",
    seed: Annotated[int, typer.Option(min=0, help="Decides weights and order.")] = 0,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Train a tiny SmolVLM on three kinds of real records while a pretended GPU runs out of memory."""
    with errors_in_one_line(traceback=traceback):
        start = time.perf_counter()
        demo = _run(out, epochs, memory_gb, formula, surgery, seed)
        _show(demo, time.perf_counter() - start)


def _run(
    out: Path, epochs: int, memory_gb: float, formula: bool, surgery: "Surgery", seed: int
) -> "DemoResult":
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=results(aside=True), transient=True) as progress:
        bar = progress.add_task("reading the corpus, making the model", total=None)
        hush()
        import torch

        from vlmpack.batching.demo import run_demo
        from vlmpack.cli.training_summary import ProgressOfSteps

        torch.set_num_threads(1)  # for so small a model a second thread costs three times the CPU time
        # The summary says how often memory ran out; a warning for each would tear the progress bar.
        logging.getLogger("vlmpack").setLevel(logging.ERROR)
        return run_demo(
            out,
            epochs=epochs,
            memory_gb=memory_gb,
            with_formula=formula,
            surgery=surgery,
            seed=seed,
            callbacks=[ProgressOfSteps(progress, bar)],
        )


def _show(demo: "DemoResult", seconds: float) -> None:
    from vlmpack.cli.training_summary import run_table, task_table

    screen = results()
    screen.print(run_table(demo, seconds))
    screen.print(task_table(demo.pipeline.monitor))
    screen.print(f"report: {demo.result.report}", soft_wrap=True)
