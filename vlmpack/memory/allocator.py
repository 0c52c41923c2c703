"""What PyTorch's caching allocator hands out beyond what was asked for.

It rounds every request to 512 bytes. Requests over 1 MiB come from segments (20 MiB for those below
10 MiB, else the request rounded to 2 MiB), and a remainder of up to 1 MiB is not split off: it belongs to
the tensor. A 15 MiB activation therefore takes 16 MiB. Weights are replayed tensor by tensor; what a step
keeps is rounded in closed form. Source: c10/cuda/CUDACachingAllocator.cpp, `should_split` and
`get_allocation_size`, as of PyTorch 2.6 to 2.13.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

MIB: Final = 1 << 20
_UNIT: Final = 512
_SMALL_SEGMENT: Final = 2 * MIB
_MIDDLE_SEGMENT: Final = 20 * MIB
_LARGE: Final = 10 * MIB


def replayed_slack(sizes: Iterable[int]) -> int:
    """Return the bytes handed out beyond `sizes` when they are allocated one after the other and kept.

    Args:
        sizes: Bytes of each tensor, in the order of allocation.

    O(n log n): best fit among the free remainders, as the allocator does.
    """
    small: list[int] = []
    large: list[int] = []
    slack = 0
    for size in sizes:
        rounded = max(_UNIT, -(-size // _UNIT) * _UNIT)
        is_small = rounded <= MIB
        free = small if is_small else large
        index = bisect_left(free, rounded)
        block = free.pop(index) if index < len(free) else _segment(rounded)
        remainder = block - rounded
        if remainder >= _UNIT if is_small else remainder > MIB:
            insort(free, remainder)
        else:
            slack += remainder
        slack += rounded - size
    return slack


def _segment(rounded: int) -> int:
    """Return the bytes that are asked of CUDA for a request that fits no free block."""
    if rounded <= MIB:
        return _SMALL_SEGMENT
    if rounded < _LARGE:
        return _MIDDLE_SEGMENT
    return -(-rounded // _SMALL_SEGMENT) * _SMALL_SEGMENT


def expected_slack(size: int) -> int:
    """Return the bytes that one activation of this size is given too many, in a step that has settled.

    From 10 MiB on a tensor gets a segment of its own, whose remainder of up to 1 MiB stays with it. Smaller
    ones share segments, and what they lose depends on their neighbours; nothing is counted for them.
    """
    if size <= MIB:
        return -size % _UNIT
    if size < _LARGE:
        return 0
    remainder = -size % _SMALL_SEGMENT
    return remainder if remainder <= MIB else 0
