"""Compile the kernels of the image path ahead of time."""

from __future__ import annotations

import numpy as np

from vlmpack.geometry import TileGrid
from vlmpack.images import accelerate
from vlmpack.images.pillow_order import height_first
from vlmpack.images.resample import fill_grid_and_global_tile, resize
from vlmpack.kernels.png_unfilter import unfilter_png


def warm_kernels() -> None:
    """Compile what `tile_image` calls: 6 s of CPU, and 2 s more where PNG files are decoded by a kernel.

    Worth calling before a process forks: its children inherit compiled code, where each of them would
    otherwise compile for itself. Without numba's compiler this does nothing.
    """
    if accelerate.module("numba") is None:
        return
    height_first(resize)
    pixels, tiles = np.zeros((3, 3, 3), np.uint8), np.empty((3, 2, 2, 3), np.uint8)
    fill_grid_and_global_tile(pixels, (3, 3), TileGrid(rows=1, columns=2), tiles[1:], tiles[:1])
    if accelerate.module("deflate") is not None:
        filtered = np.frombuffer(bytes(4), np.uint8).reshape(1, 4)  # read-only, as inflated bytes are
        unfilter_png(filtered, 3, np.empty((2, 3), np.uint8), np.empty((1, 3), np.uint8))
