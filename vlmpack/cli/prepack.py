"""`vlmpack prepack`: the packs of a plan as Parquet shards, on this machine or a Ray cluster."""

from pathlib import Path
from typing import Annotated

import typer

from vlmpack.cli.console import errors_in_one_line, hush, results
from vlmpack.cli.engine import Address, EngineName, Workers, engine_of, file_progress


def prepack(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Folder that `vlmpack plan` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the packs; a run that was stopped goes on in it.")],
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Store uint8 tiles, many times as large, instead of images.")
    ] = False,
    num_workers: Workers = None,
    engine: EngineName = "pool",
    address: Address = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Write the packs of a plan. Whatever stops it, the same command goes on where it was."""
    with errors_in_one_line(traceback=traceback):
        from vlmpack.offline import prepack as write_packs

        hush()
        with file_progress("shards") as advance:
            manifest = write_packs(
                plan, out, pixels=pixels, engine=engine_of(engine, num_workers, address), on_shard=advance
            )
        screen = results()
        size = sum(row["bytes"] for row in manifest["shards"])
        screen.print(
            f"{manifest['packs']:,} packs of {manifest['samples']:,} samples in {len(manifest['shards']):,} "
            f"shards, {size / 2**20:,.1f} MiB, in {out}",
            soft_wrap=True,
        )
        for row in manifest["shards"]:
            for refusal in row["refused"]:
                screen.print(
                    f"refused {refusal['key']} ({refusal['reason']}): {refusal['message']}", soft_wrap=True
                )
