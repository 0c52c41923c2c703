"""DynamicResize: a picture -> sides that whole tiles cover, as the reference pipeline does it."""

from __future__ import annotations

from enum import Enum
from typing import Final, overload

import torch
import torch.nn.functional as F
from PIL import Image

from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling, resize_target
from vlmpack.images.decode import to_rgb

_FILTERS: Final = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class DynamicResize:
    """Scale a picture so that both sides are multiples of the tile size.

    The longer side becomes `max_side_len`, or the next multiple of `patch_size` capped there; the
    shorter keeps the aspect ratio, rounded up to a multiple. `vlmpack.geometry.resize_target` decides.

    A Pillow image goes through Pillow's own filter, bit for bit. A tensor goes through
    `torch.nn.functional.interpolate` with antialiasing, which for uint8 is within 2 of 255 levels of
    Pillow (7 where it shrinks more than eightfold); float tensors may overshoot [0, 1] at sharp edges.

    Args:
        patch_size: Side of a tile in pixels. The name is the reference pipeline's; elsewhere in this
            project a patch is what the vision encoder attends over.
        max_side_len: Upper limit of the longer side in pixels, a multiple of `patch_size`.
        resize_to_max_side_len: Scale every picture, small ones too, to `max_side_len`.
        interpolation: "bicubic" or "bilinear", or an enum member that means one of them
            (`PIL.Image.Resampling`, torchvision's `InterpolationMode`).

    Raises:
        ConfigError: If `patch_size` does not divide `max_side_len`, or the interpolation is another.
    """

    def __init__(
        self,
        patch_size: int,
        max_side_len: int,
        resize_to_max_side_len: bool = False,
        interpolation: str | Enum = "bicubic",
    ) -> None:
        # Tiling checks both sizes; the ViT's patch size plays no part here.
        Tiling(tile_size=patch_size, max_side=max_side_len, patch_size=1)
        self.patch_size = patch_size
        self.max_side_len = max_side_len
        self.resize_to_max_side_len = resize_to_max_side_len
        self.interpolation = _filter_name(interpolation)

    @overload
    def __call__(self, image: Image.Image) -> Image.Image: ...

    @overload
    def __call__(self, image: torch.Tensor) -> torch.Tensor: ...

    def __call__(self, image: Image.Image | torch.Tensor) -> Image.Image | torch.Tensor:
        """Return the scaled picture: the same type, mode or dtype, and leading dimensions.

        Args:
            image: A Pillow image (palette and 1-bit modes become RGB: their numbers are names, not
                brightness), or uint8 or float [C, H, W] or [B, C, H, W].

        Raises:
            ConfigError: If a tensor has another number of dimensions or an empty side.
        """
        if isinstance(image, Image.Image):
            width, height = image.size
            height, width = self.target(height, width)
            if image.mode in {"1", "P", "PA"}:
                image = to_rgb(image)
            return image.resize((width, height), _FILTERS[self.interpolation])
        if image.ndim not in {3, 4} or 0 in image.shape:
            raise ConfigError(
                f"DynamicResize takes [C, H, W] or [B, C, H, W] without empty sides, got {list(image.shape)}"
            )
        batch = image if image.ndim == 4 else image.unsqueeze(0)
        resized = F.interpolate(
            batch,
            size=self.target(image.shape[-2], image.shape[-1]),
            mode=self.interpolation,
            align_corners=False,
            antialias=True,
        )
        return resized if image.ndim == 4 else resized.squeeze(0)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that a picture of this size is scaled to.

        Args:
            height: Pixels, at least 1.
            width: Pixels, at least 1.
        """
        return resize_target(
            height,
            width,
            tile_size=self.patch_size,
            max_side=self.max_side_len,
            resize_to_max_side=self.resize_to_max_side_len,
        )

    def __repr__(self) -> str:
        return (
            f"DynamicResize(patch_size={self.patch_size}, max_side_len={self.max_side_len}, "
            f"resize_to_max_side_len={self.resize_to_max_side_len}, interpolation={self.interpolation!r})"
        )


def _filter_name(interpolation: str | Enum) -> str:
    if isinstance(interpolation, Image.Resampling):
        name: object = interpolation.name.lower()
    else:
        name = interpolation.value if isinstance(interpolation, Enum) else interpolation
    if not isinstance(name, str) or name not in _FILTERS:
        raise ConfigError(f"interpolation must be one of {', '.join(_FILTERS)}, got {interpolation!r}")
    return name
