"""`vlmpack estimate`: what a training step takes of a GPU, whether it fits, and what to do if it does not.

Needs neither torch nor numba, but for `--measure`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmpack.cli import regime as setting
from vlmpack.cli.console import STANDARD_OUTPUT, check_folder, errors_in_one_line, results, write_json
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from vlmpack.cli.question import Question

_BATCH = "The batch"


def estimate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A preset such as nanovlm-460m or qwen2.5-vl-3b, a config.json, or a folder with one.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME|BYTES", help="H100, 4090, A100-40, ..., or its memory: 24GiB."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Packs of a batch on one GPU.", rich_help_panel=_BATCH)] = 1,
    tokens: Annotated[int, typer.Option(help="Positions of a pack.", rich_help_panel=_BATCH)] = 4096,
    tiles: Annotated[
        float | None,
        typer.Option(
            help="Tiles of the batch; as many as the tokens allow where not given.", rich_help_panel=_BATCH
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(help="Images of the batch, instead of tiles.", rich_help_panel=_BATCH),
    ] = None,
    side: Annotated[
        int, typer.Option(help="Longest side of these images in pixels.", rich_help_panel=_BATCH)
    ] = 2048,
    position_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, help="Tokens that say where a tile lies; the model's own.", rich_help_panel=_BATCH
        ),
    ] = None,
    tile_size: Annotated[
        int | None, typer.Option(help="Side of a tile; the config's own.", rich_help_panel=_BATCH)
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Take a config without vision.", rich_help_panel=_BATCH)
    ] = False,
    margin: Annotated[float, typer.Option(help="Share of the peak that is left free.")] = 0.03,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay", help="Replay the step in the allocator: what is reserved, and a closer limit."
        ),
    ] = False,
    weights: setting.Weights = "fp32",
    autocast: setting.Autocast = "bf16",
    gradients: setting.Gradients = None,
    optimizer: setting.Optimizer = "adamw_foreach",
    optimizer_state: setting.OptimizerState = None,
    master_weights: setting.MasterWeights = False,
    frozen: setting.Frozen = None,
    lora_rank: setting.LoraRank = None,
    lora_targets: setting.LoraTargets = "attention",
    lora_dtype: setting.LoraDtype = None,
    lora_dropout: setting.LoraDropout = False,
    input_gradients: setting.InputGradients = False,
    checkpoint_vision: setting.CheckpointVision = False,
    checkpoint_language: setting.CheckpointLanguage = False,
    vision_sub_batch: setting.VisionSubBatch = None,
    attention: setting.Attention = "sdpa",
    mask: setting.Mask = "packed",
    cross_entropy: setting.CrossEntropy = "full",
    loss_chunk: setting.LossChunk = 1024,
    holds_logits: setting.HoldsLogits = False,
    accumulation: setting.Accumulation = False,
    sharding: setting.Sharding = "none",
    shards: setting.Shards = 1,
    expandable_segments: setting.ExpandableSegments = False,
    workspace_bytes: setting.WorkspaceBytes = 2 * 32 * 2**20,
    context_bytes: setting.ContextBytes = 600 * 2**20,
    report: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - prints them."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw memory against tiles; .pdf and .svg work too."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a real step of MODEL's config here, and compare.")
    ] = False,
    worked_example: Annotated[
        bool,
        typer.Option("--worked-example", help="Show the reference pipeline's worst case and its errata."),
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Say what a training step takes of a GPU, whether it fits, and what helps. Needs no GPU."""
    arguments = dict(locals())  # taken first: these are the options by name
    with errors_in_one_line(traceback=traceback):
        if worked_example:
            _worked_example(arguments)
        else:
            _estimate(arguments)


def _worked_example(arguments: Mapping[str, Any]) -> None:
    """Show what the reference document says of nanoVLM-460M, and what is right of it.

    Raises:
        ConfigError: If a model is named: the example is about one model.
    """
    from dataclasses import asdict

    from vlmpack.cli.estimate_tables import show_worked_example
    from vlmpack.memory.worst_case import worked_example

    if arguments["model"] is not None:
        raise ConfigError(f"--worked-example is about nanovlm-460m; leave {arguments['model']!r} out")
    lines = worked_example()
    show_worked_example(results(aside=arguments["report"] == STANDARD_OUTPUT), lines)
    write_json({"lines": [asdict(line) for line in lines]}, arguments["report"])


def _estimate(arguments: Mapping[str, Any]) -> None:
    from vlmpack.cli.estimate_tables import show_answer
    from vlmpack.cli.question import ask

    report, plot = arguments["report"], arguments["plot"]
    check_folder("--json", report)
    check_folder("--plot", plot)
    question = ask(arguments)
    answer = question.answer()
    screen = results(aside=report == STANDARD_OUTPUT)
    show_answer(screen, answer)
    figures = answer.as_dict()
    if arguments["measure"]:
        figures["measured"] = _measure(arguments, question, screen)
    write_json(figures, report)
    if plot is not None:
        _plot(plot, question)
    if answer.shortage is not None:
        raise ConfigError(answer.shortage)


def _plot(file: Path, question: "Question") -> None:
    """Draw memory against tiles.

    Raises:
        ConfigError: If no GPU is named, whose line belongs into the picture.
    """
    from vlmpack.memory.plot import draw_tiles

    if question.gpu is None:
        raise ConfigError("--plot draws the GPU's line: name it by --gpu")
    draw_tiles(
        file,
        question.model,
        question.regime,
        question.gpu,
        rows=question.rows,
        tokens_per_row=question.tokens,
        margin=question.margin,
    )


def _measure(arguments: Mapping[str, Any], question: "Question", screen: "Console") -> dict[str, Any]:
    from vlmpack.cli.estimate_tables import show_measurement
    from vlmpack.memory.real_step import measure_config

    found = measure_config(
        arguments["model"],
        question.model,
        question.regime,
        rows=question.rows,
        tokens_per_row=question.tokens,
        tiles=question.tiles,
    )
    show_measurement(screen, found)
    return found.as_dict()
