"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: no tiles; a picture keeps its shape, in patches of 14 or 16 pixels.

    resized to multiples of patch x merge       patches in the order in which 2 x 2 of them merge
    +--+--+--+--+                                 0  1  4  5
    |  |  |  |  |   4 x 4 patches                 2  3  6  7      16 patches are 4 image tokens
    +--+--+--+--+   -> image_grid_thw [1, 4, 4]   8  9 12 13
    |  |  |  |  |                                10 11 14 15
    +--+--+--+--+

Positions have four axes here: the first restarts in each sample, which is what isolates it; the others are
M-RoPE's time, height and width. A patch is given to the model twice, as if it were a film of two frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import torch
from PIL.Image import Resampling

from vlmpack.errors import SampleError
from vlmpack.families.family import CLIP_MEAN, CLIP_STD, HALF, Family
from vlmpack.families.pixels import resized
from vlmpack.families.settings import colours, integer, section
from vlmpack.geometry import ImageGeometry, TileGrid

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt
    from PIL.Image import Image

    from vlmpack.families.family import Settings
    from vlmpack.families.rows import Rows
    from vlmpack.families.tokens import Pieces

_LARGEST_RATIO: Final = 200
"""The processor raises beyond this."""
_SMALLEST_SIZE: Final = "shortest_edge"
_LARGEST_SIZE: Final = "longest_edge"
"""The processor's names for numbers of pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen2VL(Family):
    """Qwen2-VL; the defaults are those of its image processor."""

    name: ClassVar[str] = "qwen2_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    image_token: ClassVar[str] = "<|image_pad|>"
    anchor_token: ClassVar[str] = "<|image_pad|>"
    in_message: ClassVar[str] = "<|vision_start|><|image_pad|><|vision_end|>"
    position_axes: ClassVar[int] = 4
    refused_attention: ClassVar[Mapping[str, str]] = {
        "flex_attention": "the class has no flex attention; transformers refuses it"
    }

    patch_size: int = 14
    """Side of a ViT patch in pixels."""
    merge_size: int = 2
    """Patches along a side that become one image token."""
    temporal_patch_size: int = 2
    """Frames of a patch; a picture fills them all."""
    min_pixels: int = 56 * 56
    """A smaller picture is scaled up."""
    max_pixels: int = 28 * 28 * 1280
    """A larger picture is scaled down."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    @classmethod
    def of(cls, config: Settings, processor: Settings) -> Qwen2VL:
        """Return the family of a model's config and its image processor's.

        Args:
            config: With a vision_config.
            processor: Its size or min_pixels and max_pixels, mean and deviation; may be empty.
        """
        vision, size, base = section(config, "vision_config"), section(processor, "size"), cls()
        return cls(
            patch_size=integer(vision, "patch_size", base.patch_size),
            merge_size=integer(vision, "spatial_merge_size", base.merge_size),
            temporal_patch_size=integer(vision, "temporal_patch_size", base.temporal_patch_size),
            min_pixels=integer(processor, "min_pixels", integer(size, _SMALLEST_SIZE, base.min_pixels)),
            max_pixels=integer(processor, "max_pixels", integer(size, _LARGEST_SIZE, base.max_pixels)),
            image_mean=colours(processor, "image_mean", base.image_mean),
            image_std=colours(processor, "image_std", base.image_std),
        )

    def sizes(self) -> tuple[str, ...]:
        """Return the names of the fields that must be positive integers."""
        return ("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels")

    @property
    def tile_size(self) -> int:
        """Side of a patch in pixels: it is what the vision encoder takes as one row."""
        return self.patch_size

    def image(self, height: int, width: int) -> ImageGeometry:
        """Return how an upright image is cut. O(1).

        Args:
            height: Pixels, at least 1.
            width: Pixels, at least 1.

        Raises:
            SampleError: image_shape, if one side is more than 200 times the other.
        """
        ratio = max(height, width) / min(height, width)
        if ratio > _LARGEST_RATIO:
            raise SampleError(
                "image_shape",
                f"an image of {height} x {width} pixels (height x width) has sides of 1 : {ratio:.0f}; "
                f"{self.name} takes at most 1 : {_LARGEST_RATIO}. Crop it, or leave it out",
                height=height,
                width=width,
                max_ratio=_LARGEST_RATIO,
            )
        factor = self.patch_size * self.merge_size
        target = _smart_size(height, width, factor, self.min_pixels, self.max_pixels)
        grid = TileGrid(rows=target[0] // self.patch_size, columns=target[1] // self.patch_size)
        num_tokens = grid.num_tiles // self.merge_size**2
        return ImageGeometry(
            height=target[0],
            width=target[1],
            grid=grid,
            has_global_tile=False,
            num_tiles=grid.num_tiles,
            num_patches=grid.num_tiles,
            num_image_tokens=num_tokens,
            num_tokens=num_tokens,
        )

    def smaller(self) -> Qwen2VL | None:
        """Return the family with three quarters of the pixels, or None near the least."""
        pixels = self.max_pixels * 3 // 4
        if pixels < max(self.min_pixels, (self.patch_size * self.merge_size) ** 2):
            return None
        return replace(self, max_pixels=pixels)

    def special_tokens(self) -> tuple[str, ...]:
        """Return every token that an expansion or a message can hold."""
        return (self.image_token, "<|vision_start|>", "<|vision_end|>")

    def expansion(self, geometry: ImageGeometry) -> Pieces:
        """Return what takes the place of an image token.

        Args:
            geometry: How the image is cut.
        """
        return ((self.image_token, geometry.num_image_tokens),)

    def cut(self, picture: Image, geometry: ImageGeometry, out: npt.NDArray[np.uint8]) -> None:
        """Write the patches, those that merge side by side.

        Args:
            picture: Mode RGB, upright.
            geometry: How it is cut.
            out: uint8 [geometry.num_tiles, P, P, 3].
        """
        picture = resized(picture, geometry.height, geometry.width, Resampling.BICUBIC)
        side, merge = self.patch_size, self.merge_size
        rows, columns = geometry.grid.rows // merge, geometry.grid.columns // merge
        pixels = np.asarray(picture).reshape(rows, merge, side, columns, merge, side, 3)
        out.reshape(rows, columns, merge, merge, side, side, 3)[:] = pixels.transpose(0, 3, 1, 4, 2, 5, 6)

    def pixels(self, rows: Rows, dtype: torch.dtype) -> dict[str, object]:
        """Return pixel_values [sum of patches, 3 x frames x P x P] and image_grid_thw [N, 3].

        Args:
            rows: The batch, with at least one image.
            dtype: Normalised to this, or torch.uint8.
        """
        patches = self.normalise(rows.tiles, dtype)
        films = patches.unsqueeze(2).expand(-1, -1, self.temporal_patch_size, -1, -1)
        grids = [(1, geometry.grid.rows, geometry.grid.columns) for geometry in rows.geometries]
        return {"pixel_values": films.flatten(1), "image_grid_thw": torch.tensor(grids)}

    def normalise(self, tiles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return uint8 patches [N, 3, P, P] or [N, 3 x frames x P x P] as the model was trained on them.

        Args:
            tiles: On any device.
            dtype: Of the result; torch.uint8 leaves them as they are.
        """
        if tiles.ndim == 4:
            return super(Qwen2VL, self).normalise(tiles, dtype)
        return super(Qwen2VL, self).normalise(tiles.reshape(len(tiles), 3, -1), dtype).flatten(1)

    def positions(self, rows: Rows) -> torch.Tensor:
        """Return position_ids [4, B, L]: the restarting ones, then time, height and width.

        Args:
            rows: The batch.
        """
        plain = rows.position_ids.numpy()
        axes = np.broadcast_to(plain, (3, *plain.shape)).copy()
        merged = [
            (geometry.grid.rows // self.merge_size, geometry.grid.columns // self.merge_size)
            for geometry in rows.geometries
        ]
        ids, segments = rows.input_ids.numpy(), rows.segment_ids.numpy()
        next_image = 0
        for row in range(len(ids)):
            for start, stop in _spans(segments[row]):
                is_image = ids[row, start:stop] == rows.image_token_id
                num_images = 0
                left = int(np.count_nonzero(is_image))
                while left:
                    height, width = merged[next_image + num_images]
                    left -= height * width
                    num_images += 1
                if num_images:
                    grids = merged[next_image : next_image + num_images]
                    axes[:, row, start:stop] = mrope_positions(is_image, grids)
                    next_image += num_images
        return torch.from_numpy(np.concatenate([plain[None], axes]))

    def own_inputs(self, is_image: torch.Tensor) -> dict[str, object]:
        """Return what a sample alone needs for the model to make its own positions.

        Args:
            is_image: bool [1, T], whether a token is an image token.
        """
        return {"mm_token_type_ids": is_image.int()}

    def unit_tokens(self, batch: Mapping[str, object]) -> list[int]:
        """Return the image tokens of each image of a batch.

        Args:
            batch: A packed batch.
        """
        grids = batch["image_grid_thw"]
        assert isinstance(grids, torch.Tensor)
        return [int(patches) // self.merge_size**2 for patches in grids.prod(1)]

    def take_units(self, batch: Mapping[str, object], start: int, stop: int) -> dict[str, object]:
        """Return the arguments of forward for some of the images.

        Args:
            batch: A packed batch.
            start: First image.
            stop: After the last image.
        """
        pixels, grids = batch["pixel_values"], batch["image_grid_thw"]
        assert isinstance(pixels, torch.Tensor)
        assert isinstance(grids, torch.Tensor)
        first, end = int(grids[:start].prod(1).sum()), int(grids[:stop].prod(1).sum())
        return {"pixel_values": pixels[first:end], "image_grid_thw": grids[start:stop]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL; the defaults are those of its checkpoints."""

    name: ClassVar[str] = "qwen2_5_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    max_pixels: int = 28 * 28 * 16384


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3VL(Qwen2VL):
    """Qwen3-VL; the defaults are those of its checkpoints."""

    name: ClassVar[str] = "qwen3_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)

    patch_size: int = 16
    min_pixels: int = 256 * 256
    max_pixels: int = 4096 * 4096
    image_mean: tuple[float, float, float] = HALF
    image_std: tuple[float, float, float] = HALF


def mrope_positions(is_image: npt.NDArray[np.bool_], grids: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Return int64 [3, T]: time, height and width of one sample's tokens. O(T).

    Text counts up on all three axes. An image starts where the text before it ends: time stands still,
    height and width are those of its merged grid; text goes on after the longer side of it.
    (`get_rope_index` of the transformers classes, for images.)

    Args:
        is_image: bool [T], whether the token is an image token.
        grids: Rows and columns of merged patches of each image, in order.
    """
    positions = np.empty((3, len(is_image)), np.int64)
    at, position = 0, 0
    for rows, columns in grids:
        start = at + int(np.argmax(is_image[at:]))
        positions[:, at:start] = np.arange(position, position + start - at)
        position += start - at
        at = start + rows * columns
        image = positions[:, start:at].reshape(3, rows, columns)
        image[0] = position
        image[1] = position + np.arange(rows)[:, None]
        image[2] = position + np.arange(columns)
        positions[:, start:at] = image.reshape(3, -1)
        position += max(rows, columns)
    positions[:, at:] = np.arange(position, position + len(is_image) - at)
    return positions


def _spans(segments: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return where each segment of a row lies, padding left out."""
    edges = np.flatnonzero(np.diff(segments, prepend=0, append=0))
    return [(int(start), int(stop)) for start, stop in pairwise(edges) if segments[start]]


def _smart_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Return the sides after the resize; float arithmetic as the processor's `smart_resize`."""
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > most:
        shrink = math.sqrt((height * width) / most)
        high = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return high, wide
