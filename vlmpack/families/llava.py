"""LLaVA 1.5: the middle square of the picture, one tile.

[<image> x 576]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL.Image import Resampling, fromarray

from vlmpack.errors import ConfigError
from vlmpack.families.family import CLIP_MEAN, CLIP_STD, Family
from vlmpack.families.pixels import cut_grid
from vlmpack.families.settings import colours, integer, section
from vlmpack.geometry import ImageGeometry, TileGrid
from vlmpack.images.pillow_order import height_first

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt
    from PIL.Image import Image

    from vlmpack.families.family import Settings
    from vlmpack.families.tokens import Pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class Llava(Family):
    """LLaVA 1.5 with a CLIP encoder; the defaults are those of llava-1.5-7b."""

    name: ClassVar[str] = "llava"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    image_token: ClassVar[str] = "<image>"
    anchor_token: ClassVar[str] = "<image>"
    in_message: ClassVar[str] = "<image>\n"

    tile: int = 336
    """Side of the tile in pixels."""
    patch_size: int = 14
    """Side of a ViT patch in pixels."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    @classmethod
    def of(cls, config: Settings, processor: Settings) -> Llava:
        """Return the family of a model's config and its image processor's.

        Args:
            config: With a vision_config.
            processor: Its mean and deviation; may be empty.

        Raises:
            ConfigError: If the model keeps the class token, or its encoder is none of CLIP's.
        """
        if config.get("vision_feature_select_strategy", "default") != "default":
            raise ConfigError("llava: only vision_feature_select_strategy='default' is known here")
        vision, base = section(config, "vision_config"), cls()
        if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise ConfigError(f"llava: the vision encoder must be CLIP's, got {vision.get('model_type')!r}")
        return cls(
            tile=integer(vision, "image_size", base.tile),
            patch_size=integer(vision, "patch_size", base.patch_size),
            image_mean=colours(processor, "image_mean", base.image_mean),
            image_std=colours(processor, "image_std", base.image_std),
        )

    def sizes(self) -> tuple[str, ...]:
        """Return the names of the fields that must be positive integers."""
        return ("tile", "patch_size")

    @property
    def tile_size(self) -> int:
        """Side of the tile in pixels."""
        return self.tile

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens: one a patch, without the class token."""
        return (self.tile // self.patch_size) ** 2

    def image(self, height: int, width: int) -> ImageGeometry:  # noqa: ARG002, every size is one tile
        """Return how an upright image is cut: the same for every size.

        Args:
            height: Pixels, at least 1.
            width: Pixels, at least 1.
        """
        return ImageGeometry(
            height=self.tile,
            width=self.tile,
            grid=TileGrid(rows=1, columns=1),
            has_global_tile=False,
            num_tiles=1,
            num_patches=self.tokens_per_tile,
            num_image_tokens=self.tokens_per_tile,
            num_tokens=self.tokens_per_tile,
        )

    def special_tokens(self) -> tuple[str, ...]:
        """Return every token that an expansion can hold."""
        return (self.image_token,)

    def expansion(self, geometry: ImageGeometry) -> Pieces:
        """Return what takes the place of an image token.

        Args:
            geometry: How the image is cut.
        """
        return ((self.image_token, geometry.num_image_tokens),)

    def cut(self, picture: Image, geometry: ImageGeometry, out: npt.NDArray[np.uint8]) -> None:  # noqa: ARG002
        """Write the middle square of the picture whose shorter side is the tile's.

        Args:
            picture: Mode RGB, upright.
            geometry: How it is cut.
            out: uint8 [1, P, P, 3].
        """
        cut_grid(middle_square(picture, self.tile), 1, 1, out)

    def unit_tokens(self, batch: Mapping[str, object]) -> list[int]:
        """Return the image tokens of each tile of a batch.

        Args:
            batch: A packed batch.
        """
        return [self.tokens_per_tile] * len(batch["pixel_values"])  # type: ignore[arg-type]


def _resize(
    pixels: npt.NDArray[np.uint8], size: tuple[int, int], height_is_first: bool
) -> npt.NDArray[np.uint8]:
    """Return the picture in another size, by two resizes of one axis each."""
    picture = fromarray(pixels)
    middle = (picture.width, size[0]) if height_is_first else (size[1], picture.height)
    return np.asarray(picture.resize(middle, Resampling.BICUBIC).resize(size[::-1], Resampling.BICUBIC))


def middle_square(picture: Image, side: int) -> Image:
    """Return the middle of a picture whose shorter side was resized to `side`.

    Only that middle is computed: a picture of 1 x 2,000 pixels needs no 336 x 672,000 in between. Pillow
    weighs pixels outside its box too, so each pass is the whole resize's, and they come in the same order.

    Args:
        picture: Mode RGB.
        side: Of the square.
    """
    height, width = picture.height, picture.width
    short, long = min(height, width), max(height, width)
    scaled = int(side * long / short)  # the longer side as the processor rounds it
    target = (side, scaled) if width >= height else (scaled, side)
    rule = height_first(_resize)
    if rule is None:  # an unknown Pillow: whatever its order is, it is the same here
        left, top = (target[1] - side) // 2, (target[0] - side) // 2
        whole = picture.resize(target[::-1], Resampling.BICUBIC)
        return whole.crop((left, top, left + side, top + side))
    start = (scaled - side) // 2
    first, last = start * long / scaled, (start + side) * long / scaled
    for is_height in (True, False) if rule((height, width), target) else (False, True):
        is_long = is_height == (height > width)
        begin, end = (first, last) if is_long else (0, short)
        if is_height:
            picture = picture.resize(
                (picture.width, side), Resampling.BICUBIC, box=(0, begin, picture.width, end)
            )
        else:
            picture = picture.resize(
                (side, picture.height), Resampling.BICUBIC, box=(begin, 0, end, picture.height)
            )
    return picture
