"""`vlmpack pack`: the main job on any data set, with a report and, if asked for, packed shards."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmpack.cli import settings as setting
from vlmpack.cli.console import (
    STANDARD_OUTPUT,
    check_folder,
    errors_in_one_line,
    hush,
    results,
    write_json,
)
from vlmpack.errors import SourceError

if TYPE_CHECKING:
    from vlmpack.pipeline import Pipeline, PipelineConfig


def pack(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="A Parquet, JSON or JSON Lines file; a folder of them, of save_to_disk, or of images with a "
            "metadata.jsonl; or, with --streaming, a name on the Hugging Face Hub.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write packed Parquet shards into this empty folder.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--json", metavar="FILE|-", help="Write the report as JSON; - prints it.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, or name on the Hub; the demo's tokenizer where not given.")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="File with a Jinja chat template.")] = None,
    split: Annotated[str | None, typer.Option(help="The only one or train where not given.")] = None,
    subset: Annotated[str | None, typer.Option(help="For data sets that have several.")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read files as they come, without a copy in the cache.")
    ] = False,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Take only so many rows.")] = None,
    seq_length: setting.SeqLength = 4096,
    max_images: setting.MaxImages = 18,
    max_patches: setting.MaxPatches = None,
    append_pad: setting.AppendPad = True,
    max_sample_length: setting.MaxSampleLength = None,
    max_images_per_example: setting.MaxImagesPerExample = 4,
    oversize: setting.Oversize = "drop",
    min_rating: setting.MinRating = 1,
    tile_size: setting.TileSize = 512,
    max_side: setting.MaxSide = 2048,
    resize_to_max_side: setting.ResizeToMaxSide = False,
    patch_size: setting.PatchSize = 16,
    tokens_per_tile: setting.TokensPerTile = 64,
    image_marker: setting.ImageMarker = "<image>",
    image_root: setting.ImageRoot = None,
    key_column: setting.KeyColumn = None,
    shuffle_seed: setting.ShuffleSeed = None,
    shuffle_window: setting.ShuffleWindow = 1024,
    max_refusal_ratio: setting.MaxRefusalRatio = None,
    warn_refusal_ratio: setting.WarnRefusalRatio = None,
    account: setting.Account = None,
    method: setting.Method = "auto",
    lookahead: setting.Lookahead = 4096,
    seed: setting.Seed = 0,
    decode: setting.Decode = True,
    decode_threads: setting.DecodeThreads = 2,
    num_workers: setting.NumWorkers = 0,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Pack a vision-language data set and say how full the packs are and what became of every row."""
    arguments = dict(locals())  # taken first: these are the options by name
    with errors_in_one_line(traceback=traceback):
        _pack(arguments)


def _pack(arguments: Mapping[str, Any]) -> None:
    from vlmpack.cli.job import run_job
    from vlmpack.cli.summary import refusal_table, show_summary
    from vlmpack.packing.shards import ShardWriter

    out, report_file = arguments["out"], arguments["report"]
    check_folder("--json", report_file)
    hush()
    messages = results(aside=True)
    made_by = {name: value for name, value in arguments.items() if value is not None}
    with nullcontext() if out is None else ShardWriter(out, settings=made_by) as writer:
        pipeline, config = _prepare(arguments)
        pipeline.packs.keep_images = writer is not None
        each = _ignore if writer is None else writer.write
        try:
            seconds = run_job(pipeline, each, config=config, console=messages)
        except SourceError:
            if pipeline.report.num_refused and not pipeline.report.num_packs:
                messages.print(refusal_table(pipeline.report))
                write_json(pipeline.report.as_dict(), report_file)
            raise
    screen = results(aside=report_file == STANDARD_OUTPUT)
    show_summary(screen, pipeline.report, title=f"Packed {arguments['dataset']}", seconds=seconds)
    if writer is not None:
        size = sum(file.stat().st_size for file in writer.files)
        screen.print(
            f"{len(writer.files)} shard{'s' * (len(writer.files) > 1)}, {size / 2**20:,.1f} MiB, in {out}",
            soft_wrap=True,
        )
    write_json(pipeline.report.as_dict(), report_file)


def _prepare(arguments: Mapping[str, Any]) -> tuple["Pipeline", "PipelineConfig"]:
    """Return the pipeline and the settings that it was built with."""
    from vlmpack.cli.source import open_source
    from vlmpack.cli.tokenizer import open_tokenizer
    from vlmpack.pipeline import build_pipeline

    values = dict(arguments)
    if values["chat_template"] is not None:
        values["chat_template"] = values["chat_template"].read_text(encoding="utf-8")
    setting.config_of(values)  # settings are checked before anything is read
    source = open_source(
        values["dataset"],
        **{name: values[name] for name in ("split", "subset", "streaming", "max_rows")},
    )
    values["image_root"] = values["image_root"] or source.folder
    if values["streaming"]:  # a Hugging Face stream cannot be split further than its files
        values["num_workers"] = min(
            values["num_workers"], getattr(source.rows, "num_shards", values["num_workers"])
        )
    config = setting.config_of(values)
    pipeline = build_pipeline(source.rows, open_tokenizer(values["tokenizer"], config.tiling()), config)
    return pipeline, config


def _ignore(_pack: object) -> None:
    """Do nothing: the report has counted the pack."""
