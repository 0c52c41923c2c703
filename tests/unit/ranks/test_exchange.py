"""The way to the other ranks; with several of them in test_processes.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from vlmpack.ranks import EvenRanks, exchange


@pytest.fixture
def world():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_numbers_and_batches_travel(world):
    ranks = exchange.connect()
    assert isinstance(ranks, exchange.Distributed)
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert ranks.total([3, 1 << 40]) == [3, 1 << 40]
    assert ranks.lowest(7) == 7
    sent = {"labels": torch.arange(3), "keys": [("a",)]}
    received = ranks.copy_of(sent, 0)
    assert torch.equal(received["labels"], sent["labels"])
    assert received["keys"] == sent["keys"]


def test_a_group_can_be_given(world):
    batch = {"labels": torch.arange(3)}
    ranks = EvenRanks([batch], group=world)
    assert [(got["labels"].tolist(), ranks.loss_scale) for got in ranks] == [([0, 1, 2], 1 / 3)]


def test_where_only_the_device_can_sum_a_group_with_gloo_is_made(world, monkeypatch):
    monkeypatch.setattr(
        dist, "get_backend_config", lambda group: "cuda:nccl" if group is world else "cpu:gloo"
    )
    ranks = exchange.connect()
    assert isinstance(ranks, exchange.Distributed)
    assert ranks._group is not world
    assert ranks._device == torch.device("cpu")
    assert ranks.total([5]) == [5]


def test_without_a_process_group_there_is_nobody_to_tell():
    assert isinstance(exchange.connect(), exchange.Alone)
    assert exchange.Alone().total([1, 2]) == [1, 2]
    assert exchange.Alone().lowest(4) == 4
    assert exchange.Alone().copy_of("batch", 0) == "batch"
