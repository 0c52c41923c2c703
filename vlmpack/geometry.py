"""(height, width) -> resize target, tile grid, tiles, ViT patches and image tokens.

Everything that needs to know how an image is cut asks this file: the resizer, the placeholder
expansion, the packer's costs and the memory model. Pure integers and floats; no image library.

         600 x 800 picture                  resized to 1024 x 1024, grid 2 x 2
        +----------------+                 +-------+-------+        +-------+
        |                |   resize_target | tile1 | tile2 |   +    |global |   = 5 tiles
        |                |  ------------>  +-------+-------+        +-------+     5 x 1024 patches
        +----------------+                 | tile3 | tile4 |                      5 x (64 + 1) tokens
                                           +-------+-------+
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def resize_target(
    height: int, width: int, *, tile_size: int, max_side: int, resize_to_max_side: bool = False
) -> tuple[int, int]:
    """Return the (height, width) that a picture is resized to before it is cut into tiles.

    The longer side becomes `max_side`, or the next multiple of `tile_size` capped at `max_side`; the
    shorter side keeps the aspect ratio and is rounded up to a multiple of `tile_size`.

    The arithmetic is float and left to right, as in the reference pipeline (nanoVLM's DynamicResize).
    Exact integers would differ: 364 x 273 pixels, for instance, would get 1536 instead of 2048 rows.
    For some square pictures the rounding carries the shorter side over `max_side`, by one tile.

    Args:
        height: Pixels, at least 1.
        width: Pixels, at least 1.
        tile_size: Side of a tile in pixels.
        max_side: Upper limit of the longer side in pixels, a multiple of `tile_size`.
        resize_to_max_side: Scale every picture, small ones too, to `max_side`.

    Returns:
        Height and width in pixels, both multiples of `tile_size`.
    """
    long, short = (width, height) if width >= height else (height, width)
    target_long = max_side if resize_to_max_side else min(max_side, math.ceil(long / tile_size) * tile_size)
    scale = target_long / long
    target_short = max(math.ceil(short * scale / tile_size) * tile_size, tile_size)
    return (target_short, target_long) if width >= height else (target_long, target_short)


@dataclass(frozen=True, kw_only=True, slots=True)
class TileGrid:
    """Tiles of one image, row by row, without the global tile."""

    rows: int
    """Tiles from top to bottom."""
    columns: int
    """Tiles from left to right."""

    @property
    def num_tiles(self) -> int:
        """Tiles of the grid alone."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageGeometry:
    """How one image is cut, and what it costs."""

    height: int
    """Rows of pixels after the resize."""
    width: int
    """Columns of pixels after the resize."""
    grid: TileGrid
    """The tiles of the resized image."""
    has_global_tile: bool
    """Whether the whole image comes first, scaled to one tile."""
    num_tiles: int
    """All tiles, the global one included; in a model family without tiles (Qwen-VL) its patches."""
    num_patches: int
    """What the vision encoder attends over, in all tiles."""
    num_image_tokens: int
    """Placeholders in the text, filled by the projector."""
    num_tokens: int
    """Tokens in the sequence: the placeholders and the position token before each tile."""


class ImageRule(Protocol):
    """How the images of a sample are cut: a `Tiling`, or a model family of `vlmpack.families`."""

    @property
    def tile_size(self) -> int:
        """Side in pixels of what the vision encoder takes as one row: a tile, or a patch."""
        ...

    def sample(self, sizes: Sequence[tuple[int, int]]) -> tuple[ImageGeometry, ...]:
        """Return how the images of one sample are cut, from their upright (height, width)."""
        ...

    def smaller(self) -> ImageRule | None:
        """Return the rule with the next smaller images, or None if there is none."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """The rule by which images become tiles; validates itself at construction.

    Raises:
        ConfigError: If a size is not positive, the tile size does not divide the largest side, or the
            patch size does not divide the tile size.
    """

    tile_size: int = 512
    """Side of a tile in pixels."""
    max_side: int = 2048
    """Upper limit of an image's longer side in pixels, a multiple of `tile_size`."""
    resize_to_max_side: bool = False
    """Scale every image to `max_side`. The reference configuration does, which makes 17 tiles out of a
    386 x 386 picture; off by default, so small pictures stay cheap."""
    patch_size: int = 16
    """Side of a ViT patch in pixels: (512 / 16)^2 = 1,024 patches a tile."""
    tokens_per_tile: int = 64
    """Image tokens a tile: (512 / 16 / 4)^2 = 64 with a pixel-shuffle factor of 4."""
    position_tokens: int = 1
    """Tokens that say where a tile lies, before each tile: `<row_i_col_j>` or `<|global_image|>`.
    0 gives the round figures of documents that leave them out (1,088 tokens for 17 tiles)."""
    reference_rounding: bool = False
    """Keep a quirk of the reference arithmetic: its float rounding gives some square pictures a row of
    tiles more than `max_side` allows (1092 x 1092 with 1536: 4 x 3 tiles). Off, the side is capped."""
    global_tile: bool = True
    """Put the whole image, scaled to one tile, before the tiles of a grid larger than 1 x 1."""

    def __post_init__(self) -> None:
        for name in ("tile_size", "max_side", "patch_size", "tokens_per_tile"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.position_tokens not in {0, 1}:
            raise ConfigError(f"position_tokens must be 0 or 1 a tile, got {self.position_tokens!r}")
        if self.max_side % self.tile_size:
            low = self.max_side // self.tile_size * self.tile_size
            near = f"{low} or {low + self.tile_size}" if low else f"{self.tile_size}"
            raise ConfigError(
                f"tile_size {self.tile_size} does not divide max_side {self.max_side}: "
                f"a resized image could not be cut into whole tiles. Use max_side {near}."
            )
        if self.tile_size % self.patch_size:
            raise ConfigError(
                f"patch_size {self.patch_size} does not divide tile_size {self.tile_size}: "
                "the vision encoder could not cover a tile."
            )

    @property
    def patches_per_tile(self) -> int:
        """ViT patches of one tile."""
        return (self.tile_size // self.patch_size) ** 2

    @property
    def max_grid_side(self) -> int:
        """Tiles along the longer side of the largest grid."""
        return self.max_side // self.tile_size + self.reference_rounding

    def image(self, height: int, width: int) -> ImageGeometry:
        """Return how an upright image of this size is cut. O(1), cached by size.

        Args:
            height: Pixels after EXIF rotation, at least 1.
            width: Pixels after EXIF rotation, at least 1.
        """
        return _image_geometry(self, height, width)

    def sample(self, sizes: Sequence[tuple[int, int]]) -> tuple[ImageGeometry, ...]:
        """Return how the images of one sample are cut: each as if it were alone.

        Args:
            sizes: Upright (height, width) of each image.
        """
        return tuple(self.image(height, width) for height, width in sizes)

    def smaller(self) -> Tiling | None:
        """Return the rule with the next smaller largest side, or None when one tile is left."""
        if self.max_side == self.tile_size:
            return None
        return replace(self, max_side=self.max_side - self.tile_size)


@lru_cache(maxsize=1 << 16)
def _image_geometry(tiling: Tiling, height: int, width: int) -> ImageGeometry:
    if height < 1 or width < 1:
        raise ConfigError(f"an image needs at least one pixel a side, got {height} x {width}")
    tile = tiling.tile_size
    target_height, target_width = resize_target(
        height,
        width,
        tile_size=tile,
        max_side=tiling.max_side,
        resize_to_max_side=tiling.resize_to_max_side,
    )
    if not tiling.reference_rounding:
        target_height = min(target_height, tiling.max_side)
        target_width = min(target_width, tiling.max_side)
    grid = TileGrid(rows=target_height // tile, columns=target_width // tile)
    has_global = tiling.global_tile and grid.num_tiles > 1
    num_tiles = grid.num_tiles + has_global
    return ImageGeometry(
        height=target_height,
        width=target_width,
        grid=grid,
        has_global_tile=has_global,
        num_tiles=num_tiles,
        num_patches=num_tiles * tiling.patches_per_tile,
        num_image_tokens=num_tiles * tiling.tokens_per_tile,
        num_tokens=num_tiles * (tiling.tokens_per_tile + tiling.position_tokens),
    )
