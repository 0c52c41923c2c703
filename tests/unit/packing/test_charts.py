"""Charts show the figures at their places, and every word can be read."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from vlmpack.budget import PackBudget, SampleCost
from vlmpack.errors import ConfigError
from vlmpack.packing import PackingReport
from vlmpack.packing.charts import plot_fill, plot_frontier, plot_simulations
from vlmpack.packing.simulate import Simulation

BUDGET = PackBudget(max_tokens=100, max_images=4, max_patches=40)


def report_of(*packs, budget=BUDGET) -> PackingReport:
    """Return a report of packs, each given by its samples' (tokens, images, patches)."""
    report = PackingReport(budget=budget)
    for pack in packs:
        costs = [SampleCost(num_tokens=t, num_images=i, num_patches=p) for t, i, p in pack]
        report.num_read += len(costs)
        report.add_pack(costs, num_tiles=0, num_supervised=0, num_appended=0)
    return report


def run_of(method="auto", lookahead=None, *, num_packs=10, lower_bound=10) -> Simulation:
    packs = [[(60, 1, 8), (30, 1, 8)]] * (num_packs - 1) + [[(20, 0, 0)]]
    return Simulation(
        method=method,
        chosen=method,
        lookahead=lookahead,
        balance=None,
        seconds=0.1,
        attention_per_pack=(0.0, 0, 0),
        lower_bound=lower_bound,
        report=report_of(*packs),
    )


def texts(figure) -> list[str]:
    """Return all that is written, but not the numbers at the axes."""
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [text.get_text() for text in axes.texts]
        found += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
    return found


def boxes(figure):
    """Return the place of each text that is seen, in dots, and the picture's width and height."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    seen = list(figure.texts)
    for axes in figure.axes:
        seen += [*axes.texts, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        low, high = sorted(axes.get_xlim())
        seen += [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    found = {text.get_text(): text.get_window_extent(renderer) for text in seen if text.get_text()}
    return found, figure.get_size_inches() * figure.dpi


def assert_readable(figure) -> None:
    found, (width, height) = boxes(figure)
    assert len(found) > 5
    names = list(found)
    overlaps = [
        (first, second)
        for at, first in enumerate(names)
        for second in names[:at]
        if found[first].overlaps(found[second])
    ]
    assert overlaps == []
    outside = [
        name for name, box in found.items() if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]
    assert outside == []


def points(axes) -> list[tuple[float, float]]:
    """Return what the markers of all lines stand at."""
    return sorted(
        (round(float(x), 6), round(float(y), 6))
        for line in axes.lines
        if line.get_marker() not in {"None", None}
        for x, y in zip(*line.get_data(), strict=True)
    )


def test_the_frontier_stands_at_the_look_aheads_and_the_share_over_the_bound():
    runs = [run_of(lookahead=256, num_packs=12), run_of(lookahead=1024, num_packs=11), run_of(num_packs=11)]
    figure = plot_frontier(runs, subtitle="a workload")
    (axes,) = figure.axes
    # 12 and 11 packs over a bound of 10 are 20 and 10 %; 256 = 2^8, 1,024 = 2^10, then a step and a half.
    assert points(axes) == [(8, 20), (10, 10), (11.5, 10)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "1,024", "whole\ndata set"]
    assert "auto  10.00%" in texts(figure)
    assert "a workload" in texts(figure)
    # Of the two with 11 packs the one with the shorter look-ahead is the better one: 21 samples.
    assert "21 samples in 11 packs, 10.00% over the lower bound: auto, look-ahead 1,024" in texts(figure)


def test_the_frontier_can_show_fill():
    (axes,) = plot_frontier([run_of(lookahead=256)], measure="fill").axes
    # 9 packs of 90 tokens and one of 20, of 10 x 100; images and patches are less full.
    assert points(axes) == [(8, 83)]
    assert axes.get_ylim()[1] == 100


def test_methods_far_apart_are_drawn_on_a_scale_that_shows_both():
    runs = [run_of("best", lookahead, num_packs=1010, lower_bound=1000) for lookahead in (256, 1024)] + [
        run_of("worst", lookahead, num_packs=1300, lower_bound=1000) for lookahead in (256, 1024)
    ]
    (axes,) = plot_frontier(runs).axes
    assert axes.get_yscale() == "log"
    assert points(axes) == [(8, 1), (8, 30), (10, 1), (10, 30)]
    assert {"1", "2", "5", "10", "20"} <= {label.get_text() for label in axes.get_yticklabels()}


@pytest.mark.parametrize("lookaheads", [[None], [256], [64, 256, 1024, 4096, 16384, None]])
def test_names_of_many_methods_do_not_overlap(lookaheads):
    names = [
        "auto",
        "first_fit",
        "best_fit",
        "first_fit_decreasing",
        "worst_fit_decreasing",
        "next_fit",
        "a",
        "b",
    ]
    runs = [run_of(name, lookahead) for name in names for lookahead in lookaheads]
    assert_readable(plot_frontier(runs))


def test_a_frontier_at_the_bound_itself_can_be_drawn():
    (axes,) = plot_frontier([run_of(lookahead=64), run_of(lookahead=128)]).axes
    assert points(axes) == [(6, 0), (7, 0)]


def bars(axes) -> dict[float, float]:
    """Return the height of each bar by its middle."""
    return {
        round(bar.get_x() + bar.get_width() / 2, 6): round(bar.get_height(), 6)
        for bar in axes.patches
        if bar.get_height()
    }


def test_histograms_show_the_share_of_packs_by_hand():
    # 3 packs of 90 tokens and 16 patches, one of 20 tokens without patches.
    figure = plot_fill(run_of(num_packs=4).report)
    tokens, patches, samples = figure.axes
    assert bars(tokens) == {90: 75, 20: 25}
    assert bars(patches) == {16: 75, 0: 25}
    assert bars(samples) == {2: 75, 1: 25}
    # (3 x 90 + 20) / 4 = 72.5 tokens, 48 / 4 = 12 patches, 7 / 4 = 1.75 samples.
    assert tokens.get_title(loc="left") == "mean 72.5  ·  p95 = max 90  ·  limit 100"
    assert patches.get_title(loc="left") == "mean 12.0  ·  p95 = max 16  ·  limit 40"
    assert samples.get_title(loc="left") == "mean 1.8  ·  p95 = max 2"
    assert "Fill: 72.5% tokens, 37.5% images, 30.0% patches" in texts(figure)  # 6 of 4 x 4, 48 of 4 x 40


def test_mean_p95_and_maximum_are_lines_at_their_numbers():
    # 18 of 20 packs have 8 patches, one 16, one 40: the mean is 10, the 19th of 20 has 16.
    packs = [[(10, 1, 8)]] * 18 + [[(10, 1, 16)], [(10, 1, 40)]]
    report = report_of(*packs, budget=PackBudget(max_tokens=100, max_images=4, max_patches=48))
    patches = report.plot().axes[1]
    assert [line.get_xdata()[0] for line in patches.lines] == [10, 16, 40, 48]
    assert patches.get_title(loc="left") == "mean 10.0  ·  p95 16  ·  max 40  ·  limit 48"
    figures = (report.patches_per_pack_mean, report.patches_per_pack_p95, report.patches_per_pack_max)
    assert figures == (10, 16, 40)


def test_few_packs_far_out_do_not_stretch_the_rest():
    # Of 200 packs, one has 1 token and one 95 samples; the others have 90 to 99 tokens and 1 or 2 samples.
    packs = [[(90 + number % 10, 0, 0)] for number in range(197)]
    packs += [[(1, 0, 0)], [(45, 0, 0)] * 2, [(1, 0, 0)] * 95]
    tokens, samples = report_of(*packs).plot().axes
    assert "less" in [text.get_text() for text in tokens.texts]
    assert "more" in [text.get_text() for text in samples.texts]
    assert tokens.get_xlim()[0] > 80
    assert samples.get_xlim()[1] < 10
    for axes in (tokens, samples):
        assert sum(bars(axes).values()) == pytest.approx(100)


def test_many_values_share_bars_and_none_is_lost():
    rng = np.random.default_rng(0)
    packs = [[(int(tokens), 0, 0)] for tokens in rng.integers(1000, 4097, 500)]
    tokens = report_of(*packs, budget=PackBudget(max_tokens=4096)).plot().axes[0]
    assert 10 < len(bars(tokens)) <= 41
    assert sum(bars(tokens).values()) == pytest.approx(100)


def test_texts_without_images_have_no_panel_of_patches():
    figure = report_of([(50, 0, 0)], [(60, 0, 0)]).plot(title="Texts", subtitle="two of them")
    assert [axes.get_xlabel() for axes in figure.axes] == ["tokens a pack", "samples a pack"]
    assert {"Texts", "two of them"} <= set(texts(figure))


def test_an_overview_shows_the_frontier_and_the_best_packs():
    runs = [run_of("auto", 256, num_packs=12), run_of("best", 256, num_packs=11)]
    figure = plot_simulations(runs, subtitle="vlmpack simulate text")
    frontier, _, _, samples = figure.axes
    assert points(frontier) == [(8, 10), (8, 20)]
    assert bars(samples) == {2: pytest.approx(100 * 10 / 11), 1: pytest.approx(100 / 11)}
    assert "21 samples in 11 packs, 10.00% over the lower bound: best, look-ahead 256" in texts(figure)
    assert any(
        text.startswith("The packs of best, look-ahead 256. Fill: 83.6% tokens") for text in texts(figure)
    )
    assert_readable(figure)


def test_one_simulation_needs_no_frontier():
    figure = plot_simulations([run_of()])
    assert len(figure.axes) == 3
    assert_readable(figure)


def test_a_picture_file_is_written():
    file = io.BytesIO()
    plot_simulations([run_of(), run_of(lookahead=64)]).savefig(file, dpi=50)
    assert Image.open(file).width == 13 * 50


def test_nothing_to_draw_is_an_error():
    for draw in (plot_frontier, plot_simulations):
        with pytest.raises(ConfigError, match="no pack to draw"):
            draw([])
    with pytest.raises(ConfigError, match="no pack to draw"):
        PackingReport(budget=BUDGET).plot()


def test_without_matplotlib_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (run_of().report.plot, lambda: plot_frontier([run_of()])):
        with pytest.raises(ConfigError, match=r"pip install 'vlmpack\[plot\]'"):
            draw()


def test_an_unknown_measure_is_refused():
    with pytest.raises(ConfigError, match="measure"):
        plot_frontier([run_of()], measure="speed")
