"""A step is repeated, split finer, until every item has run once; what fails alone has a policy."""

from __future__ import annotations

import weakref

import pytest
import torch

from tests.fakes import packs_of, row
from vlmpack.batching import OOMGuardian, SampleShape, run_step_with_recovery, simulated_oom
from vlmpack.errors import OversizeError, VlmpackError


class Runner:
    """Adds up what ran, and fails where it is told to."""

    def __init__(self, limit: float = float("inf"), fail=None) -> None:
        self.limit = limit
        self.fail = fail or (lambda part: False)
        self.ran: list = []
        self.attempts = 0
        self.seen: list[list[int]] = []

    def begin(self, parts) -> None:
        self.attempts += 1
        self.ran = []
        self.seen.append([len(part.items) for part in parts])

    def run(self, part) -> None:
        if sum(shape.num_tokens for shape in part.shapes) > self.limit or self.fail(part):
            raise simulated_oom()
        self.ran += [shape.key for shape in part.shapes]

    def restore(self) -> None:
        self.ran = []


def shapes(*lengths: int, task: str = "T1") -> list[SampleShape]:
    return [SampleShape(key=f"s{at}", num_tokens=length, task_type=task) for at, length in enumerate(lengths)]


def step(runner: Runner, *lengths: int, guardian: OOMGuardian | None = None, **more):
    known = more.pop("known", None) or shapes(*lengths)
    guardian = guardian or OOMGuardian()
    return run_step_with_recovery(known, runner, guardian=guardian, undo=runner, shapes=known, **more)


def test_a_step_that_fits_runs_once():
    runner = Runner()
    report = step(runner, 3, 4, 5)
    assert (report.num_attempts, report.num_micro_batches, runner.seen) == (1, 1, [[3]])


def test_a_step_is_split_until_it_fits_and_nothing_runs_twice():
    runner = Runner(limit=30)
    report = step(runner, *[10] * 9)
    assert sorted(runner.ran) == sorted(f"s{at}" for at in range(9))
    # cost 99 -> cap 69.3 (6 items) -> 5 + 4; 55 -> cap 38.5 (3 items): three of three
    assert runner.seen == [[9], [5, 4], [3, 3, 3]]
    assert (report.num_attempts, report.num_micro_batches) == (3, 3)


def test_the_next_step_begins_where_the_last_one_ended():
    guardian, runner = OOMGuardian(), Runner(limit=30)
    step(runner, *[10] * 9, guardian=guardian)
    report = step(runner, *[10] * 9, guardian=guardian)
    assert report.num_attempts == 1


def test_a_step_of_no_samples_is_a_step():
    runner = Runner()
    assert step(runner).num_micro_batches == 0
    assert runner.attempts == 1


def test_tasks_can_be_kept_apart():
    known = [SampleShape(key=str(at), num_tokens=1, task_type=f"T{1 + at % 3}") for at in range(6)]
    runner = Runner()
    step(runner, known=known, group_by_task=True)
    assert runner.seen == [[2, 2, 2]]
    assert runner.ran == ["0", "3", "1", "4", "2", "5"]


def test_the_failed_step_is_free_before_it_is_tried_again():
    """The error's traceback would keep its activations: accelerate and most recipes retry with it alive."""
    kept: list[weakref.ref] = []
    alive: list[bool] = []

    def fail(part):
        alive.extend(each() is not None for each in kept)
        activations = torch.ones(1000)
        kept.append(weakref.ref(activations))
        if len(kept) < 3:
            holder = {"activations": activations}
            holder["itself"] = holder  # a cycle, which only the collector frees
            raise simulated_oom()
        return False

    step(Runner(fail=fail), 5, 5, 5)
    assert alive[:3] == [False, False, False]


def test_other_errors_pass_through():
    def fail(part):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        step(Runner(fail=fail), 5)


def test_a_sample_alone_is_tried_once_more_and_then_named():
    runner = Runner(limit=30)
    with pytest.raises(OversizeError, match=r"sample s1 does not fit in memory alone: task T1, 40 tokens"):
        step(runner, 10, 40, 10)
    guardian, failures = OOMGuardian(), [True, False]
    runner = Runner(fail=lambda part: failures.pop(0) if failures else False)
    report = step(runner, 5, guardian=guardian)
    assert report.num_attempts == 2
    assert guardian.cap == float("inf")  # one sample once says nothing about sizes


def test_a_sample_can_be_isolated_and_is_reported():
    runner = Runner(limit=30)
    report = step(runner, 10, 40, 10, guardian=OOMGuardian(single_sample="isolate_and_report"))
    assert [shape.key for shape in report.isolated] == ["s1"]
    assert sorted(runner.ran) == ["s0", "s2"]


@pytest.mark.parametrize("helps", [True, False])
def test_checkpointing_is_tried_once(helps):
    runner = Runner(limit=30)
    called = []

    def checkpoint() -> bool:
        called.append(True)
        runner.limit = 50 if helps else 30
        return len(called) == 1

    guardian = OOMGuardian(single_sample="checkpoint_then_retry")
    if helps:
        assert step(runner, 10, 40, guardian=guardian, checkpoint=checkpoint).num_attempts >= 3
        assert sorted(runner.ran) == ["s0", "s1"]
    else:
        with pytest.raises(OversizeError, match="gradient checkpointing did not help"):
            step(runner, 10, 40, guardian=guardian, checkpoint=checkpoint)
        assert len(called) == 2


def test_a_pack_that_does_not_fit_alone_is_cut_between_its_samples():
    (pack,) = packs_of([row(f"Question {i}?", "An answer.") for i in range(4)], seq_length=400)
    assert len(pack.keys) == 4
    runner = Runner(limit=len(pack) * 0.4)
    report = run_step_with_recovery([pack], runner, guardian=OOMGuardian(), undo=runner)
    assert report.num_micro_batches == 4
    assert [key for name in runner.ran for key in name.split("+")] == list(pack.keys)


def test_a_device_that_is_full_of_something_else_ends_the_run():
    with pytest.raises(VlmpackError, match="still runs out of memory after 50 attempts"):
        step(Runner(fail=lambda part: True), 5, 5, 5, divide=lambda item: (item, item), known=shapes(5))
