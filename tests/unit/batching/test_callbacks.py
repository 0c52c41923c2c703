"""Callbacks that watch memory."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from transformers import Trainer

from tests.toy_training import Causal, Texts, arguments, collate, memory_of
from vlmpack.batching import (
    DynamicBatchingTrainer,
    MemoryMonitorCallback,
    MemorySafetyCallback,
    OOMGuardian,
    OOMSimulator,
    SampleShape,
)
from vlmpack.errors import ConfigError
from vlmpack.memory import FakeMemory


def at(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step)


def test_it_looks_at_intervals_and_warns_when_memory_is_nearly_full(caplog):
    backend = FakeMemory(total=10 * 10**9)
    callback = MemorySafetyCallback(interval=5, warn_at=0.8, backend=backend)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 21):
            backend.use(int((9.5 if step > 12 else 2) * 10**9))
            callback.on_step_end(None, at(step), None)
    assert callback.num_warnings == 2  # at 15 and 20
    assert "[Step 15] memory is nearly full: 9.5 of 10.0 GB (95%)" in caplog.text


def test_it_tracks_when_memory_ran_out():
    guardian = OOMGuardian()
    guardian.num_ooms = 4  # before this run
    callback = MemorySafetyCallback(guardian, backend=FakeMemory(total=10))
    callback.on_train_begin(None, at(0), None)
    shape = SampleShape(key="a", num_tokens=1)
    guardian.failed([shape])
    guardian.failed([shape])
    callback.on_step_end(None, at(1), None)
    callback.on_step_end(None, at(2), None)
    guardian.failed([shape])
    callback.on_step_end(None, at(3), None)
    assert callback.oom_steps == {1: 2, 3: 1}
    assert callback.num_ooms == 3


def test_in_a_run_it_counts_what_the_guardian_met(tmp_path):
    guardian = OOMGuardian()
    callback = MemorySafetyCallback(guardian)
    model = Causal()
    trainer = DynamicBatchingTrainer(
        model,
        arguments(tmp_path),
        data_collator=collate,
        train_dataset=Texts(16),
        oom_guardian=guardian,
        callbacks=[callback],
    )
    with OOMSimulator(memory_of, limit_bytes=350).attached(model):
        trainer.train()
    assert callback.num_ooms == guardian.num_ooms > 0
    assert set(callback.oom_steps) <= {1, 2}


def test_the_monitor_writes_a_line_every_hundred_steps_of_any_trainer(tmp_path, capsys):
    callback = MemoryMonitorCallback()
    for step in range(1, 301):
        callback.on_step_end(None, at(step), None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        f"[Monitor] [Step {step}] GPU: Alloc=0.0GB Reserved=0.0GB (0%)" for step in (100, 200, 300)
    ]
    trainer = Trainer(
        Causal(),
        arguments(tmp_path, max_steps=100, per_device_train_batch_size=1),
        data_collator=collate,
        train_dataset=Texts(4),
        callbacks=[MemoryMonitorCallback()],
    )
    trainer.train()
    assert "[Monitor] [Step 100] GPU: " in capsys.readouterr().out


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="interval"):
        MemorySafetyCallback(interval=0)
    with pytest.raises(ConfigError, match="warn_at"):
        MemorySafetyCallback(warn_at=90)
