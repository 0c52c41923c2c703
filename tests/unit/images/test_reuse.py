from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from vlmpack.images import empty_tiles
from vlmpack.images import reuse as module
from vlmpack.images.reuse import MAX_KEPT_BYTES, MIN_BYTES, reusable


@pytest.fixture(autouse=True)
def nothing_free():
    module._free.clear()
    yield
    module._free.clear()


def test_memory_comes_back_when_the_tensor_is_gone():
    tensor = torch.from_numpy(reusable((MIN_BYTES,), np.uint8))
    place = tensor.data_ptr()
    assert torch.from_numpy(reusable((MIN_BYTES,), np.uint8)).data_ptr() != place, "it is in use"
    module._free.clear()
    del tensor
    gc.collect()
    assert torch.from_numpy(reusable((1100, 1000), np.uint8)).data_ptr() == place


@pytest.mark.parametrize(
    "derive",
    [
        lambda tiles: tiles[2:],
        lambda tiles: tiles.permute(0, 2, 3, 1).numpy()[1],
        lambda tiles: torch.split(tiles, 2)[1],
        lambda tiles: tiles.untyped_storage(),
        lambda tiles: tiles.detach(),
        lambda tiles: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(tiles)),
        lambda tiles: memoryview(tiles.permute(0, 2, 3, 1).numpy()),
    ],
    ids=["slice", "numpy", "split", "storage", "detach", "dlpack", "memoryview"],
)
def test_nothing_that_shares_the_storage_is_overwritten(derive):
    tiles = empty_tiles(4, 512)
    tiles.fill_(7)
    derived = derive(tiles)
    del tiles
    gc.collect()
    for _ in range(3):
        empty_tiles(4, 512).fill_(9)
    is_storage = isinstance(derived, torch.UntypedStorage)
    found = np.asarray(torch.tensor([], dtype=torch.uint8).set_(derived) if is_storage else derived)
    assert (found == 7).all()
    del derived, found
    gc.collect()
    assert len(module._free) == 2, "the memory of what was derived, and that of the loop"


def test_small_arrays_are_not_worth_it():
    array = reusable((MIN_BYTES - 1,), np.uint8)
    del array
    gc.collect()
    assert not module._free


def test_other_types_and_shapes():
    array = reusable((3, 400, 500), np.float32)
    assert array.shape == (3, 400, 500)
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert reusable((0, 3), np.uint8).shape == (0, 3)


def test_a_larger_block_serves_and_a_smaller_one_waits():
    large, small = reusable((8 << 20,), np.uint8), reusable((2 << 20,), np.uint8)
    places = [array.__array_interface__["data"][0] for array in (large, small)]
    del small
    gc.collect()
    del large
    gc.collect()
    wanted = reusable((5 << 20,), np.uint8)
    assert wanted.__array_interface__["data"][0] == places[0]
    assert [len(block) for block in module._free] == [2 << 20]


def test_what_is_kept_is_bounded():
    held = [reusable((MAX_KEPT_BYTES // 4,), np.uint8) for _ in range(6)]
    held.clear()
    gc.collect()
    assert len(module._free) == 4


def test_threads_never_share_a_block():
    def work(number):
        tiles = empty_tiles(4, 512)
        tiles.fill_(number)
        return bool((tiles == number).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(200)))
