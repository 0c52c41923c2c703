from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from vlmpack.images.scratch import MAX_KEPT_BYTES, Scratch


def address(array):
    return array.__array_interface__["data"][0]


def test_a_buffer_is_used_again_and_grows():
    scratch = Scratch()
    small = scratch.take("pixels", 100)
    assert small.shape == (100,)
    assert address(scratch.take("pixels", 60)) == address(small)
    assert scratch.take("pixels", 60).shape == (60,)
    large = scratch.take("pixels", 5000)
    assert large.shape == (5000,)
    assert address(scratch.take("pixels", 100)) == address(large)


def test_names_do_not_share():
    scratch = Scratch()
    one, other = scratch.take("one", 10), scratch.take("other", 10)
    one[:] = 1
    other[:] = 2
    assert one.tolist() == [1] * 10


def test_threads_do_not_share():
    scratch = Scratch()
    mine = scratch.take("pixels", 100)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(scratch.take, "pixels", 100).result()
    assert address(theirs) != address(mine)


def test_a_very_large_buffer_is_not_kept():
    scratch = Scratch()
    kept = scratch.take("pixels", 100)
    huge = scratch.take("pixels", MAX_KEPT_BYTES + 1)
    assert len(huge) == MAX_KEPT_BYTES + 1
    assert address(scratch.take("pixels", 100)) == address(kept)
