"""Job: the pipeline from its first row to its last pack, with a line that shows how far it is."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from torch.utils.data import DataLoader

from vlmpack.budget import PackBudget
from vlmpack.errors import SourceError
from vlmpack.packing import plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from vlmpack.packing import PackedSequence, PackingReport
    from vlmpack.pipeline import Pipeline, PipelineConfig


def run_job(
    pipeline: Pipeline,
    each: Callable[[PackedSequence], object],
    *,
    config: PipelineConfig,
    console: Console,
) -> float:
    """Make every pack, hand it on without its tiles, and return the seconds that it took.

    Args:
        pipeline: Its report is final afterwards.
        each: Called with each pack, in this process.
        config: What the pipeline was built with.
        console: Where the progress is shown if it is a terminal.

    Raises:
        SourceError: If no pack came out.
    """
    with console.status("compiling the packing kernel"):  # here, not in each worker again
        plan(
            np.ones((1, 3), np.int64),
            PackBudget(max_tokens=1, max_images=1, max_patches=1),
            method=config.method,
        )
    started_s = time.monotonic()
    loader: DataLoader[PackedSequence] = DataLoader(
        pipeline.packs,
        batch_size=None,
        num_workers=config.num_workers,
        collate_fn=_without_tiles,  # type: ignore[arg-type]  # without batches it takes one pack
    )
    packs = iter(loader)  # forks the workers, before the display starts a thread
    num_rows = pipeline.samples.num_rows
    shown: AbstractContextManager[object] = nullcontext()
    if console.is_terminal:
        spinner = Spinner("dots")
        shown = Live(
            # Called in the display's thread. Reading counters that another thread is adding to gives
            # figures of about now, which is all that is asked for.
            get_renderable=lambda: progress_line(pipeline.report, num_rows, spinner),
            console=console,
            refresh_per_second=5,
            transient=True,
        )
    with shown:
        for pack in packs:
            each(pack)
    if not pipeline.report.num_packs:  # with several workers none can say so
        read = pipeline.report.num_read
        raise SourceError(
            f"none of {read:,} rows can be packed" if read else "the data set is empty: it yielded no row"
        )
    return time.monotonic() - started_s


def progress_line(report: PackingReport, num_rows: int | None, spinner: Spinner | None = None) -> Table:
    """Return one line with what was read and made so far.

    Args:
        report: The counts so far.
        num_rows: Rows in all, None for a stream.
        spinner: Shows that something is going on.
    """
    done = f"{report.num_read:,} rows" if num_rows is None else f"{report.num_read:,} of {num_rows:,} rows"
    fill = report.fill["tokens"]
    figures = [f"{report.num_packs:,} packs"]
    figures += [] if fill is None else [f"{fill:.1%} full"]
    figures += [f"{report.total_refused:,} refused"]
    line = Table.grid(padding=(0, 1))
    line.add_row(
        spinner or "",
        ProgressBar(total=num_rows, completed=report.num_read, width=24, pulse=num_rows is None),
        done,
        "·",
        " · ".join(figures),
    )
    return line


def _without_tiles(pack: PackedSequence) -> PackedSequence:
    """Leave the pixels behind in the worker: 0.8 MB a tile, which nobody asked for."""
    return replace(pack, tiles=torch.empty((0, *pack.tiles.shape[1:]), dtype=torch.uint8))
