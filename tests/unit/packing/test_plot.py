from __future__ import annotations

import io
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tests import fakes
from vlmpack.budget import PackBudget
from vlmpack.errors import ConfigError
from vlmpack.packing import ConstantLengthDataset
from vlmpack.packing.plot import MAX_BARS, PackLayout, plot_packs
from vlmpack.stages import VQADataset

BUDGET = PackBudget(max_tokens=128, max_images=2, max_patches=8)


def layout(*, samples=((0, 40), (41, 100)), tiles=(((5, 10), (10, 15)), ()), num_images=1) -> PackLayout:
    return PackLayout(samples=samples, tiles=tiles, num_images=num_images)


def texts(figure) -> list[str]:
    return [text.get_text() for text in (*figure.texts, *figure.axes[0].texts)]


def extents(figure) -> set[tuple[float, float]]:
    """Return (start, stop) of each rectangle that was drawn."""
    paths = [path for collection in figure.axes[0].collections for path in collection.get_paths()]
    return {(path.get_extents().x0, path.get_extents().x1) for path in paths}


def test_layout_finds_samples_and_tiles_by_their_tokens():
    tokenizer = fakes.tokenizer()
    # 40 x 30 pixels are 2 x 2 tiles of 32 and a global one; 30 x 20 pixels are one tile.
    rows = [
        fakes.row(images=[fakes.jpeg(40, 30)]),
        fakes.row("No picture?"),
        fakes.row(images=[fakes.jpeg(30, 20), fakes.jpeg(20, 30)]),
    ]
    samples = VQADataset(rows, tokenizer, tiling=fakes.SMALL)
    (pack,) = ConstantLengthDataset(samples, seq_length=256, decode=False)
    found = PackLayout.of(pack, samples.image_tokens, fakes.SMALL)

    # A tile begins at its position token, wherever that is, and is 1 + 4 tokens long.
    tokens = tokenizer.convert_ids_to_tokens(pack.input_ids.tolist())
    starts = [at for at, token in enumerate(tokens) if token.startswith(("<row_", "<|global_image|>"))]
    assert [tile for tiles in found.tiles for tile in tiles] == [(at, at + 5) for at in starts]
    # The packer keeps the order of arrival within a pack.
    assert pack.keys == ("0", "1", "2")
    assert [len(tiles) for tiles in found.tiles] == [5, 0, 2]
    assert found.num_images == 3
    # One padding token is appended to each sample.
    assert found.samples[0][0] == 0
    assert [start for start, _ in found.samples[1:]] == [stop + 1 for _, stop in found.samples[:-1]]
    assert found.samples[-1][1] == len(pack) - 1


def test_bars_show_samples_tiles_and_padding_at_their_positions():
    figure = plot_packs([layout()], BUDGET, title="2 samples in 1 pack", patches_per_tile=4)
    assert extents(figure) == {(0, 128), (0, 40), (41, 100), (5, 10), (10, 15)}
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [128, 128]


def test_numbers_stand_beside_the_bars_and_reached_limits_are_bold():
    figure = plot_packs([layout()], BUDGET, title="A title", subtitle="a subtitle", patches_per_tile=4)
    assert {"A title", "a subtitle", "images\nof 2", "tiles\nof 2", "samples"} <= set(texts(figure))
    weights = {
        text.get_text(): text.get_fontweight() for text in figure.axes[0].texts if text.get_text().isdigit()
    }
    assert weights == {
        "2": "bold",
        "1": "normal",
    }  # 2 samples, which have no limit, and 2 of 2 tiles; 1 image


def test_without_limits_the_columns_name_none():
    figure = plot_packs([layout()], PackBudget(max_tokens=128), title="A title")
    assert {"images", "tiles", "samples"} <= set(texts(figure))


def test_only_so_many_packs_are_drawn_and_the_subtitle_says_so():
    figure = plot_packs([layout()] * (MAX_BARS + 5), BUDGET, title="A title", subtitle="a corpus")
    assert "a corpus · the first 20 of 25 packs" in texts(figure)
    assert len(figure.axes[0].get_yticks()) == 20


def test_a_picture_file_is_written_and_no_text_overlaps_another():
    figure = plot_packs([layout()] * 3, BUDGET, title="157 samples in 12 packs", subtitle="the demo corpus")
    file = io.BytesIO()
    figure.savefig(file, dpi=50)
    assert Image.open(file).width == 13 * 50
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # places the legend, at 100 dots an inch
    renderer = canvas.get_renderer()
    legend = figure.legends[0]
    boxes = [
        text.get_window_extent(renderer)
        for text in (
            *figure.texts,
            *figure.axes[0].texts,
            *figure.axes[0].get_xticklabels(),
            *legend.get_texts(),
        )
    ]
    boxes += [axis.label.get_window_extent(renderer) for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis)]
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert overlaps == []
    assert all(box.x0 >= 0 and box.x1 <= 13 * 100 for box in boxes)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ConfigError, match="no pack to draw"):
        plot_packs([], BUDGET, title="A title")


def test_without_matplotlib_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlmpack\[plot\]'"):
        plot_packs([layout()], BUDGET, title="A title")
