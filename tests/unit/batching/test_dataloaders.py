"""Loaders made anew: settings, shuffle and workers."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from vlmpack.batching import (
    BatchSizeScheduler,
    StepBatchSizeConfig,
    recreate_dataloader,
    scheduled_epochs,
)
from vlmpack.errors import ConfigError


def numbers(count=20):
    return TensorDataset(torch.arange(count))


def join(items):
    return torch.stack([item[0] for item in items])


def test_every_setting_but_the_batch_size_is_kept():
    generator = torch.Generator().manual_seed(7)
    old = DataLoader(
        numbers(), batch_size=4, shuffle=True, collate_fn=join, drop_last=True, generator=generator, timeout=0
    )
    new = recreate_dataloader(old, 6)
    assert new.batch_size == 6
    assert new.sampler is old.sampler
    for name in ("collate_fn", "drop_last", "generator", "num_workers", "pin_memory", "worker_init_fn"):
        assert getattr(new, name) is getattr(old, name), name
    assert [len(batch) for batch in new] == [6, 6, 6], "drop_last still holds"


def test_the_shuffle_goes_on_where_it_was():
    def epochs(sizes):
        loader = DataLoader(
            numbers(), batch_size=sizes[0], shuffle=True, generator=torch.Generator().manual_seed(7)
        )
        for size in sizes:
            if size != loader.batch_size:
                loader = recreate_dataloader(loader, size)
            yield [int(value) for (batch,) in loader for value in batch]

    constant, growing = list(epochs([4, 4, 4])), list(epochs([4, 4, 10]))
    assert constant == growing, "the order of the samples does not depend on the batch size"
    assert len({tuple(epoch) for epoch in constant}) == 3, "and epochs differ"


def test_a_shuffle_without_a_generator_can_be_seeded():
    orders = []
    for _ in range(2):
        loader = recreate_dataloader(DataLoader(numbers(), batch_size=4, shuffle=True), 5, seed=3)
        orders.append([int(value) for (batch,) in loader for value in batch])
    assert orders[0] == orders[1] != sorted(orders[0])


@pytest.mark.slow
def test_persistent_workers_of_the_old_loader_end():
    before = set(multiprocessing.active_children())
    old = DataLoader(numbers(), batch_size=4, num_workers=2, persistent_workers=True, prefetch_factor=3)
    assert len(list(old)) == 5
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    new = recreate_dataloader(old, 10)
    assert not any(worker.is_alive() for worker in workers)
    assert (new.num_workers, new.persistent_workers, new.prefetch_factor) == (2, True, 3)


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(7)


def test_streams_have_no_sampler_to_hand_over():
    assert [batch.tolist() for batch in recreate_dataloader(DataLoader(Stream(), batch_size=2), 5)] == [
        [0, 1, 2, 3, 4],
        [5, 6],
    ]


def test_a_loader_without_a_batch_size_is_refused():
    with pytest.raises(ConfigError, match="batch_sampler"):
        recreate_dataloader(DataLoader(numbers(), batch_sampler=[[0, 1], [2]]), 4)
    with pytest.raises(ConfigError, match="at least 1"):
        recreate_dataloader(DataLoader(numbers(), batch_size=4), 0)


def test_a_plain_loop_sees_each_epoch_with_its_size():
    scheduler = BatchSizeScheduler(StepBatchSizeConfig(step_size=2, gamma=3), 2, announce=lambda _: None)
    loader = DataLoader(numbers(18), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))
    seen = {
        epoch: [len(batch) for (batch,) in epoch_loader]
        for epoch, epoch_loader in scheduled_epochs(loader, scheduler, 5)
    }
    assert seen == {0: [2] * 9, 1: [2] * 9, 2: [6] * 3, 3: [6] * 3, 4: [18]}


def test_a_resumed_loop_begins_with_the_size_of_its_epoch():
    scheduler = BatchSizeScheduler(StepBatchSizeConfig(step_size=2, gamma=3), 2, announce=lambda _: None)
    loader = DataLoader(numbers(18), batch_size=2)
    resumed = {
        epoch: epoch_loader.batch_size
        for epoch, epoch_loader in scheduled_epochs(loader, scheduler, 5, first_epoch=3)
    }
    assert resumed == {3: 6, 4: 18}


def test_a_loop_over_epochs_refuses_a_schedule_in_samples():
    scheduler = BatchSizeScheduler(StepBatchSizeConfig(step_size=2, gamma=3, unit="samples"), 2)
    with pytest.raises(ConfigError, match="counts samples"):
        next(scheduled_epochs(DataLoader(numbers(), batch_size=2), scheduler, 3))
