"""`vlmpack report` and `vlmpack inspect`: look at packs, in a browser or in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from vlmpack.cli.console import check_folder, errors_in_one_line, hush, results


def report(
    where: Annotated[
        Path,
        typer.Argument(
            metavar="WHERE", help="Folder of packs or of a plan, or a JSON report of `vlmpack pack`."
        ),
    ],
    html: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    gpu: Annotated[str | None, typer.Option(help="Draw what this GPU takes, such as H100.")] = None,
    model: Annotated[str, typer.Option(help="Of --gpu: a preset's name, or a config.json.")] = "nanovlm-460m",
    rows: Annotated[int, typer.Option(min=1, help="Of --gpu: packs of a batch on one device.")] = 1,
    packs: Annotated[int, typer.Option(min=1, help="Packs to look into.")] = 24,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Write one page about packs: fill, refusals, balance, and the packs themselves to click through."""
    with errors_in_one_line(traceback=traceback):
        check_folder("--html", html)
        from vlmpack.report import write_report

        hush()
        figures = write_report(where, html, gpu=gpu, model=model, rows=rows, num_packs=packs)
        results().print(
            f"{figures.num_samples:,} samples in {figures.num_packs:,} packs: {html}", soft_wrap=True
        )


def inspect(
    where: Annotated[Path, typer.Argument(metavar="PACKED", help="Folder that `vlmpack prepack` wrote.")],
    pack: Annotated[int, typer.Option(min=0, help="Number of the pack.")] = 0,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Show one pack: its samples, what they cost, and their text with what is learnt in green."""
    with errors_in_one_line(traceback=traceback):
        hush()
        _inspect(where, pack)


def _inspect(where: Path, number: int) -> None:
    """Print a pack.

    Raises:
        ConfigError: If there is no such pack.
    """
    from rich.text import Text

    from vlmpack.errors import ConfigError
    from vlmpack.offline import load_packed
    from vlmpack.report.viewer import CHARACTERS, words_of

    packed = load_packed(where, decode=False)
    if number >= len(packed):
        raise ConfigError(f"--pack: {where} has packs 0 to {len(packed) - 1}, not {number}")
    tokenizer = packed.load_tokenizer()
    image_ids, found, screen = packed.image_ids(tokenizer), packed[number], results()
    cost = found.cost
    screen.print(
        f"pack {number}: {len(found.keys)} samples, {cost.num_tokens:,} of {packed.budget.max_tokens:,} "
        f"tokens, {cost.num_images} images, {sum(found.tiles_per_image)} tiles, {cost.num_patches:,} patches",
        soft_wrap=True,
    )
    for place, (key, each) in enumerate(zip(found.keys, found.costs, strict=True), start=1):
        costs = f"  {each.num_tokens:,} tokens, {each.num_images} images"
        screen.print("", Text.assemble((key, "bold"), costs), sep="\n")
        inside = found.segment_ids == place
        text = Text()
        for words in words_of(found.input_ids[inside], found.labels[inside], tokenizer, image_ids):
            text.append(words.text, style="green" if words.is_learnt else "")
        screen.print(text[:CHARACTERS], soft_wrap=True)
