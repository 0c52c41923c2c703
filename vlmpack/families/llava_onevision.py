"""LLaVA-OneVision: tiles for a sample's only image, one square each where there are several.

    alone:    the whole picture FIRST, stretched to 384 x 384, then the tiles of its best resolution;
              [<image> x (729 + what is left of the grid's patches without padding + a newline a row)]
    several:  each picture padded to a square; [<image> x 730]

So a sample of three images may cost a fifth of the sum of its images alone. The model finds out by itself
how an image was cut, from its size and from how many images its sample has: the batch says both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from PIL import Image as Pillow
from PIL.Image import Resampling

from vlmpack.errors import ConfigError
from vlmpack.families.family import HALF, Family
from vlmpack.families.pixels import cut_grid, resized
from vlmpack.families.settings import colours, integer, section
from vlmpack.geometry import ImageGeometry, TileGrid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

    from vlmpack.families.family import Settings
    from vlmpack.families.rows import Rows
    from vlmpack.families.tokens import Pieces

_SIX: Final = range(1, 7)
_PINPOINTS: Final = tuple((384 * rows, 384 * columns) for rows in _SIX for columns in _SIX)


@dataclass(frozen=True, kw_only=True, slots=True)
class LlavaOnevision(Family):
    """LLaVA-OneVision; the defaults are those of llava-onevision-qwen2-7b-ov."""

    name: ClassVar[str] = "llava_onevision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    image_token: ClassVar[str] = "<image>"
    anchor_token: ClassVar[str] = "<image>"
    in_message: ClassVar[str] = "<image>\n"

    tile: int = 384
    """Side of a tile in pixels."""
    patch_size: int = 14
    """Side of a ViT patch in pixels."""
    max_tiles: int = 9
    """A grid with the features of more tiles is scaled down to this (anyres_max_9)."""
    pinpoints: tuple[tuple[int, int], ...] = _PINPOINTS
    """(height, width) of the resolutions that a picture may be scaled to."""

    @classmethod
    def of(cls, config: Settings, processor: Settings) -> LlavaOnevision:
        """Return the family of a model's config and its image processor's.

        Args:
            config: With a vision_config, image_grid_pinpoints and vision_aspect_ratio.
            processor: Its mean and deviation; may be empty.

        Raises:
            ConfigError: If the model's features are selected in another way, or the resolutions are no list.
        """
        if config.get("vision_feature_select_strategy", "full") != "full":
            raise ConfigError("llava_onevision: only vision_feature_select_strategy='full' is known here")
        vision, base = section(config, "vision_config"), cls()
        pinpoints = config.get("image_grid_pinpoints", processor.get("image_grid_pinpoints", _PINPOINTS))
        if not isinstance(pinpoints, list | tuple) or not pinpoints:
            raise ConfigError(f"image_grid_pinpoints must be a list of (height, width), got {pinpoints!r}")
        aspect_ratio = str(config.get("vision_aspect_ratio", f"anyres_max_{base.max_tiles}"))
        if not aspect_ratio.startswith("anyres_max_") or not aspect_ratio[11:].isdigit():
            raise ConfigError(f"vision_aspect_ratio must be anyres_max_N, got {aspect_ratio!r}")
        return cls(
            tile=integer(vision, "image_size", base.tile),
            patch_size=integer(vision, "patch_size", base.patch_size),
            max_tiles=int(aspect_ratio[11:]),
            pinpoints=tuple((int(height), int(width)) for height, width in pinpoints),
            image_mean=colours(processor, "image_mean", HALF),
            image_std=colours(processor, "image_std", HALF),
        )

    def sizes(self) -> tuple[str, ...]:
        """Return the names of the fields that must be positive integers."""
        return ("tile", "patch_size", "max_tiles")

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.tile

    @property
    def _side(self) -> int:
        """Patches along a tile."""
        return self.tile // self.patch_size

    def image(self, height: int, width: int) -> ImageGeometry:
        """Return how an upright image is cut that is alone in its sample. O(resolutions).

        Args:
            height: Pixels, at least 1.
            width: Pixels, at least 1.
        """
        best = _best_resolution(height, width, self.pinpoints)
        grid = TileGrid(rows=best[0] // self.tile, columns=best[1] // self.tile)
        return self._geometry(best, grid, True, self._side**2 + self._grid_features(height, width, grid))

    def sample(self, sizes: Sequence[tuple[int, int]]) -> tuple[ImageGeometry, ...]:
        """Return how the images of one sample are cut: into tiles only if there is one.

        Args:
            sizes: Upright (height, width) of each image.
        """
        if len(sizes) == 1:
            return (self.image(*sizes[0]),)
        square = self._geometry((self.tile, self.tile), TileGrid(rows=1, columns=1), False, self._side**2 + 1)
        return (square,) * len(sizes)

    def _geometry(
        self, target: tuple[int, int], grid: TileGrid, has_global: bool, num_tokens: int
    ) -> ImageGeometry:
        num_tiles = grid.num_tiles + has_global
        return ImageGeometry(
            height=target[0],
            width=target[1],
            grid=grid,
            has_global_tile=has_global,
            num_tiles=num_tiles,
            num_patches=num_tiles * self._side**2,
            num_image_tokens=num_tokens,
            num_tokens=num_tokens,
        )

    def _grid_features(self, height: int, width: int, grid: TileGrid) -> int:
        """Return the tokens of the grid, without padding, with a newline after each row."""
        high, wide = self._side * grid.rows, self._side * grid.columns
        if width / height > wide / high:
            high -= (high - int(round(height * (wide / width), 7))) // 2 * 2
        else:
            wide -= (wide - int(round(width * (high / height), 7))) // 2 * 2
        ratio = math.sqrt(high * wide / (self.max_tiles * self._side**2))
        if ratio > 1.1:
            high, wide = int(high // ratio), int(wide // ratio)
        return high * wide + high

    def special_tokens(self) -> tuple[str, ...]:
        """Return every token that an expansion can hold."""
        return (self.image_token,)

    def expansion(self, geometry: ImageGeometry) -> Pieces:
        """Return what takes the place of an image token.

        Args:
            geometry: How the image is cut.
        """
        return ((self.image_token, geometry.num_image_tokens),)

    def cut(self, picture: Image, geometry: ImageGeometry, out: npt.NDArray[np.uint8]) -> None:
        """Write the whole picture and its tiles, or its square where the sample has several images.

        Args:
            picture: Mode RGB, upright.
            geometry: How it is cut.
            out: uint8 [geometry.num_tiles, P, P, 3].
        """
        if not geometry.has_global_tile:
            side = max(picture.size)
            paper = tuple(int(level * 255) for level in self.image_mean)
            page = Pillow.new("RGB", (side, side), paper)
            page.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            cut_grid(resized(page, self.tile, self.tile, Resampling.BICUBIC), 1, 1, out)
            return
        cut_grid(resized(picture, self.tile, self.tile, Resampling.BICUBIC), 1, 1, out[:1])
        height, width = _fitted(picture.height, picture.width, geometry.height, geometry.width)
        page = Pillow.new("RGB", (geometry.width, geometry.height))
        corner = ((geometry.width - width) // 2, (geometry.height - height) // 2)
        page.paste(resized(picture, height, width, Resampling.BICUBIC), corner)
        cut_grid(page, geometry.grid.rows, geometry.grid.columns, out[1:])

    def pixels(self, rows: Rows, dtype: torch.dtype) -> dict[str, object]:
        """Return pixel_values [N, 3, P, P], image_sizes [images, 2] and batch_num_images [samples].

        Args:
            rows: The batch, with at least one image.
            dtype: Normalised to this, or torch.uint8.
        """
        return {
            "pixel_values": self.normalise(rows.tiles, dtype),
            "image_sizes": torch.tensor(rows.image_sizes),
            "batch_num_images": torch.tensor(rows.images_per_sample),
        }

    def unit_tokens(self, batch: Mapping[str, object]) -> list[int]:
        """Return the image tokens of each image of a batch.

        Args:
            batch: A packed batch.
        """
        return [geometry.num_image_tokens for geometry in self._geometries(batch)]

    def take_units(self, batch: Mapping[str, object], start: int, stop: int) -> dict[str, object]:
        """Return the arguments of forward for the images of one sample.

        Args:
            batch: A packed batch.
            start: First image.
            stop: After the last image.
        """
        pixels, sizes = batch["pixel_values"], batch["image_sizes"]
        assert isinstance(pixels, torch.Tensor)
        assert isinstance(sizes, torch.Tensor)
        tiles = [geometry.num_tiles for geometry in self._geometries(batch)]
        return {
            "pixel_values": pixels[sum(tiles[:start]) : sum(tiles[:stop])],
            "image_sizes": sizes[start:stop],
            "batch_num_images": torch.tensor([stop - start]),
        }

    def _geometries(self, batch: Mapping[str, object]) -> list[ImageGeometry]:
        sizes, counts = batch["image_sizes"], batch["batch_num_images"]
        assert isinstance(sizes, torch.Tensor)
        assert isinstance(counts, torch.Tensor)
        left = iter(sizes.tolist())
        return [
            geometry
            for count in counts.tolist()
            for geometry in self.sample([tuple(next(left)) for _ in range(count)])
        ]


def _best_resolution(height: int, width: int, among: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the resolution that keeps most pixels, and of those the smallest; float as the processor's."""
    best, most, least_waste = among[0], 0, math.inf
    for high, wide in among:
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = high * wide - kept
        if kept > most or (kept == most and waste < least_waste):
            best, most, least_waste = (high, wide), kept, waste
    return best


def _fitted(height: int, width: int, high: int, wide: int) -> tuple[int, int]:
    """Return the sides of a picture that is scaled to fit into others."""
    if wide / width < high / height:
        return min(math.ceil(height * (wide / width)), high), wide
    return high, min(math.ceil(width * (high / height)), wide)
