"""Compile the kernels of the image path ahead of time."""

from __future__ import annotations

import numpy as np

from vlmpack.images import accelerate
from vlmpack.images.pillow_order import height_first
from vlmpack.images.resample import resize
from vlmpack.kernels.png_unfilter import unfilter_png


def warm_kernels() -> None:
    """Compile what `tile_image` calls: 3 s of CPU, and 2 s more where PNG files are decoded by a kernel.

    Worth calling before a process forks: its children inherit compiled code, where each of them would
    otherwise compile for itself. Without numba's compiler this does nothing.
    """
    if accelerate.module("numba") is None:
        return
    height_first(resize)
    if accelerate.module("deflate") is not None:
        filtered = np.frombuffer(bytes(4), np.uint8).reshape(1, 4)  # read-only, as inflated bytes are
        unfilter_png(filtered, 3, np.empty((2, 3), np.uint8), np.empty((1, 3), np.uint8))
