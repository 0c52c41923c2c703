"""Engines: every task's result once, whatever workers do."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from vlmpack.errors import ConfigError, SourceError
from vlmpack.offline import Engine
from vlmpack.offline.engine import run_tasks


def square(number):
    return number * number


def die_once(number, folder):
    marker = Path(folder) / str(number)
    if number % 3 == 0 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number):
    if number == 2:
        raise SourceError("file 2 is broken")
    return number


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_each_task_runs_once_and_its_result_comes_back(workers):
    found = run_tasks(square, [(number,) for number in range(20)], Engine(num_workers=workers))
    assert sorted(found) == [number * number for number in range(20)]
    assert list(run_tasks(square, [], Engine(num_workers=workers))) == []


@pytest.mark.slow
def test_tasks_of_workers_that_died_are_run_again(tmp_path):
    tasks = [(number, str(tmp_path)) for number in range(6)]
    found = run_tasks(die_once, tasks, Engine(num_workers=2, max_deaths=6))
    assert sorted(found) == [number * number for number in range(6)]


@pytest.mark.slow
def test_workers_that_keep_dying_end_the_run():
    with pytest.raises(SourceError, match=r"died 2 times, with 4 of 4 tasks left.*goes on"):
        list(run_tasks(die, [(number,) for number in range(4)], Engine(num_workers=2, max_deaths=1)))


@pytest.mark.slow
def test_an_error_of_a_task_reaches_the_caller():
    with pytest.raises(SourceError, match="file 2 is broken"):
        list(run_tasks(fail, [(number,) for number in range(8)], Engine(num_workers=2)))


@pytest.mark.slow
def test_who_stops_reading_leaves_no_process_behind():
    import multiprocessing
    import time

    found = run_tasks(square, [(number,) for number in range(50)], Engine(num_workers=2))
    next(found)
    found.close()
    for _ in range(100):
        if not multiprocessing.active_children():
            break
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"name": "slurm"}, "pool"), ({"num_workers": -1}, "num_workers"), ({"max_deaths": -1}, "max_deaths")],
)
def test_wrong_engines_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Engine(**settings)
