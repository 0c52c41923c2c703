"""`vlmpack index`: one pass over a corpus without a pixel: costs, sizes and tokens of every row."""

from pathlib import Path
from typing import Annotated

import typer

from vlmpack.cli import settings as setting
from vlmpack.cli.console import errors_in_one_line, hush, results
from vlmpack.cli.engine import Address, EngineName, Workers, engine_of, file_progress
from vlmpack.cli.hub import check_hub
from vlmpack.errors import ConfigError


def index(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="Folder of Parquet, Arrow, JSON Lines and tar files; or one."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the index; an older one is brought up to date.")],
    split: Annotated[str, typer.Option(help="Of a data set on the Hugging Face Hub.")] = "train",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of the tokenizer; the demo's where not given.")
    ] = None,
    tile_size: setting.TileSize = 512,
    max_side: setting.MaxSide = 2048,
    resize_to_max_side: setting.ResizeToMaxSide = False,
    patch_size: setting.PatchSize = 16,
    tokens_per_tile: setting.TokensPerTile = 64,
    image_marker: setting.ImageMarker = "<image>",
    key_column: setting.KeyColumn = None,
    min_rating: setting.MinRating = 1,
    chat_template: Annotated[Path | None, typer.Option(help="File with a Jinja chat template.")] = None,
    num_workers: Workers = None,
    engine: EngineName = "pool",
    address: Address = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Index a corpus: what every row costs, from text and image headers. Run again, it reads what is new."""
    with errors_in_one_line(traceback=traceback):
        from vlmpack.offline import IndexSettings, build_index

        hush()
        settings = IndexSettings(
            tokenizer=tokenizer,
            tile_size=tile_size,
            max_side=max_side,
            resize_to_max_side=resize_to_max_side,
            patch_size=patch_size,
            tokens_per_tile=tokens_per_tile,
            image_marker=image_marker,
            key_column=key_column,
            min_rating=min_rating,
            chat_template=None if chat_template is None else chat_template.read_text(encoding="utf-8"),
        )
        files = source if source.exists() else _from_hub(str(source), split)
        with file_progress("files") as advance:
            made = build_index(
                files, out, settings, engine=engine_of(engine, num_workers, address), on_file=advance
            )
        refused = ", ".join(f"{count:,} {reason}" for reason, count in made.refused.most_common())
        results().print(
            f"{made.num_rows:,} rows of {len(made.files):,} files in {out}"
            + (f"; refused: {refused}" if refused else ""),
            soft_wrap=True,
        )


def _from_hub(name: str, split: str) -> list[Path]:
    """Return the files of a data set on the Hub, downloaded into the cache of `datasets`.

    Raises:
        ConfigError: If it can be no name there.
    """
    if name.startswith((".", "/")) or name.count("/") > 1:
        raise ConfigError(f"there is no file or folder {name}")
    check_hub("dataset", name)
    from vlmpack.offline.files import dataset_files

    return dataset_files(name, split)
