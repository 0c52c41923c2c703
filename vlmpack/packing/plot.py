"""Plot: packs as bars, a colour a sample, a dark cell a tile, a line at the token budget.

Needs matplotlib, which comes with the extra `plot` and is imported when the first picture is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmpack.budget import PackBudget
    from vlmpack.geometry import Tiling
    from vlmpack.packing.assemble import PackedSequence
    from vlmpack.stages.placeholders import Placeholders

MAX_BARS: Final = 20
"""More bars than this cannot be told apart on a page."""

Span: TypeAlias = tuple[int, int]
"""[start, stop) in positions."""

_COLOURS: Final = (
    ("#c6dbef", "#3b76b5"),
    ("#fddcb5", "#e08214"),
    ("#cbe8cd", "#3f9146"),
    ("#e7d0e8", "#8e4a94"),
    ("#f8cfc8", "#cf4a3f"),
    ("#c8e7e6", "#23888a"),
    ("#ebe0c0", "#96793a"),
)
"""(text, tiles) of one hue; neighbours differ in lightness too, for eyes that see no red and green."""
_TEXT: Final = ("#dcdcdc", "#6e6e6e")
INK: Final = "#222222"
"""Colour of what is to be read first."""
FAINT: Final = "#777777"
"""Colour of what explains it."""
_HALF_BAR: Final = 0.36
_COLUMNS: Final = (("samples", 1.055), ("images", 1.13), ("tiles", 1.205))
"""The numbers beside the bars and where each column is centred, in widths of the axes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackLayout:
    """Where samples and tiles lie in one pack."""

    samples: tuple[Span, ...]
    """Each sample's positions, without appended padding."""
    tiles: tuple[tuple[Span, ...], ...]
    """For each sample, each tile's positions, its position token included."""
    num_images: int
    """Images in the pack."""

    @classmethod
    def of(cls, pack: PackedSequence, tokens: Placeholders, tiling: Tiling) -> PackLayout:
        """Find samples and tiles in a pack by its tokens. O(tokens).

        Args:
            pack: Decoded or not.
            tokens: The image tokens that it was made with.
            tiling: The rule by which its images were cut.
        """
        segment_ids, input_ids = pack.segment_ids.numpy(), pack.input_ids.numpy()
        # Each tile has the same number of image tokens, so every so-many-th of them begins one.
        firsts = np.flatnonzero((input_ids == tokens.anchor) & (segment_ids > 0))[:: tiling.tokens_per_tile]
        samples, tiles = [], []
        for segment in range(1, len(pack.keys) + 1):
            inside = np.flatnonzero(segment_ids == segment)
            start, stop = int(inside[0]), int(inside[-1]) + 1
            own = firsts[(firsts >= start) & (firsts < stop)].tolist()
            samples.append((start, stop))
            tiles.append(tuple((at - tiling.position_tokens, at + tiling.tokens_per_tile) for at in own))
        return cls(samples=tuple(samples), tiles=tuple(tiles), num_images=len(pack.tiles_per_image))


def plot_packs(
    layouts: Sequence[PackLayout],
    budget: PackBudget,
    *,
    title: str,
    subtitle: str = "",
    patches_per_tile: int = 1024,
) -> Figure:
    """Draw packs as horizontal bars, the first `MAX_BARS` of them; `savefig` of the result writes a file.

    Args:
        layouts: In the order of the packs.
        budget: What a pack may hold; its token limit is the line.
        title: The result, in a line.
        subtitle: What it is the result of, in smaller letters.
        patches_per_tile: ViT patches of a tile, as the budget counts patches and the picture tiles.

    Raises:
        ConfigError: If there is no pack, or matplotlib is not installed.
    """
    if not layouts:
        raise ConfigError("there is no pack to draw")
    shown = layouts[:MAX_BARS]
    height = 1.75 + 0.36 * len(shown)  # inches
    figure = figure_class()(figsize=(13, height))
    axes = figure.add_axes((0.055, 0.7 / height, 0.735, 1 - 1.7 / height))
    for row, layout in enumerate(shown):
        _draw_bar(axes, row, layout, budget.max_tokens)
    _draw_numbers(axes, shown, budget, patches_per_tile)
    _draw_frame(axes, len(shown), budget.max_tokens)
    _draw_legend(axes, height)
    if len(shown) < len(layouts):
        subtitle += f"{' · ' if subtitle else ''}the first {len(shown)} of {len(layouts):,} packs"
    figure.text(0.02, 1 - 0.36 / height, title, fontsize=15, fontweight="bold", color=INK, va="center")
    figure.text(0.02, 1 - 0.66 / height, subtitle, fontsize=10.5, color=FAINT, va="center")
    return figure


def figure_class() -> type[Figure]:
    """Return matplotlib's class of figures: imported here, by whoever draws first.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("pictures need matplotlib: pip install 'vlmpack[plot]'") from error
    return Figure


def _draw_bar(axes: Axes, row: int, layout: PackLayout, max_tokens: int) -> None:
    band = (row - _HALF_BAR, 2 * _HALF_BAR)
    gap = min(0.8, 5000 / max_tokens)  # points; a bar is 688 of them long
    axes.broken_barh(
        [(0, max_tokens)], band, facecolor="white", edgecolor="#c9c9c9", hatch="//////", linewidth=0
    )
    for number, (span, tiles) in enumerate(zip(layout.samples, layout.tiles, strict=True)):
        text_colour, tile_colour = _COLOURS[(number + 3 * row) % len(_COLOURS)]
        axes.broken_barh([_extent(span)], band, facecolor=text_colour, edgecolor="white", linewidth=gap)
        axes.broken_barh(
            [_extent(tile) for tile in tiles], band, facecolor=tile_colour, edgecolor="white", linewidth=gap
        )


def _extent(span: Span) -> tuple[int, int]:
    return span[0], span[1] - span[0]


def _draw_numbers(
    axes: Axes, layouts: Sequence[PackLayout], budget: PackBudget, patches_per_tile: int
) -> None:
    """Write samples, images and tiles beside each bar; a limit that is reached is bold."""
    max_tiles = None if budget.max_patches is None else budget.max_patches // patches_per_tile
    limits = (None, budget.max_images, max_tiles)
    beside = axes.get_yaxis_transform()
    for (name, x), limit in zip(_COLUMNS, limits, strict=True):
        head = name if limit is None else f"{name}\nof {limit:,}"
        axes.text(x, -0.72, head, transform=beside, ha="center", va="bottom", fontsize=10, color=FAINT)
    for row, layout in enumerate(layouts):
        counts = (len(layout.samples), layout.num_images, sum(map(len, layout.tiles)))
        for (_, x), count, limit in zip(_COLUMNS, counts, limits, strict=True):
            weight = "bold" if limit is not None and count >= limit else "normal"
            axes.text(
                x,
                row,
                f"{count:,}",
                transform=beside,
                ha="center",
                va="center",
                color=INK,
                fontweight=weight,
            )


def _draw_frame(axes: Axes, num_bars: int, max_tokens: int) -> None:
    axes.axvline(max_tokens, color=INK, linewidth=1.6, linestyle=(0, (4, 2)))
    axes.text(
        max_tokens, -0.72, f"budget: {max_tokens:,} tokens ", ha="right", va="bottom", fontsize=10, color=INK
    )
    axes.set_xlim(0, max_tokens * 1.002)
    axes.set_ylim(num_bars - 0.5, -0.6)
    axes.set_yticks(range(num_bars), [str(row + 1) for row in range(num_bars)])
    ticks = [round(max_tokens * share / 4) for share in range(5)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("position in the pack, in tokens", color=FAINT, loc="left")
    axes.set_ylabel("pack", color=FAINT)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_legend(axes: Axes, height: float) -> None:
    from matplotlib.patches import Patch

    text, tile = _TEXT
    handles = [
        Patch(facecolor=text, label="text tokens; a colour a sample"),
        Patch(facecolor=tile, label="image tokens; a cell a tile"),
        Patch(facecolor="white", edgecolor="#c9c9c9", hatch="//////", linewidth=0, label="padding"),
    ]
    axes.figure.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(0.8, 0.2 / height),
        ncols=3,
        frameon=False,
        fontsize=10,
    )
