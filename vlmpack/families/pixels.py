"""Resize, cut, normalise: what the families' own image processors do, in uint8 until the very end.

Pillow resizes, as in the processors' Pillow backends, so that tiles are the same bits; what is saved is
their float64 pictures and the copies from and to channels-first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL import Image

    Pixels = npt.NDArray[np.uint8]


def resized(picture: Image.Image, height: int, width: int, resample: Image.Resampling) -> Image.Image:
    """Return the picture in another size.

    Args:
        picture: Mode RGB.
        height: Pixels.
        width: Pixels.
        resample: The filter.
    """
    return picture.resize((width, height), resample)


def cut_grid(picture: Image.Image, rows: int, columns: int, out: Pixels) -> None:
    """Cut a picture into equal squares, row by row.

    Args:
        picture: Mode RGB, rows x P by columns x P pixels.
        rows: Squares from top to bottom.
        columns: Squares from left to right.
        out: uint8 [rows x columns, P, P, 3].
    """
    side = out.shape[1]
    pixels = np.asarray(picture).reshape(rows, side, columns, side, 3)
    out.reshape(rows, columns, side, side, 3)[:] = pixels.transpose(0, 2, 1, 3, 4)


def normalised(
    tiles: torch.Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return (tiles / 255 - mean) / std of uint8 tiles; others as they are, if of this dtype.

    Args:
        tiles: uint8 [N, 3, ...].
        mean: Of each colour.
        std: Of each colour.
        dtype: Of the result; torch.uint8 leaves them as they are.
    """
    if tiles.dtype != torch.uint8 or dtype == torch.uint8:
        return tiles.contiguous()
    shape = (1, 3) + (1,) * (tiles.ndim - 2)
    shift = torch.tensor(mean, device=tiles.device, dtype=torch.float32).view(shape)
    scale = torch.tensor(std, device=tiles.device, dtype=torch.float32).view(shape)
    levels = tiles.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return levels.sub_(shift).div_(scale).to(dtype)
