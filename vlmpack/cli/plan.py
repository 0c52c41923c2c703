"""`vlmpack plan`: which rows of an index share a pack, under budgets that a GPU sets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlmpack.cli import settings as setting
from vlmpack.cli.console import errors_in_one_line, results
from vlmpack.cli.engine import file_progress
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from vlmpack.offline import PlanFolder

MIB = 2**20


def plan(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder that `vlmpack index` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the plan; an older one is replaced.")],
    seq_length: setting.SeqLength = 4096,
    max_images: setting.MaxImages = 18,
    max_patches: setting.MaxPatches = None,
    gpu: Annotated[
        str | None, typer.Option(help="Derive --max-patches from this GPU's memory, such as H100.")
    ] = None,
    model: Annotated[str, typer.Option(help="Of --gpu: a preset's name, or a config.json.")] = "nanovlm-460m",
    rows: Annotated[int, typer.Option(min=1, help="Of --gpu: packs of a batch on one device.")] = 1,
    max_sample_length: setting.MaxSampleLength = None,
    max_images_per_example: setting.MaxImagesPerExample = 4,
    append_pad: setting.AppendPad = True,
    method: setting.Method = "auto",
    balance: Annotated[
        Literal["patches", "attention", "both"] | None, typer.Option(help="Make packs alike in these.")
    ] = None,
    seed: setting.Seed = 0,
    group_mib: Annotated[
        int, typer.Option(min=0, help="MiB of files that are planned together; 0 plans all at once.")
    ] = 512,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Plan packs from an index alone: no image and no text is read."""
    with errors_in_one_line(traceback=traceback):
        from vlmpack.offline import PlanSettings, build_plan

        settings = PlanSettings(
            seq_length=seq_length,
            max_images=max_images,
            max_patches=_patches(gpu, model, rows, seq_length, max_patches),
            max_sample_length=max_sample_length,
            max_images_per_example=max_images_per_example,
            append_pad=append_pad,
            method=method,  # type: ignore[arg-type]  # checked there
            balance=balance,
            seed=seed,
            group_bytes=group_mib * MIB,
        )
        with file_progress("groups") as advance:
            made = build_plan(index, out, settings, on_group=lambda done, total: advance(done, total))
        _show(made, out)


def _patches(gpu: str | None, model: str, rows: int, seq_length: int, max_patches: int | None) -> int | None:
    """Return the patches that a pack may hold.

    Raises:
        ConfigError: If both a GPU and a number are given.
    """
    if gpu is None:
        return max_patches
    if max_patches is not None:
        raise ConfigError("give --gpu, which derives the patches, or --max-patches, not both")
    from vlmpack.budget import PackBudget

    return PackBudget.for_gpu(gpu, model, max_tokens=seq_length, rows=rows).max_patches


def _show(made: "PlanFolder", out: Path) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 3))
    over = made.num_packs / made.lower_bound - 1
    table.add_row("packs", f"{made.num_packs:,}", f"{over:.2%} over the lower bound of {made.lower_bound:,}")
    table.add_row("samples", f"{made.num_samples:,}", f"of {made.index.num_rows:,} rows")
    if len(made.groups) > 1 and made.global_packs is not None:
        price = made.num_packs / made.global_packs - 1
        table.add_row("groups", f"{len(made.groups):,}", f"planning them apart costs {price:.2%} more packs")
    patches = made.settings.max_patches
    table.add_row("patches a pack", "no limit" if patches is None else f"{patches:,}", "at most")
    for reason, count in made.refused.items():
        table.add_row(f"refused: {reason}", f"{count:,}", "")
    results().print(table)
    results().print(f"in {out}", soft_wrap=True)
