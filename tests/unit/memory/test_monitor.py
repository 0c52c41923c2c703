"""Watching memory, splitting steps, and asking the device."""

from __future__ import annotations

import pytest

from vlmpack.errors import ConfigError
from vlmpack.memory import (
    FakeMemory,
    GradientAccumulationScheduler,
    MemoryMonitor,
    ProcessMemory,
    get_gpu_memory,
    get_gpu_memory_info,
    log_memory_usage,
)

GB = 10**9


# ---- monitor -----------------------------------------------------------------------------------
def watched(peaks, interval=1):
    device = FakeMemory(total=80 * GB)
    monitor = MemoryMonitor(backend=device, interval=interval)
    for step, peak in enumerate(peaks):
        device.use(peak)
        device.use(GB)
        monitor.record(step)
    return monitor


def test_the_monitor_knows_peak_average_and_trend():
    monitor = watched([10 * GB, 12 * GB, 14 * GB])
    assert monitor.peak_bytes == 14 * GB
    assert monitor.average_bytes == 12 * GB
    assert monitor.trend_bytes_per_step() == pytest.approx(2 * GB)
    assert monitor.summary() == {
        "peak_gb": 14.0,
        "average_gb": 12.0,
        "current_gb": 1.0,
        "trend_gb_per_step": pytest.approx(2.0),
        "num_records": 3,
    }


def test_entries_are_made_at_the_interval():
    monitor = watched([GB] * 25, interval=10)
    assert [entry.step for entry in monitor.records] == [0, 10, 20]
    assert monitor.record(21) is None
    assert monitor.record(21, force=True).step == 21


def test_the_peak_outlives_the_history():
    device = FakeMemory(total=80 * GB)
    monitor = MemoryMonitor(backend=device, interval=1, history=2)
    for step, peak in enumerate([50 * GB, GB, GB, GB]):
        device.use(peak)
        monitor.record(step)
    assert len(monitor.records) == 2
    assert monitor.peak_bytes == 50 * GB


def test_an_empty_monitor_has_no_trend():
    monitor = MemoryMonitor(backend=FakeMemory(total=GB))
    assert monitor.average_bytes == 0.0
    assert monitor.trend_bytes_per_step() == 0.0


def test_every_entry_starts_a_new_peak():
    monitor = watched([10 * GB, 2 * GB])
    assert [entry.peak for entry in monitor.records] == [10 * GB, 2 * GB]


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"history": 0}])
def test_impossible_monitors_are_refused(wrong):
    with pytest.raises(ConfigError):
        MemoryMonitor(**wrong)


# ---- accumulation ------------------------------------------------------------------------------
def test_available_memory_decides_the_micro_batches():
    scheduler = GradientAccumulationScheduler(16, bytes_per_sample=GB, fixed_bytes=2 * GB)
    # (8 - 2) / 1 = 6 samples: 6 + 6 + 4
    assert scheduler.recommend(8 * GB) == 3
    assert scheduler.micro_batches() == (6, 6, 4)
    assert scheduler.recommend(100 * GB) == 1
    assert scheduler.micro_batches() == (16,)


@pytest.mark.parametrize("micro", range(1, 17))
def test_the_step_keeps_its_size_whatever_the_split(micro):
    scheduler = GradientAccumulationScheduler(16, max_micro_batch=micro)
    assert sum(scheduler.micro_batches()) == 16
    assert len(scheduler.micro_batches()) == scheduler.accumulation_steps


def test_a_measured_peak_shrinks_and_grows_the_micro_batch():
    scheduler = GradientAccumulationScheduler(16, max_micro_batch=8)
    # 8 samples took 16 GB, 2 each; 9 of 10 GB may be used: 4 samples
    assert scheduler.adjust(16 * GB, 10 * GB) == 4
    assert scheduler.micro_batch_size == 4
    # 4 samples took 4 GB; 9 would fit, but it grows by a quarter at most
    scheduler.adjust(4 * GB, 10 * GB)
    assert scheduler.micro_batch_size == 5
    assert sum(scheduler.micro_batches()) == 16


def test_a_split_never_goes_below_one_sample():
    scheduler = GradientAccumulationScheduler(4)
    scheduler.adjust(100 * GB, GB)
    assert scheduler.micro_batches() == (1, 1, 1, 1)


def test_too_little_memory_for_one_sample_is_refused():
    scheduler = GradientAccumulationScheduler(4, bytes_per_sample=GB)
    with pytest.raises(ConfigError, match=r"one sample needs 1\.00 GB"):
        scheduler.recommend(GB / 2)
    with pytest.raises(ConfigError, match="bytes_per_sample is 0"):
        GradientAccumulationScheduler(4).recommend(GB)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_effective_batch_size": 0},
        {"target_effective_batch_size": 4, "bytes_per_sample": -1},
        {"target_effective_batch_size": 4, "max_micro_batch": 0},
    ],
)
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ConfigError):
        GradientAccumulationScheduler(**wrong)
    with pytest.raises(ConfigError, match="fraction"):
        GradientAccumulationScheduler(4).adjust(GB, GB, margin=10)


# ---- the device --------------------------------------------------------------------------------
class _FakeCuda:
    """What torch.cuda says of a GPU of 24 GB with 20 reserved."""

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def memory_allocated(device=None):
        return 15 * GB

    @staticmethod
    def memory_reserved(device=None):
        return 18 * GB

    @staticmethod
    def max_memory_allocated(device=None):
        return 17 * GB

    @staticmethod
    def reset_peak_memory_stats(device=None):
        pass

    @staticmethod
    def get_device_properties(device):
        class Properties:
            total_memory = 24 * GB

        return Properties()


@pytest.fixture
def gpu(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "cuda", _FakeCuda)


@pytest.fixture
def no_gpu(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpus_memory_is_told_in_decimal_gb(gpu):
    assert get_gpu_memory_info() == {
        "allocated": 15.0,
        "reserved": 18.0,
        "free": 6.0,
        "total": 24.0,
        "utilization": 0.75,
    }
    assert get_gpu_memory() == 17.0


def test_the_log_line(gpu, capsys):
    log_memory_usage(100, prefix="[Monitor] ")
    assert capsys.readouterr().out == "[Monitor] [Step 100] GPU: Alloc=15.0GB Reserved=18.0GB (75%)\n"


def test_without_a_gpu_all_keys_are_there_and_zero(no_gpu, capsys):
    assert get_gpu_memory_info() == {
        "allocated": 0,
        "reserved": 0,
        "free": 0,
        "total": 0,
        "utilization": 0,
    }
    log_memory_usage(3)
    assert capsys.readouterr().out == "[Step 3] GPU: Alloc=0.0GB Reserved=0.0GB (0%)\n"
    assert get_gpu_memory() == 0.0


def test_the_documents_dictionary_breaks_its_own_log_line_without_a_gpu(no_gpu):
    assert get_gpu_memory_info(legacy=True) == {"allocated": 0, "reserved": 0, "free": 0}
    with pytest.raises(KeyError, match="utilization"):
        log_memory_usage(3, legacy=True)


def test_the_process_has_a_size():
    reading = ProcessMemory().read()
    assert 2**20 < reading.allocated <= reading.total
    assert reading.peak >= reading.allocated // 2


def test_a_fake_device_refuses_negative_use():
    with pytest.raises(ConfigError):
        FakeMemory(total=1).use(-1)
