"""Pictures -> tiles, the global tile first.

    +-------+-------+
    |   1   |   2   |        [0] the whole picture, scaled to one tile
    +-------+-------+  ->    [1] [2] [3] [4] row by row
    |   3   |   4   |        a grid of 1 x 1 has no global tile
    +-------+-------+

Tiles stay uint8: the float32 tiles of one 640 x 480 picture scaled to 2048 are 41 MB, and half of the
reference pipeline's image time is the kernel handing out that memory. `to_float` belongs on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vlmpack.errors import ConfigError
from vlmpack.images.decode import check_size, decode, to_rgb
from vlmpack.images.header import MAX_PIXELS

if TYPE_CHECKING:
    from vlmpack.geometry import ImageGeometry
    from vlmpack.images.source import ImageSource


class SplitImage:
    """Cut a picture into square tiles, row by row.

    Args:
        patch_size: Side of a tile in pixels (the reference pipeline's name).

    Raises:
        ConfigError: If `patch_size` is not a positive integer.
    """

    def __init__(self, patch_size: int) -> None:
        if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
            raise ConfigError(f"patch_size must be a positive integer, got {patch_size!r}")
        self.patch_size = patch_size

    def __call__(self, image: torch.Tensor | Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the tiles [n, C, p, p] of the same dtype, and the grid (rows, columns).

        Args:
            image: [C, H, W] or [1, C, H, W]; a Pillow image becomes uint8 RGB.

        Raises:
            ConfigError: If the shape is another, or a side is no multiple of `patch_size`.
        """
        tiles = _cut(_as_batch(image), self.patch_size)
        return tiles.flatten(0, 1).contiguous(), (tiles.shape[0], tiles.shape[1])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(patch_size={self.patch_size})"


class GlobalAndSplitImages(SplitImage):
    """Cut a picture into square tiles, and put the whole picture before them, scaled to one tile.

    The global tile is bilinear with antialiasing, made from the resized picture. A picture of one
    tile gets none: it would be the same tile twice.

    Args:
        patch_size: Side of a tile in pixels (the reference pipeline's name).
    """

    def __call__(self, image: torch.Tensor | Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the tiles [n, C, p, p] of the same dtype, the global one first, and the grid.

        Args:
            image: [C, H, W] or [1, C, H, W]; a Pillow image becomes uint8 RGB.

        Raises:
            ConfigError: If the shape is another, or a side is no multiple of `patch_size`.
        """
        batch = _as_batch(image)
        tiles = _cut(batch, self.patch_size)
        rows, columns = tiles.shape[:2]
        if rows == columns == 1:
            return tiles.flatten(0, 1).contiguous(), (1, 1)
        return torch.cat([_global_tile(batch, self.patch_size), tiles.flatten(0, 1)]), (rows, columns)


def tile_image(
    source: ImageSource,
    geometry: ImageGeometry,
    *,
    tile_size: int,
    expected_size: tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor:
    """Decode, resize and cut an image as planned: the way from the disk into a pack's buffer.

    Resized with Pillow's bicubic filter, so the tiles are bit-equal to the reference pipeline's; the
    global tile is within 1 of 255 levels. Frees the interpreter lock in every slow step; safe to call
    from many threads.

    Args:
        source: Compressed bytes, a file, or a Pillow image.
        geometry: How the image is cut, from `Tiling.image` of its header's size.
        tile_size: Side of a tile in pixels, the tiling's.
        expected_size: Upright (height, width) that the plan was made with; a file that was changed
            since then is refused.
        out: uint8 [num_tiles, 3, tile_size, tile_size] to write into, with any strides.
        max_pixels: Largest height x width that is decoded.

    Returns:
        uint8 [num_tiles, 3, tile_size, tile_size]: `out` if it was given.

    Raises:
        SampleError: If the image cannot be decoded, or not to the promised size.
        ConfigError: If the geometry is not of this tile size, or `out` has another shape or dtype.
    """
    _check_geometry(geometry, tile_size)
    shape = (geometry.num_tiles, 3, tile_size, tile_size)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8)
    elif tuple(out.shape) != shape or out.dtype != torch.uint8:
        raise ConfigError(f"out must be uint8 {list(shape)}, got {out.dtype} {list(out.shape)}")
    picture = decode(source, max_pixels=max_pixels)
    if expected_size is not None:
        check_size("the plan was made with", expected_size, (picture.height, picture.width))
    batch = _as_batch(picture.resize((geometry.width, geometry.height), Image.Resampling.BICUBIC))
    if geometry.has_global_tile:
        out[:1].copy_(_global_tile(batch, tile_size))
    grid = (geometry.grid.rows, geometry.grid.columns)
    out[geometry.has_global_tile :].view(*grid, *shape[1:]).copy_(_cut(batch, tile_size))
    return out


def to_float(tiles: torch.Tensor) -> torch.Tensor:
    """Return uint8 tiles as float32 in [0, 1], bit-equal to torchvision's ToTensor.

    Args:
        tiles: uint8, any shape, on any device: best called where the model is, which moves a quarter
            of the bytes.

    Raises:
        ConfigError: If the dtype is another: such tiles are scaled already.
    """
    if tiles.dtype != torch.uint8:
        raise ConfigError(f"to_float takes uint8 tiles, got {tiles.dtype}")
    return tiles.to(torch.float32).div_(255)


def _check_geometry(geometry: ImageGeometry, tile_size: int) -> None:
    grid = geometry.grid
    if (geometry.height, geometry.width) != (grid.rows * tile_size, grid.columns * tile_size):
        raise ConfigError(
            f"a grid of {grid.rows} x {grid.columns} tiles of {tile_size} does not cover the planned "
            f"{geometry.height} x {geometry.width} pixels: pass the tile size of the tiling that planned it"
        )


def _as_batch(image: torch.Tensor | Image.Image) -> torch.Tensor:
    # [1, C, H, W]; of a Pillow image uint8 RGB.
    if isinstance(image, Image.Image):
        return _planes(to_rgb(image))
    if image.ndim == 3:
        return image.unsqueeze(0)
    if image.ndim != 4 or image.shape[0] != 1:
        raise ConfigError(
            f"expected one picture [C, H, W] or [1, C, H, W], got {list(image.shape)}: "
            "call it once for each picture, their grids may differ"
        )
    return image


def _planes(image: Image.Image) -> torch.Tensor:
    # Pillow unpacks one colour at a time about as fast as all three interleaved, and cutting tiles out
    # of planes then copies whole rows: tile_image takes 29 instead of 42 ms for 13 tiles.
    planes = torch.empty((1, 3, image.height, image.width), dtype=torch.uint8)
    pixels = planes.numpy()[0]
    for plane, band in zip(pixels, "RGB", strict=True):
        plane[:] = np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(plane.shape)
    return planes


def _cut(batch: torch.Tensor, side: int) -> torch.Tensor:
    # A view [rows, columns, C, side, side] of [1, C, H, W].
    height, width = batch.shape[2:]
    if height % side or width % side or not height or not width:
        raise ConfigError(
            f"a picture of {height} x {width} pixels (height x width) cannot be cut into tiles of {side}: "
            f"both sides must be multiples. Call DynamicResize({side}, ...) first."
        )
    rows, columns = height // side, width // side
    # A view whatever the strides: [C, rows, side, columns, side], then the grid to the front.
    grid = batch[0].view(-1, rows, side, columns, side)
    return grid.permute(1, 3, 0, 2, 4)


def _global_tile(batch: torch.Tensor, side: int) -> torch.Tensor:
    # [1, C, side, side], the whole picture, of the dtype of `batch` [1, C, H, W].
    return F.interpolate(batch, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
