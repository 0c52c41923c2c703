from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vlmpack import VlmpackError
from vlmpack.collate import _joined_tiles
from vlmpack.errors import ConfigError
from vlmpack.images import empty_tiles
from vlmpack.transfer import SharedBatches, _receive

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="batches go the usual way here")


class Numbers(Dataset):
    def __init__(self, num=12):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return index


def tensors_of(number):
    """One of each kind: pixel by pixel, whole numbers, half floats, truths, none at all, a repeated one."""
    pixels = torch.full((2, 5, 7, 3), number, dtype=torch.uint8).permute(0, 3, 1, 2)
    pixels[1, 2, 4, 6] = 200
    return {
        "tiles": pixels,
        "ids": torch.arange(13) + number,
        "half": torch.full((3, 1), number / 2, dtype=torch.bfloat16),
        "truth": torch.tensor([True, False, True]),
        "nothing": torch.empty((0, 3, 4), dtype=torch.uint8),
        "scalar": torch.tensor(number),
        "repeated": torch.tensor([number]).expand(4),
        "every second": torch.arange(20)[::2] + number,
    }


def batch_of(numbers):
    return {"keys": [tuple(map(str, numbers))], **tensors_of(numbers[0])}


def loader(collate, num=12, num_workers=1, **options):
    return DataLoader(Numbers(num), batch_size=1, collate_fn=collate, num_workers=num_workers, **options)


def shares_slot(batch):
    """Whether the tensors lie in one slot."""
    return (
        len({value.untyped_storage().data_ptr() for value in batch.values() if torch.is_tensor(value)}) == 1
    )


def assert_is_batch(batch, number):
    expected = batch_of([number])
    assert list(batch) == list(expected)
    assert batch["keys"] == expected["keys"]
    for name, tensor in tensors_of(number).items():
        assert torch.equal(batch[name], tensor), name
        assert batch[name].dtype == tensor.dtype, name


def test_batches_arrive_as_they_were_made():
    for number, batch in enumerate(loader(SharedBatches(batch_of))):
        assert_is_batch(batch, number)
        assert shares_slot(batch)
        assert batch["tiles"].permute(0, 2, 3, 1).is_contiguous()
        assert all(value.untyped_storage().data_ptr() % 64 == 0 for value in [batch["ids"]])


def test_memory_is_used_again():
    # Two are prefetched, one is being made, one is with the consumer.
    shared = SharedBatches(batch_of, num_slots=4)
    places = set()
    for number, batch in enumerate(loader(shared, num=20)):
        assert_is_batch(batch, number)
        assert shares_slot(batch)
        places.add(batch["tiles"].untyped_storage().data_ptr())
        del batch
    assert len(places) <= 4


def test_batches_that_are_kept_are_never_overwritten():
    kept = list(loader(SharedBatches(batch_of, num_slots=2), num=12))
    for number, batch in enumerate(kept):
        assert_is_batch(batch, number)
    assert [shares_slot(batch) for batch in kept].count(True) == 2, "the others went the usual way"


def test_a_view_of_one_tensor_keeps_the_batch():
    views = []
    for batch in loader(SharedBatches(batch_of, num_slots=4), num=12):
        views.append(batch["every second"][3:5])
        del batch
    for number, view in enumerate(views):
        assert view.tolist() == [6 + number, 8 + number]


def test_a_batch_larger_than_a_slot_goes_the_usual_way():
    def collate(numbers):
        return {"small": torch.tensor(numbers), "large": torch.zeros(numbers[0] * 3000, dtype=torch.uint8)}

    shared = SharedBatches(collate, slot_bytes=4096)
    batches = list(loader(shared, num=3))
    assert [len(batch["large"]) for batch in batches] == [0, 3000, 6000]
    assert [shares_slot(batch) for batch in batches] == [True, True, False]


def test_two_passes_over_one_loader_at_once_do_not_mix():
    shared = SharedBatches(batch_of, num_slots=2)
    both = loader(shared, num=8, num_workers=2)
    for number, (one, other) in enumerate(zip(both, both, strict=True)):
        assert_is_batch(one, number)
        assert_is_batch(other, number)


def test_batches_may_be_written_to():
    for number, batch in enumerate(loader(SharedBatches(batch_of), num=6)):
        batch["ids"].fill_(-1)
        assert_is_batch({**batch, "ids": torch.arange(13) + number}, number)


def test_without_workers_it_is_the_collate_function():
    assert_is_batch(SharedBatches(batch_of)([4]), 4)


def test_what_is_no_dictionary_goes_the_usual_way():
    assert [batch.tolist() for batch in loader(SharedBatches(torch.tensor), num=2)] == [[0], [1]]


def test_a_consumer_that_stops_early_leaves_nothing_behind():
    shared = SharedBatches(batch_of)
    before = set(os.listdir("/dev/shm"))  # noqa: S108 - is looked at only
    iterator = iter(loader(shared, num=50, num_workers=2))
    batch = next(iterator)
    rings = [weakref.ref(ring) for ring in shared._rings.values()]
    assert rings
    del iterator, batch
    gc.collect()
    assert not multiprocessing.active_children()
    assert set(os.listdir("/dev/shm")) <= before  # noqa: S108
    del shared
    gc.collect()
    assert all(ring() is None for ring in rings)


def test_rings_of_ended_workers_go_when_others_begin():
    shared = SharedBatches(batch_of)
    for _ in range(3):
        assert sum(1 for _ in loader(shared, num=4)) == 4
    assert len(shared._rings) == 1


class DiesAtFive(IterableDataset):
    def __iter__(self):
        for number in range(9):
            if number == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            yield number


def read_from_a_worker_that_dies():
    kept, message = [], ""
    try:
        for batch in DataLoader(
            DiesAtFive(), batch_size=1, collate_fn=SharedBatches(batch_of), num_workers=1, prefetch_factor=1
        ):
            kept.append(batch)
    except (RuntimeError, VlmpackError) as error:
        message = str(error)
    for number, batch in enumerate(kept):
        assert_is_batch(batch, number)
    sys.stdout.write(f"{len(kept)} good, {message}")
    sys.stdout.flush()
    os._exit(0)  # torch reports the death in whatever runs next, once for each signal


def test_a_killed_worker_is_reported_and_its_batches_stay_good():
    program = "from tests.unit.test_transfer import *; read_from_a_worker_that_dies()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "killed by signal" in done.stdout or "exited unexpectedly" in done.stdout
    assert int(done.stdout.split()[0]) >= 3


def test_a_worker_that_ended_before_its_first_batch_was_read_is_named():
    class Gone:
        def detach(self):
            raise ConnectionResetError

    shared = SharedBatches(batch_of)
    with pytest.raises(VlmpackError, match="worker process 7 ended"):
        _receive(shared._name, (7, Gone(), 1, 4096), 0, 64, ({}, [], {}))


def test_a_fork_does_not_free_what_its_parent_uses():
    iterator = iter(loader(SharedBatches(batch_of, num_slots=1), num=6))
    batch = next(iterator)
    child = os.fork()
    if child == 0:
        del batch
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    list(iterator)
    assert_is_batch(batch, 0)


def test_a_batch_for_nobody_says_so():
    with pytest.raises(VlmpackError, match="keep the DataLoader"):
        _receive("nobody", (1, None, 1, 4096), 0, 64, ({}, [], {}))


@pytest.mark.parametrize(
    "wrong", [{"num_slots": 0}, {"num_slots": 5000}, {"slot_bytes": 0}, {"num_slots": True}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SharedBatches(batch_of, **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_may_be_started_in_other_ways(method):
    kept = list(loader(SharedBatches(batch_of), num=5, multiprocessing_context=method))
    for number, batch in enumerate(kept):
        assert_is_batch(batch, number)
    assert sum(map(shares_slot, kept)) >= 4


@pytest.mark.parametrize("counts", [[3], [2, 0, 4]])
def test_tiles_of_packs_are_joined_in_order_pixel_by_pixel(counts):
    parts = [empty_tiles(count, 16).fill_(number) for number, count in enumerate(counts)]
    joined = _joined_tiles(parts)
    assert torch.equal(joined, torch.cat(parts))
    assert joined.permute(0, 2, 3, 1).is_contiguous()
