"""The options that stand for the settings of `PipelineConfig`, and how they become one.

Names and defaults repeat those of `PipelineConfig`, which would cost seconds to import for `--help`; a
test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmpack.pipeline import PipelineConfig


def _limit(text: str | int) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor 'none'") from None


def _marker(text: str) -> str | None:
    return None if text == "none" else text


def _option(help_text: str, panel: str, **more: Any) -> Any:
    return typer.Option(help=help_text, rich_help_panel=panel, **more)


def _limit_option(help_text: str, panel: str) -> Any:
    return _option(help_text, panel, parser=_limit, metavar="N|none")


_BUDGET = "What a pack may hold"
_SAMPLE = "Which samples are packed"
_IMAGES = "How images are cut"
_DATA = "How rows are read"
_WORK = "How the work is done"

SeqLength: TypeAlias = Annotated[int, _option("Tokens.", _BUDGET)]
MaxImages: TypeAlias = Annotated[int | None, _limit_option("Images.", _BUDGET)]
MaxPatches: TypeAlias = Annotated[
    int | None,
    _limit_option(
        "Patches of the vision encoder, 1,024 a tile of 512 pixels: they decide its memory.", _BUDGET
    ),
]
MaxTiles: TypeAlias = Annotated[
    int | None, _limit_option("Tiles of images; --max-patches says the same in patches.", _BUDGET)
]
PatchesPerTile: TypeAlias = Annotated[
    int, _option("Patches of a tile: 1,024 where it has 512 pixels a side and a patch 16.", _BUDGET)
]
AppendPad: TypeAlias = Annotated[bool, _option("Append a padding token to each sample.", _BUDGET)]

MaxSampleLength: TypeAlias = Annotated[
    int | None, _limit_option("Refuse samples with this many tokens or more.", _SAMPLE)
]
MaxImagesPerExample: TypeAlias = Annotated[
    int | None, _limit_option("Refuse samples with more images.", _SAMPLE)
]
Oversize: TypeAlias = Annotated[
    str,
    _option(
        "For samples that are over a limit alone: drop, truncate_text, fewer_tiles (of images) or raise.",
        _SAMPLE,
        metavar="POLICY",
    ),
]
MinRating: TypeAlias = Annotated[
    int, _option("Leave out turns rated lower, in data sets that rate turns.", _SAMPLE)
]

TileSize: TypeAlias = Annotated[int, _option("Side of a tile in pixels.", _IMAGES)]
MaxSide: TypeAlias = Annotated[int, _option("Longest side of an image in pixels.", _IMAGES)]
ResizeToMaxSide: TypeAlias = Annotated[bool, _option("Scale small images up to it, too.", _IMAGES)]
PatchSize: TypeAlias = Annotated[int, _option("Side of a patch of the vision encoder in pixels.", _IMAGES)]
TokensPerTile: TypeAlias = Annotated[int, _option("Image tokens a tile.", _IMAGES)]

ImageMarker: TypeAlias = Annotated[
    str | None,
    _option("What stands for an image in the text.", _DATA, parser=_marker, metavar="TEXT|none"),
]
KeyColumn: TypeAlias = Annotated[
    str | None, _option("Column that names a row in reports; its position where not given.", _DATA)
]
ImageRoot: TypeAlias = Annotated[
    Path | None,
    _option("Folder that image paths may lead into; the data set's own where not given.", _DATA),
]

ShuffleSeed: TypeAlias = Annotated[
    int | None, _option("Shuffle the rows; they stay in order where not given.", _DATA)
]
ShuffleWindow: TypeAlias = Annotated[
    int, _option("Rows that are shuffled together where they come as a stream.", _DATA)
]
MaxRefusalRatio: TypeAlias = Annotated[
    float | None,
    _option("Stop when more rows are refused, from 100 rows on: 0.05 for 5 %.", _SAMPLE, metavar="RATIO"),
]
WarnRefusalRatio: TypeAlias = Annotated[
    float | None, _option("Warn when more of the rows are refused.", _SAMPLE, metavar="RATIO")
]
Account: TypeAlias = Annotated[
    Path | None,
    _option("Write what became of each row into Parquet files in this folder.", _DATA, metavar="FOLDER"),
]

Method: TypeAlias = Annotated[str, _option("Packing algorithm.", _WORK, metavar="NAME")]
Lookahead: TypeAlias = Annotated[
    int, _option("Samples that may wait for a pack: more fill packs better.", _WORK)
]
Seed: TypeAlias = Annotated[int, _option("Decides the order of packs.", _WORK)]
Decode: TypeAlias = Annotated[
    bool, _option("Decode every image, which finds broken ones; without, plan from headers only.", _WORK)
]
DecodeThreads: TypeAlias = Annotated[int, _option("Threads that decode images, in each process.", _WORK)]
NumWorkers: TypeAlias = Annotated[
    int, _option("Processes that read and tokenise; each packs its own part of the rows.", _WORK)
]


def config_of(values: Mapping[str, object]) -> PipelineConfig:
    """Return the settings among a command's arguments as a checked `PipelineConfig`.

    Args:
        values: A command's arguments; those that are no setting of the pipeline are left out.

    Raises:
        ConfigError: If a value is invalid, in the words of the command line.
    """
    from pydantic import ValidationError

    from vlmpack.pipeline import PipelineConfig

    known = {name: value for name, value in values.items() if name in PipelineConfig.model_fields}
    try:
        return PipelineConfig(**known)  # type: ignore[arg-type]
    except ValidationError as error:
        faults = [
            (option_name(str(fault["loc"][0])), fault["msg"].removeprefix("Input should "), fault["input"])
            for fault in error.errors()
        ]
        raise ConfigError(
            "; ".join(f"{name} must {what}, got {got!r}" for name, what, got in faults)
        ) from error


def option_name(setting: str) -> str:
    """Return the option of a setting: `seq_length` -> `--seq-length`."""
    return f"--{setting.replace('_', '-')}"
