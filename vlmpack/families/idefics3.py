r"""Idefics3 and SmolVLM: a grid of tiles and the whole picture LAST, each with its tags.

    <fake><row_1_col_1>[image x T]<fake><row_1_col_2>[image x T]\n
    <fake><row_2_col_1>[image x T]<fake><row_2_col_2>[image x T]\n
    \n<fake><global-img>[image x T]<fake>

The sizes follow `Idefics3ImageProcessor`: the longer side is scaled to `longest_edge`, then both sides up to
multiples of a tile, both times by Lanczos; the global tile is made of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final

from PIL.Image import Resampling

from vlmpack.errors import ConfigError
from vlmpack.families.family import HALF, Family
from vlmpack.families.pixels import cut_grid, resized
from vlmpack.families.settings import colours, integer, section
from vlmpack.families.tokens import FamilyTokens
from vlmpack.geometry import ImageGeometry, TileGrid

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

    from vlmpack.families.family import Settings
    from vlmpack.families.rows import Rows
    from vlmpack.families.tokens import Pieces

_LARGEST_SIDE: Final = 4096
"""The processor scales nothing beyond this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Idefics3(Family):
    """Idefics3; the defaults are those of Idefics3-8B-Llama3."""

    name: ClassVar[str] = "idefics3"
    model_types: ClassVar[tuple[str, ...]] = ("idefics3",)
    image_token: ClassVar[str] = "<image>"
    anchor_token: ClassVar[str] = "<image>"
    in_message: ClassVar[str] = "<image>"

    tile: int = 364
    """Side of a tile in pixels (the processor's max_image_size)."""
    longest_edge: int = 4 * 364
    """The longer side after the first resize (the processor's size)."""
    patch_size: int = 14
    """Side of a ViT patch in pixels."""
    scale_factor: int = 2
    """Pixel shuffle: a tile has (tile / patch_size / scale_factor)^2 image tokens."""
    splits: bool = True
    """Cut pictures into tiles (the processor's do_image_splitting)."""
    blank_line_tokens: int = 1
    """Tokens that the tokenizer makes of two line breaks; `for_tokenizer` asks it."""

    def __post_init__(self) -> None:
        super(Idefics3, self).__post_init__()
        if all(float(255 * mean).is_integer() for mean in self.image_mean):
            raise ConfigError(
                f"{self.name}: with image_mean {self.image_mean} a tile of one colour would become zeros, "
                "which the model drops as padding; use a mean between two levels of 255, such as 0.5"
            )

    @classmethod
    def of(cls, config: Settings, processor: Settings) -> Idefics3:
        """Return the family of a model's config and its image processor's.

        Args:
            config: With a vision_config.
            processor: Its size, max_image_size, mean and deviation; may be empty.
        """
        vision = section(config, "vision_config")
        base = cls()
        tile = integer(vision, "image_size", base.tile)
        return cls(
            tile=integer(section(processor, "max_image_size"), "longest_edge", tile),
            longest_edge=integer(section(processor, "size"), "longest_edge", 4 * tile),
            patch_size=integer(vision, "patch_size", base.patch_size),
            scale_factor=integer(config, "scale_factor", base.scale_factor),
            splits=bool(processor.get("do_image_splitting", True)),
            image_mean=colours(processor, "image_mean", HALF),
            image_std=colours(processor, "image_std", HALF),
        )

    def sizes(self) -> tuple[str, ...]:
        """Return the names of the fields that must be positive integers."""
        return ("tile", "longest_edge", "patch_size", "scale_factor", "blank_line_tokens")

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.tile

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of a tile, in the model's own arithmetic."""
        return int((self.tile // self.patch_size) ** 2 / self.scale_factor**2)

    def image(self, height: int, width: int) -> ImageGeometry:
        """Return how an upright image is cut. O(1).

        Args:
            height: Pixels, at least 1.
            width: Pixels, at least 1.
        """
        if self.splits:
            target = _multiples(*_scaled(height, width, self.longest_edge), self.tile)
        else:
            target = (self.tile, self.tile)
        grid = TileGrid(rows=target[0] // self.tile, columns=target[1] // self.tile)
        has_global = grid.num_tiles > 1
        num_tiles = grid.num_tiles + has_global
        tags = self._num_tags(grid) if has_global else 3
        return ImageGeometry(
            height=target[0],
            width=target[1],
            grid=grid,
            has_global_tile=has_global,
            num_tiles=num_tiles,
            num_patches=num_tiles * (self.tile // self.patch_size) ** 2,
            num_image_tokens=num_tiles * self.tokens_per_tile,
            num_tokens=num_tiles * self.tokens_per_tile + tags,
        )

    def _num_tags(self, grid: TileGrid) -> int:
        # Two before each tile, a line break after each row but the last, which ends in a blank line; then
        # two before the global tile and one behind it.
        return 2 * grid.num_tiles + (grid.rows - 1) + self.blank_line_tokens + 3

    def smaller(self) -> Idefics3 | None:
        """Return the family with a longer side of one tile less, or None at one tile."""
        if not self.splits or self.longest_edge <= self.tile:
            return None
        return replace(self, longest_edge=self.longest_edge - self.tile)

    def special_tokens(self) -> tuple[str, ...]:
        """Return every token that an expansion can hold."""
        side = -(-self.longest_edge // self.tile) if self.splits else 0
        tags = tuple(_tag(row, column) for row in range(side) for column in range(side)) if side > 1 else ()
        return ("<image>", "<fake_token_around_image>", "<global-img>", *tags)

    def expansion(self, geometry: ImageGeometry) -> Pieces:
        """Return what takes the place of an image token.

        Args:
            geometry: How the image is cut.
        """
        fake, image = ("<fake_token_around_image>", 1), ("<image>", self.tokens_per_tile)
        pieces = []
        if geometry.has_global_tile:
            for row in range(geometry.grid.rows):
                for column in range(geometry.grid.columns):
                    pieces += [fake, (_tag(row, column), 1), image]
                pieces.append(("\n", 1))
            pieces.append(("\n", 1))
        return (*pieces, fake, ("<global-img>", 1), image, fake)

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Idefics3, FamilyTokens]:
        """Return the family with this tokenizer's lengths, and its image tokens.

        Args:
            tokenizer: The model's own.
        """
        blank_line = tokenizer.backend_tokenizer.encode("\n\n", add_special_tokens=False)
        family = replace(self, blank_line_tokens=len(blank_line.ids))
        return family, FamilyTokens.of(tokenizer, family)

    def cut(self, picture: Image, geometry: ImageGeometry, out: npt.NDArray[np.uint8]) -> None:
        """Write the tiles, row by row, and the global one.

        Args:
            picture: Mode RGB, upright.
            geometry: How it is cut.
            out: uint8 [geometry.num_tiles, P, P, 3].
        """
        longest = self.longest_edge
        if self.splits:  # a smaller family planned it if it is some tiles shorter than this one makes it
            most = -(-longest // self.tile) * self.tile
            longest -= most - max(geometry.height, geometry.width)
        scaled = _scaled(picture.height, picture.width, longest)
        picture = resized(picture, *scaled, Resampling.LANCZOS)
        picture = resized(picture, geometry.height, geometry.width, Resampling.LANCZOS)
        num_grid = geometry.grid.num_tiles
        cut_grid(picture, geometry.grid.rows, geometry.grid.columns, out[:num_grid])
        if geometry.has_global_tile:
            cut_grid(resized(picture, self.tile, self.tile, Resampling.LANCZOS), 1, 1, out[num_grid:])

    def pixels(self, rows: Rows, dtype: torch.dtype) -> dict[str, object]:
        """Return pixel_values [1, N, 3, P, P]: all images as if they were of one row, so none is padded.

        Args:
            rows: The batch, with at least one image.
            dtype: Normalised to this, or torch.uint8.
        """
        return {"pixel_values": self.normalise(rows.tiles.unsqueeze(0), dtype)}

    def normalise(self, tiles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return uint8 tiles [1, N, 3, P, P] as the model was trained on them; anything else as it is.

        Args:
            tiles: On any device.
            dtype: Of the result; torch.uint8 leaves them as they are.
        """
        return super(Idefics3, self).normalise(tiles.flatten(0, -4), dtype).view(tiles.shape)

    def unit_tokens(self, batch: Mapping[str, object]) -> list[int]:
        """Return the image tokens of each tile of a batch.

        Args:
            batch: A packed batch.
        """
        return [self.tokens_per_tile] * batch["pixel_values"].shape[1]  # type: ignore[attr-defined]

    def take_units(self, batch: Mapping[str, object], start: int, stop: int) -> dict[str, object]:
        """Return the arguments of forward for some of the tiles.

        Args:
            batch: A packed batch.
            start: First tile.
            stop: After the last tile.
        """
        return {"pixel_values": batch["pixel_values"][:, start:stop]}  # type: ignore[index]


@dataclass(frozen=True, kw_only=True, slots=True)
class SmolVLM(Idefics3):
    """SmolVLM; the defaults are those of SmolVLM2-500M."""

    name: ClassVar[str] = "smolvlm"
    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)

    tile: int = 512
    longest_edge: int = 2048
    patch_size: int = 16
    scale_factor: int = 4


def _tag(row: int, column: int) -> str:
    return f"<row_{row + 1}_col_{column + 1}>"


def _scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """Return the sides after the first resize; float arithmetic left to right, as the processor's."""
    aspect_ratio = width / height
    if width >= height:
        width = longest
        height = int(width / aspect_ratio)
        height += height % 2
    else:
        height = longest
        width = int(height * aspect_ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    if max(height, width) <= _LARGEST_SIDE:
        return height, width
    aspect_ratio = width / height
    if width >= height:
        return max(int(_LARGEST_SIDE / aspect_ratio), 1), _LARGEST_SIDE
    return _LARGEST_SIDE, max(int(_LARGEST_SIDE * aspect_ratio), 1)


def _multiples(height: int, width: int, tile: int) -> tuple[int, int]:
    """Return the sides after the second resize."""
    aspect_ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect_ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect_ratio) / tile) * tile
    return max(height, tile), max(width, tile)
