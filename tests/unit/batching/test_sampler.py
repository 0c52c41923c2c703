"""Batches of mixed tasks under a memory limit: as documented by its name, corrected by default."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vlmpack.batching import HeterogeneousCollator, MemoryAwareBatchSampler, StepPlan
from vlmpack.errors import ConfigError, OversizeError
from vlmpack.memory import FakeMemory, MemoryPredictor, task_cost


class Mock:
    """Samples of given tasks; T1 has one image, the others two."""

    def __init__(self, tasks) -> None:
        self.tasks = list(tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> dict:
        return {"images": [torch.zeros(1, 2, 2)], "input_ids": [1, 2], "task_type": self.tasks[index]}

    def get_sample_metadata(self, idx: int) -> dict:
        return {"task_type": self.tasks[idx], "num_images": 1 if self.tasks[idx] == "T1" else 2}


def mixed(number: int) -> Mock:
    return Mock(("T1", "T2", "T1", "T3")[index % 4] for index in range(number))


def test_the_documented_test_holds():
    dataset = mixed(100)
    sampler = MemoryAwareBatchSampler(dataset=dataset, batch_size=8, max_memory_mb=30000)
    number = 0
    for batch in sampler:
        number += 1
        memory = sampler._estimate_batch_memory(batch)
        assert memory < 30  # GB
    assert number >= 13


def test_the_documented_dataloader_works():
    dataset = mixed(20)
    sampler = MemoryAwareBatchSampler(dataset=dataset, batch_size=16, max_memory_mb=30000, shuffle=True)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=HeterogeneousCollator())
    assert sum(batch.num_samples for batch in loader) == 20


def test_the_predicted_memory_is_the_formulas():
    sampler = MemoryAwareBatchSampler(mixed(4))
    # 0.27 + 0.63 * (1 + 1.85 + 1 + 1.87)
    assert sampler._estimate_batch_memory([0, 1, 2, 3]) == pytest.approx(0.27 + 0.63 * 5.72)
    assert MemoryAwareBatchSampler(mixed(4), memory_predictor=MemoryPredictor())._estimate_batch_memory([
        0
    ]) == pytest.approx(0.9)


def test_without_a_limit_it_is_the_devices_less_the_margin_or_the_documented_one():
    assert MemoryAwareBatchSampler(mixed(4), batch_size=16).limit_bytes == pytest.approx(27e9)
    on_device = MemoryAwareBatchSampler(mixed(4), backend=FakeMemory(total=10 * 10**9))
    assert on_device.limit_bytes == pytest.approx(9e9)
    assert MemoryAwareBatchSampler(mixed(4), max_memory_mb=2000, memory_margin_percent=0).limit_bytes == 2e9


def test_an_unequal_sampler_has_no_batch_size_that_accelerate_would_trust():
    sampler = MemoryAwareBatchSampler(mixed(4), batch_size=3)
    assert sampler.batch_size is None
    assert sampler.max_batch_size == 3


TASKS = st.lists(st.sampled_from(["T1", "T2", "T3"]), min_size=1, max_size=40)


@given(tasks=TASKS, size=st.integers(1, 9), seed=st.integers(0, 9), epochs=st.integers(1, 3))
def test_each_epoch_has_each_sample_once_in_batches_that_fit(tasks, size, seed, epochs):
    sampler = MemoryAwareBatchSampler(Mock(tasks), size, 5000, seed=seed)
    for epoch in range(epochs):
        assert sampler.epoch == epoch
        length = len(sampler)
        batches = list(sampler)
        assert len(batches) == length
        assert Counter(index for batch in batches for index in batch) == Counter(range(len(tasks)))
        assert all(sampler._estimate_batch_memory(batch) < 4.5 for batch in batches)
        assert max(map(len, batches)) <= size


def test_the_first_term_of_the_documented_priority_decides_nothing():
    # whatever its weight below 1, the batches are those of diversity alone
    batches = [
        list(MemoryAwareBatchSampler(mixed(40), 8, shuffle=False, priority="legacy", diversity_weight=weight))
        for weight in (0.1, 0.5, 1.0)
    ]
    assert batches[0] == batches[1] == batches[2]
    fuller = [
        list(MemoryAwareBatchSampler(mixed(40), 8, shuffle=False, diversity_weight=weight))
        for weight in (0.0, 0.5)
    ]
    assert fuller[0] != fuller[1]


def test_one_batch_can_be_built_of_any_samples():
    sampler = MemoryAwareBatchSampler(mixed(12), 4, priority="legacy")
    # T1 first; then each task once; then the lowest of all
    assert sampler.construct_batch([8, 9, 10, 11]) == [8, 9, 11, 10]
    assert sampler.construct_batch([]) == []


def test_a_sample_over_the_limit_alone_is_never_silent(caplog):
    dataset = Mock(["T1", "T2", "T1"])  # 0.9, 1.4355 and 0.9 GB against 1.2
    with pytest.raises(OversizeError, match=r"the first is 1: task T2, 2 image\(s\), 1\.44 GB > 1\.20 GB"):
        MemoryAwareBatchSampler(dataset, 4, 1200, memory_margin_percent=0)
    isolated = MemoryAwareBatchSampler(
        dataset, 4, 1200, shuffle=False, memory_margin_percent=0, oversize="isolate"
    )
    assert list(isolated) == [[0], [2], [1]]
    dropped = MemoryAwareBatchSampler(dataset, 4, 1200, memory_margin_percent=0, oversize="drop")
    assert sorted(index for batch in dropped for index in batch) == [0, 2]
    assert dropped.oversized == isolated.oversized == (1,)
    assert "left out" in caplog.text


def test_steps_of_a_run_can_be_its_batches():
    sampler = MemoryAwareBatchSampler(mixed(30), 8, 5000)
    plans = [StepPlan(sampler, epochs=2, rank=rank, world_size=2) for rank in range(2)]
    held = Counter(index for plan in plans for step in plan for index in step)
    assert set(held.values()) == {2}
    assert len(held) == 30
    other = MemoryAwareBatchSampler(mixed(30), 8, 6000)
    assert StepPlan(other, epochs=2).digest != plans[0].digest == plans[1].digest


def test_any_number_of_tasks_will_do_and_an_unknown_one_is_named():
    dataset = Mock(["T1", "T9"])
    with pytest.raises(ConfigError, match="sample 1 is of task 'T9'"):
        MemoryAwareBatchSampler(dataset)
    assert len(MemoryAwareBatchSampler(dataset, memory_predictor=task_cost({"T1": 1.0, "T9": 3.0}))) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"max_memory_mb": -1}, "max_memory_mb must be positive"),
        ({"diversity_weight": 2}, "diversity_weight is a share"),
        ({"memory_margin_percent": 10}, "memory_margin_percent is a fraction"),
        ({"priority": "random"}, "priority must be one of"),
        ({"oversize": "hide"}, "oversize must be one of"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        MemoryAwareBatchSampler(mixed(4), **settings)


def test_a_data_set_without_metadata_is_told_what_it_needs():
    with pytest.raises(ConfigError, match=r"list cannot be sampled by memory.*get_sample_metadata"):
        MemoryAwareBatchSampler([1, 2])
