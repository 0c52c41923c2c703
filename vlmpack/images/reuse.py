"""Memory for tiles that comes back when nobody can see it any more, because fresh memory is dear.

The system clears fresh memory page by page: the tiles of a pack, 38 MB, take 16 ms to fill where pages are
small, 2.6 ms where numpy was given large ones, 1.0 ms where the memory was used before. Scratch memory
cannot do this, as tiles leave with the pack. So memory is lent: to an array that only the tensor holds, and
when that array is collected, wherever the tensor went in between, its memory is lent again.
"""

from __future__ import annotations

import weakref
from collections import deque
from math import prod
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Number = TypeVar("Number", bound=np.generic)

MIN_BYTES: Final[int] = 1 << 20
"""Smaller arrays are not worth it."""
MAX_KEPT_BYTES: Final[int] = 256 << 20
"""What is kept while nobody uses it; more is only free at once when a pass ends."""
_STEP: Final = 2 << 20

# A deque's operations are atomic: a collector may give memory back in the middle of anything, in any thread,
# so a lock could wait for itself.
_free: deque[npt.NDArray[np.uint8]] = deque()


def reusable(shape: tuple[int, ...], dtype: type[Number]) -> npt.NDArray[Number]:
    """Return an array of any content, C-contiguous, whose memory is reused after it is collected.

    For handing to a tensor. A view of the array does not keep the memory: numpy lets a view hold the owner
    of the memory and not the array that it was made from.

    Args:
        shape: As for `numpy.empty`.
        dtype: Likewise.
    """
    num_bytes = prod(shape) * np.dtype(dtype).itemsize
    if num_bytes < MIN_BYTES:
        return np.empty(shape, dtype)
    block = _take(num_bytes)
    array: npt.NDArray[Number] = block[:num_bytes].view(dtype).reshape(shape)
    weakref.finalize(array, _give_back, block).atexit = False
    return array


def _take(num_bytes: int) -> npt.NDArray[np.uint8]:
    for _ in range(len(_free)):
        try:
            block = _free.popleft()
        except IndexError:  # another thread took the last one
            break
        if num_bytes <= len(block):
            return block
        _give_back(block)
    return np.empty(-(-num_bytes // _STEP) * _STEP, np.uint8)


def _give_back(block: npt.NDArray[np.uint8]) -> None:
    if sum(map(len, _free.copy())) + len(block) <= MAX_KEPT_BYTES:
        _free.append(block)
