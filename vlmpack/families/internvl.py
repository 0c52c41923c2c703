"""InternVL: a grid of tiles of the shape nearest to the picture's, and the whole picture LAST.

    <img>[<IMG_CONTEXT> x 256 x tiles]</img>

The grid is that of `GotOcr2ImageProcessor`: of all grids of at most `max_tiles` tiles the one with the
nearest aspect ratio; the picture is stretched to it, and once more, by itself, to the thumbnail.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Final

from PIL.Image import Resampling

from vlmpack.errors import ConfigError
from vlmpack.families.family import Family
from vlmpack.families.pixels import cut_grid, resized
from vlmpack.families.settings import colours, integer, section, square
from vlmpack.geometry import ImageGeometry, TileGrid

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

    from vlmpack.families.family import Settings
    from vlmpack.families.tokens import Pieces

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class InternVL(Family):
    """InternVL 2.5 and 3; the defaults are those of the InternVL3 checkpoints."""

    name: ClassVar[str] = "internvl"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    image_token: ClassVar[str] = "<IMG_CONTEXT>"
    anchor_token: ClassVar[str] = "<IMG_CONTEXT>"
    in_message: ClassVar[str] = "<IMG_CONTEXT>\n"

    tile: int = 448
    """Side of a tile in pixels."""
    min_tiles: int = 1
    """Tiles of the smallest grid (the processor's min_patches)."""
    max_tiles: int = 12
    """Tiles of the largest grid, without the thumbnail (the processor's max_patches)."""
    patch_size: int = 14
    """Side of a ViT patch in pixels."""
    tokens_per_tile: int = 256
    """Image tokens of a tile."""
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD

    @classmethod
    def of(cls, config: Settings, processor: Settings) -> InternVL:
        """Return the family of a model's config and its image processor's.

        Args:
            config: With a vision_config.
            processor: Its size, min_patches and max_patches, mean and deviation; may be empty.

        Raises:
            ConfigError: If a size is of the wrong type.
        """
        vision, base = section(config, "vision_config"), cls()
        tile = square(processor, "size", square(vision, "image_size", base.tile))
        patch_size = square(vision, "patch_size", base.patch_size)
        ratio = config.get("downsample_ratio", 0.5)
        if not isinstance(ratio, int | float):
            raise ConfigError(f"downsample_ratio must be a number, got {ratio!r}")
        return cls(
            tile=tile,
            min_tiles=integer(processor, "min_patches", base.min_tiles),
            max_tiles=integer(processor, "max_patches", base.max_tiles),
            patch_size=patch_size,
            tokens_per_tile=int((tile // patch_size) ** 2 * ratio**2),
            image_mean=colours(processor, "image_mean", base.image_mean),
            image_std=colours(processor, "image_std", base.image_std),
        )

    def sizes(self) -> tuple[str, ...]:
        """Return the names of the fields that must be positive integers."""
        return ("tile", "min_tiles", "max_tiles", "patch_size", "tokens_per_tile")

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.tile

    def image(self, height: int, width: int) -> ImageGeometry:
        """Return how an upright image is cut. O(grids), a hundred at most.

        Args:
            height: Pixels, at least 1.
            width: Pixels, at least 1.
        """
        grid = self._grid(height, width) if self.max_tiles > 1 else TileGrid(rows=1, columns=1)
        has_global = grid.num_tiles > 1
        num_tiles = grid.num_tiles + has_global
        num_image_tokens = num_tiles * self.tokens_per_tile
        return ImageGeometry(
            height=grid.rows * self.tile,
            width=grid.columns * self.tile,
            grid=grid,
            has_global_tile=has_global,
            num_tiles=num_tiles,
            num_patches=num_tiles * (self.tile // self.patch_size) ** 2,
            num_image_tokens=num_image_tokens,
            num_tokens=num_image_tokens + 2,
        )

    def _grid(self, height: int, width: int) -> TileGrid:
        best, best_difference = (1, 1), float("inf")
        for columns, rows in _grids(self.min_tiles, self.max_tiles):
            difference = abs(width / height - columns / rows)
            if difference < best_difference:
                best, best_difference = (columns, rows), difference
            # Of two grids of one shape the larger, where the picture has pixels for more than half of it.
            elif (
                difference == best_difference
                and width * height > 0.5 * self.tile * self.tile * columns * rows
            ):
                best = (columns, rows)
        return TileGrid(rows=best[1], columns=best[0])

    def smaller(self) -> InternVL | None:
        """Return the family with a tile less in the largest grid, or None at the least."""
        if self.max_tiles <= self.min_tiles:
            return None
        return replace(self, max_tiles=self.max_tiles - 1)

    def special_tokens(self) -> tuple[str, ...]:
        """Return every token that an expansion can hold."""
        return (self.image_token, "<img>", "</img>")

    def expansion(self, geometry: ImageGeometry) -> Pieces:
        """Return what takes the place of an image token.

        Args:
            geometry: How the image is cut.
        """
        return (("<img>", 1), (self.image_token, geometry.num_image_tokens), ("</img>", 1))

    def cut(self, picture: Image, geometry: ImageGeometry, out: npt.NDArray[np.uint8]) -> None:
        """Write the tiles, row by row, and the thumbnail.

        Args:
            picture: Mode RGB, upright.
            geometry: How it is cut.
            out: uint8 [geometry.num_tiles, P, P, 3].
        """
        num_grid = geometry.grid.num_tiles
        stretched = resized(picture, geometry.height, geometry.width, Resampling.BICUBIC)
        cut_grid(stretched, geometry.grid.rows, geometry.grid.columns, out[:num_grid])
        if geometry.has_global_tile:
            cut_grid(resized(picture, self.tile, self.tile, Resampling.BICUBIC), 1, 1, out[num_grid:])

    def unit_tokens(self, batch: Mapping[str, object]) -> list[int]:
        """Return the image tokens of each tile of a batch.

        Args:
            batch: A packed batch.
        """
        return [self.tokens_per_tile] * len(batch["pixel_values"])  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Return (columns, rows) of every grid, the smaller ones first; ties in the processor's order."""
    sides = range(1, most + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))
