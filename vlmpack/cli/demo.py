"""`vlmpack demo`: the main job on the corpus that comes with the package, and a picture of the packs."""

from pathlib import Path
from typing import Annotated

import typer

from vlmpack.cli.console import errors_in_one_line, hush, results

MAX_TILES = 48
"""Tiles that a pack of the demo may hold: what 49,152 patches of the vision encoder are."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path(),
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Pack 162 real records with a real tokenizer, without network, and draw the packs."""
    with errors_in_one_line(traceback=traceback):
        _demo(out)


def _demo(out: Path) -> None:
    from vlmpack.cli.job import run_job
    from vlmpack.cli.summary import show_summary
    from vlmpack.cli.tokenizer import open_tokenizer
    from vlmpack.corpus import load_corpus
    from vlmpack.geometry import Tiling
    from vlmpack.packing.plot import PackLayout, plot_packs
    from vlmpack.pipeline import PipelineConfig, build_pipeline

    hush()
    out.mkdir(parents=True, exist_ok=True)
    config = PipelineConfig(max_patches=MAX_TILES * Tiling().patches_per_tile)
    tiling = config.tiling()
    pipeline = build_pipeline(load_corpus(), open_tokenizer(None, tiling), config)
    layouts: list[PackLayout] = []
    seconds = run_job(
        pipeline,
        lambda pack: layouts.append(PackLayout.of(pack, pipeline.samples.image_tokens, tiling)),
        config=config,
        console=results(aside=True),
    )
    report = pipeline.report
    figure = plot_packs(
        layouts,
        pipeline.packs.budget,
        title=f"{report.num_packed:,} samples in {report.num_packs:,} packs: {1 - report.padding:.1%} of all "
        f"positions used, {1 - report.padding_unpacked:.1%} with one sample a row",
        subtitle="vlmpack demo: photographs, charts, drawings and pages, up to 4 images a sample",
        patches_per_tile=tiling.patches_per_tile,
    )
    picture = out / "demo-packs.png"
    figure.savefig(picture, dpi=150)
    screen = results()
    show_summary(screen, report, title="Packed the corpus that comes with vlmpack", seconds=seconds)
    screen.print(f"picture of the packs: {picture}", soft_wrap=True)
