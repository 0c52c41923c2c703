"""Pictures -> tiles, the global tile first.

    +-------+-------+
    |   1   |   2   |        [0] the whole picture, scaled to one tile
    +-------+-------+  ->    [1] [2] [3] [4] row by row
    |   3   |   4   |        a grid of 1 x 1 has no global tile
    +-------+-------+

Tiles stay uint8: the float32 tiles of one 640 x 480 picture scaled to 2048 are 41 MB, and half of the
reference pipeline's image time is the kernel handing out that memory. `to_float` belongs on the device.

In memory a tile lies pixel by pixel, [N, P, P, 3] seen as [N, 3, P, P] (torch calls it channels_last), as
decoders and the resize make it: cutting planes out of it would take 3.5 ms of a picture's 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vlmpack.errors import ConfigError
from vlmpack.images import accelerate
from vlmpack.images.decode import check_size, to_rgb
from vlmpack.images.header import MAX_PIXELS
from vlmpack.images.pillow_order import height_first
from vlmpack.images.pixels import Picture, read_picture
from vlmpack.images.resample import (
    fill_grid,
    fill_grid_and_global_tile,
    resize,
    shrink,
    shrink_grid,
)
from vlmpack.images.reuse import reusable
from vlmpack.images.scratch import SCRATCH
from vlmpack.kernels.planes import to_planes, to_unit_planes

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.geometry import ImageGeometry
    from vlmpack.images.source import ImageSource

Mode: TypeAlias = Literal["exact", "fast"]
"""How faithful tiles are to the reference pipeline's; see `tile_image`."""

_SPARE: Final = 5
"""A JPEG that is decoded at a fraction keeps at least this many times the planned sides."""


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


def empty_tiles(num_tiles: int, tile_size: int) -> torch.Tensor:
    """Return uint8 [num_tiles, 3, tile_size, tile_size], laid out as `tile_image` fills it fastest.

    Of any content: the memory is reused once the tensor and everything that shares its storage are gone.

    Args:
        num_tiles: May be 0.
        tile_size: Side of a tile in pixels.
    """
    return torch.from_numpy(reusable((num_tiles, tile_size, tile_size, 3), np.uint8)).permute(0, 3, 1, 2)


def tile_image(
    source: ImageSource,
    geometry: ImageGeometry,
    *,
    tile_size: int,
    expected_size: tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
    max_pixels: int = MAX_PIXELS,
    mode: Mode = "exact",
) -> torch.Tensor:
    """Decode, resize and cut an image as planned: the way from the disk into a pack's buffer.

    * "exact": the grid's tiles are bit-equal to cutting Pillow's bicubic resize, which the reference
      pipeline does; the global tile is made of the resized picture, as there, within 1 of 255 levels.
    * "fast": the global tile is made of the picture itself where that has at most half the pixels of the
      resized one, which differs where the resize would have clipped; and a JPEG of at least ten times the
      planned sides is decoded at a half, a quarter or an eighth of its size. docs/images.md has the figures.

    Frees the interpreter lock in every slow step; safe to call from many threads.

    Args:
        source: Compressed bytes, a file, or a Pillow image.
        geometry: How the image is cut, from `Tiling.image` of its header's size.
        tile_size: Side of a tile in pixels, the tiling's.
        expected_size: Upright (height, width) that the plan was made with; a file that was changed
            since then is refused.
        out: uint8 [num_tiles, 3, tile_size, tile_size] to write into, with any strides; fastest with those
            of `empty_tiles`.
        max_pixels: Largest height x width that is decoded.
        mode: "exact" or "fast".

    Returns:
        uint8 [num_tiles, 3, tile_size, tile_size]: `out` if it was given.

    Raises:
        SampleError: If the image cannot be decoded, or not to the promised size.
        ConfigError: If the geometry is not of this tile size, `out` has another shape or dtype, or the mode
            is another.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    _check_geometry(geometry, tile_size)
    shape = (geometry.num_tiles, 3, tile_size, tile_size)
    if out is None:
        out = empty_tiles(geometry.num_tiles, tile_size)
    elif tuple(out.shape) != shape or out.dtype != torch.uint8:
        raise ConfigError(f"out must be uint8 {list(shape)}, got {out.dtype} {list(out.shape)}")
    suffices = None
    if mode == "fast":
        suffices = (_SPARE * geometry.height, _SPARE * geometry.width)
    picture = read_picture(source, max_pixels=max_pixels, at_least=suffices)
    if expected_size is not None:
        check_size("the plan was made with", expected_size, (picture.height, picture.width))
    if not _kernels_are_exact():
        return _tiles_by_pillow(picture, geometry, out)
    by_pixel = out.permute(0, 2, 3, 1)
    if by_pixel.is_contiguous():
        _fill(picture, geometry, mode, by_pixel.numpy())
        return out
    tiles = SCRATCH.take("tiles", out.numel()).reshape(by_pixel.shape)
    _fill(picture, geometry, mode, tiles)
    if out.is_contiguous():
        to_planes(tiles.reshape(len(tiles), tile_size, 3 * tile_size), out.numpy())
    else:
        by_pixel.copy_(torch.from_numpy(tiles))
    return out


def _kernels_are_exact() -> bool:
    return accelerate.module("numba") is not None and height_first(resize) is not None


def _fill(picture: Picture, geometry: ImageGeometry, mode: Mode, tiles: npt.NDArray[np.uint8]) -> None:
    """Write the tiles [N, P, P, 3], the global one first."""
    size = (picture.height / picture.fraction, picture.width / picture.fraction)
    target = (geometry.height, geometry.width)
    height, width = picture.pixels.shape[:2]
    rule = height_first(resize)
    assert rule is not None
    whole, grid = tiles[: int(geometry.has_global_tile)], tiles[int(geometry.has_global_tile) :]
    # Where a picture has more than half the pixels of its tiles, joined taps take as long as two steps.
    if len(whole) and mode == "fast" and 2 * height * width <= geometry.height * geometry.width:
        shrink(picture.pixels, size, whole[0], by_way_of=target)
        whole = whole[:0]
    height_comes_first = rule((height, width), target)
    if not height_comes_first and fill_grid_and_global_tile(picture.pixels, size, geometry.grid, grid, whole):
        return
    fill_grid(picture.pixels, size, geometry.grid, grid, height_first=height_comes_first)
    if len(whole):
        shrink_grid(grid, geometry.grid, whole[0])


def _tiles_by_pillow(picture: Picture, geometry: ImageGeometry, out: torch.Tensor) -> torch.Tensor:
    """Write the tiles without kernels, of whatever size the picture was decoded to."""
    box = (0.0, 0.0, picture.width / picture.fraction, picture.height / picture.fraction)
    image = Image.fromarray(picture.pixels)
    batch = _as_batch(image.resize((geometry.width, geometry.height), Image.Resampling.BICUBIC, box=box))
    side = out.shape[-1]
    if geometry.has_global_tile:
        out[:1].copy_(_global_tile(batch, side))
    grid = (geometry.grid.rows, geometry.grid.columns)
    out[geometry.has_global_tile :].view(*grid, 3, side, side).copy_(_cut(batch, side))
    return out


def to_float(tiles: torch.Tensor) -> torch.Tensor:
    """Return uint8 tiles as float32 in [0, 1], bit-equal to torchvision's ToTensor, contiguous.

    Args:
        tiles: uint8, any shape, on any device: best called where the model is, which moves a quarter
            of the bytes.

    Raises:
        ConfigError: If the dtype is another: such tiles are scaled already.
    """
    if tiles.dtype != torch.uint8:
        raise ConfigError(f"to_float takes uint8 tiles, got {tiles.dtype}")
    if tiles.ndim == 4 and tiles.shape[1] == 3 and tiles.device.type == "cpu" and accelerate.module("numba"):
        by_pixel = tiles.permute(0, 2, 3, 1)
        if by_pixel.is_contiguous():
            num_tiles, rows, width = by_pixel.shape[:3]
            planes = reusable(tuple(tiles.shape), np.float32)
            to_unit_planes(by_pixel.numpy().reshape(num_tiles, rows, 3 * width), planes)
            return torch.from_numpy(planes)
    return tiles.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


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
    as_levels = batch.dtype == torch.uint8 and batch.shape[1] == 3 and batch.device.type == "cpu"
    if as_levels and accelerate.module("numba"):
        pixels = batch[0].permute(1, 2, 0).contiguous().numpy()
        tile = empty_tiles(1, side)
        shrink(pixels, pixels.shape[:2], tile.permute(0, 2, 3, 1).numpy()[0])
        return tile
    return F.interpolate(batch, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
