"""The allocator's model, worked by hand and against the tracer's, which was written before and apart."""

from __future__ import annotations

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from benchmarks import gpu_tracer
from vlmpack.memory.caching import MIB, CachingAllocator, DoesNotFitError


def test_small_requests_share_a_segment_of_two_mebibytes():
    device = CachingAllocator()
    device.allocate(1)
    device.allocate(MIB)
    # 512 bytes and 1 MiB out of one segment
    assert (device.allocated, device.reserved) == (512 + MIB, 2 * MIB)


def test_a_large_request_keeps_up_to_a_mebibyte_that_is_not_split_off():
    device = CachingAllocator()
    device.allocate(15 * MIB)
    assert (device.allocated, device.reserved) == (16 * MIB, 16 * MIB)
    device.allocate(6 * MIB)  # a segment of 20, of which 14 are split off
    assert (device.allocated, device.reserved) == (22 * MIB, 36 * MIB)


def test_freed_neighbours_join_and_are_used_again():
    device = CachingAllocator()
    one, two, three = (device.allocate(5 * MIB) for _ in range(3))
    device.release(one)
    device.release(two)
    device.allocate(10 * MIB)  # their place
    assert device.reserved == 20 * MIB
    device.release(three)
    assert device.allocated == 10 * MIB
    assert device.peak_allocated == 15 * MIB


def test_free_memory_in_pieces_is_no_place_for_a_large_request():
    device = CachingAllocator(capacity=44 * MIB)
    blocks = [device.allocate(9 * MIB) for _ in range(4)]  # two to a segment
    device.release(blocks[0])
    device.release(blocks[2])
    with pytest.raises(DoesNotFitError):
        device.allocate(22 * MIB)  # 22 MiB are free, and 4 not reserved
    device.release(blocks[1])  # a whole segment is given back
    device.allocate(22 * MIB)
    assert device.reserved == 42 * MIB


MOVES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40 * MIB)), max_size=80)


@given(MOVES, st.one_of(st.none(), st.integers(20, 300)))
def test_it_does_what_the_tracers_allocator_does(moves, capacity):
    limit = None if capacity is None else capacity * MIB
    ours, theirs = CachingAllocator(limit), gpu_tracer.CachingAllocator(limit)
    blocks = []
    for kind, number in moves:
        if kind == 0 and blocks:  # free one
            mine, other = blocks.pop(number % len(blocks))
            ours.release(mine)
            theirs.release(other)
            continue
        size = number if kind == 1 else number % MIB + 1 if kind == 2 else number // 4 + 1
        try:
            other = theirs.allocate(size)
        except gpu_tracer.OutOfMemoryError:
            event("does not fit")
            with pytest.raises(DoesNotFitError):
                ours.allocate(size)
            return
        blocks.append((ours.allocate(size), other))
        assert (ours.allocated, ours.reserved) == (theirs.in_use, theirs.reserved)
    assert (ours.peak_allocated, ours.peak_reserved) == (theirs.peak, theirs.peak_reserved)
