"""Tiles of bytes, pixel by pixel -> planes, of bytes or of floats from 0 to 1, in one pass.

    r g b r g b r g b  ->  r r r | g g g | b b b

Separately (planes first, floats then, a division at last) each pass would touch 41 MB for one 640 x 480
picture scaled to 2048; the reference pipeline makes four, all of them into fresh memory.

Shapes: N tiles, H rows, B bytes of a row (3 a pixel), W pixels of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]


@njit(nogil=True)
def to_planes(level_NHB: Bytes, plane_N3HW: Bytes) -> None:
    """Write the levels colour by colour. O(N x H x B).

    Args:
        level_NHB: uint8 [N, H, 3 x W], C-contiguous.
        plane_N3HW: uint8 [N, 3, H, W], C-contiguous, the output.
    """
    for n in range(plane_N3HW.shape[0]):
        for y in range(plane_N3HW.shape[2]):
            line = level_NHB[n, y]
            for colour in range(3):
                plane = plane_N3HW[n, colour, y]
                for x in range(plane.shape[0]):
                    plane[x] = line[3 * x + colour]


@njit(nogil=True)
def to_unit_planes(level_NHB: Bytes, plane_N3HW: Floats) -> None:
    """Write level / 255, rounded once to float32, colour by colour. O(N x H x B).

    Args:
        level_NHB: uint8 [N, H, 3 x W], C-contiguous.
        plane_N3HW: float32 [N, 3, H, W], C-contiguous, the output.
    """
    full = np.float32(255)
    for n in range(plane_N3HW.shape[0]):
        for y in range(plane_N3HW.shape[2]):
            line = level_NHB[n, y]
            for colour in range(3):
                plane = plane_N3HW[n, colour, y]
                for x in range(plane.shape[0]):
                    plane[x] = np.float32(line[3 * x + colour]) / full
