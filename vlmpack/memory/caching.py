"""PyTorch's native CUDA caching allocator on sizes alone: where a tensor lands, and what is lost between.

A request is rounded to 512 bytes and takes the smallest free block that holds it. Up to 1 MiB it comes from
segments of 2 MiB; above from segments of 20 MiB, or from 10 MiB on of its own size rounded to 2 MiB. A
block is split where enough is left, and a freed one joins its free neighbours. At the device's limit whole
free segments are given back before a request fails. Source: c10/cuda/CUDACachingAllocator.cpp, `malloc`,
`should_split`, `get_allocation_size`, `free_block`, as of PyTorch 2.6 to 2.13.

    segment of 20 MiB   | A 6 MiB | B 3 MiB | free 11 MiB |     a request of 12 MiB finds no place here
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

MIB: Final = 1 << 20
_UNIT: Final = 512
_SMALL_SEGMENT: Final = 2 * MIB
_MIDDLE_SEGMENT: Final = 20 * MIB
_LARGE: Final = 10 * MIB


class DoesNotFitError(Exception):
    """A request that the device cannot serve, after everything free was given back."""


class Block:
    """A piece of a segment; its neighbours make the segment a list."""

    __slots__ = ("after", "before", "free", "number", "size", "small")

    def __init__(self, number: int, size: int, small: bool) -> None:
        self.number = number
        """Order of addresses, which decides between equal blocks."""
        self.size = size
        self.small = small
        self.free = False
        self.before: Block | None = None
        self.after: Block | None = None


class CachingAllocator:
    """The allocator of one device.

    Args:
        capacity: Bytes that it may reserve; None: no limit.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = 0
        """Bytes in blocks that are in use: `torch.cuda.memory_allocated`."""
        self.reserved = 0
        """Bytes of all segments: `torch.cuda.memory_reserved`."""
        self.peak_allocated = 0
        """The most in use so far."""
        self.peak_reserved = 0
        """The most reserved so far."""
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._blocks: dict[int, Block] = {}
        self._end = 0

    def allocate(self, size: int) -> Block:
        """Return a block for this many bytes. O(log blocks) and a list's insertion."""
        need = max(_UNIT, -(-size // _UNIT) * _UNIT)
        small = need <= MIB
        block = self._smallest(need, small) or self._segment(need, small)
        rest = block.size - need
        if rest >= _UNIT if small else rest > MIB:
            tail = Block(block.number + need, rest, small)
            tail.before, tail.after = block, block.after
            if block.after is not None:
                block.after.before = tail
            block.after, block.size = tail, need
            self._put(tail)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Take a block back and join it with its free neighbours."""
        self.allocated -= block.size
        before, after = block.before, block.after
        if before is not None and before.free:
            self._take(before)
            self._join(before, block)
            block = before
        if after is not None and after.free:
            self._take(after)
            self._join(block, after)
        self._put(block)

    @staticmethod
    def _join(first: Block, second: Block) -> None:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first

    def _put(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.number))
        self._blocks[block.number] = block

    def _take(self, block: Block) -> None:
        free = self._free[block.small]
        del free[bisect_left(free, (block.size, block.number))]
        del self._blocks[block.number]
        block.free = False

    def _smallest(self, need: int, small: bool) -> Block | None:
        free = self._free[small]
        index = bisect_left(free, (need, -1))
        if index == len(free):
            return None
        block = self._blocks.pop(free.pop(index)[1])
        block.free = False
        return block

    def _segment(self, need: int, small: bool) -> Block:
        """Ask the device for a new segment.

        Raises:
            DoesNotFitError: If it has no more.
        """
        size = _SMALL_SEGMENT
        if not small:
            size = _MIDDLE_SEGMENT if need < _LARGE else -(-need // _SMALL_SEGMENT) * _SMALL_SEGMENT
        if self.capacity is not None and self.reserved + size > self.capacity:
            self._give_back()
            if self.reserved + size > self.capacity:
                raise DoesNotFitError
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        # a gap between segments: their blocks never join
        self._end += size + _UNIT
        return Block(self._end - size, size, small)

    def _give_back(self) -> None:
        for free in self._free.values():
            kept = []
            for size, number in free:
                block = self._blocks[number]
                if block.before is None and block.after is None:
                    self.reserved -= size
                    del self._blocks[number]
                else:
                    kept.append((size, number))
            free[:] = kept
