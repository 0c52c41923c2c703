"""One report out of many processes, whatever starts, ends, forks or copies them."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle

import pytest

from vlmpack.budget import PackBudget, SampleCost
from vlmpack.packing.ledger import Ledger
from vlmpack.samples import Refusal

pytestmark = pytest.mark.timeout(60)

BUDGET = PackBudget(max_tokens=100)


def count(report, num_packs=1):
    for _ in range(num_packs):
        report.num_read += 1
        cost = SampleCost(num_tokens=50, num_images=0, num_patches=0)
        report.add_pack([cost], num_tiles=0, num_supervised=1, num_appended=1)


def files(ledger):
    return sorted(ledger._folder.iterdir())


def as_in_a_worker(ledger):
    """Return what a forked worker has: another object with the same state."""
    twin = Ledger.__new__(Ledger)
    twin.__dict__.update(ledger.__dict__)
    return twin


def worked(ledger, worker_id, num_workers, num_packs=1):
    """Do what a DataLoader worker does; return the sum of all if it was the last to finish."""
    own = as_in_a_worker(ledger)
    count(own.start(worker_id, num_workers), num_packs)
    return own.finish()


def test_without_workers_the_report_is_live_and_there_are_no_files():
    ledger = Ledger(BUDGET)
    report = ledger.start()
    count(report)
    assert ledger.total().num_packs == 1
    count(report)
    assert ledger.total().num_packs == 2
    assert files(ledger) == []


def test_workers_add_up():
    ledger = Ledger(BUDGET)
    worked(ledger, 0, 2, num_packs=3)
    worked(ledger, 1, 2, num_packs=4)
    assert ledger.total().num_packs == 7
    assert len(files(ledger)) == 2


def test_the_last_worker_to_finish_gets_the_sum_and_the_others_do_not():
    ledger = Ledger(BUDGET)
    first, second = as_in_a_worker(ledger), as_in_a_worker(ledger)
    first.start(0, 2)
    count(second.start(1, 2), 2)
    assert second.finish() is None, "worker 0 is still at it"
    assert first.finish().num_packs == 2
    alone = Ledger(BUDGET)
    count(alone.start())
    assert alone.finish().num_packs == 1


def test_a_new_pass_forgets_the_one_before():
    ledger = Ledger(BUDGET)
    for worker in range(3):
        worked(ledger, worker, 3)
    worked(ledger, 0, 2)
    assert ledger.total().num_packs == 1, "three workers of an earlier pass do not count"
    worked(ledger, 1, 2)
    worked(ledger, 0, 2)
    assert ledger.total().num_packs == 2
    count(ledger.start(), 5)
    assert ledger.total().num_packs == 5
    assert files(ledger) == []


def test_files_do_not_grow_with_the_number_of_refusals_or_writes():
    ledger = Ledger(BUDGET)
    report = ledger.start(0, 1)
    for number in range(5_000):
        report.num_read += 1
        report.refuse(Refusal(key=str(number), reason="bad_row", message="x" * 10_000))
        ledger.write(now=number % 500 == 0)
    ledger.write(now=True)
    assert len(files(ledger)) == 1
    assert files(ledger)[0].stat().st_size < 300_000
    assert ledger.total().num_refused == {"bad_row": 5_000}


def test_the_folder_goes_with_the_ledger():
    ledger = Ledger(BUDGET)
    folder = ledger._folder
    worked(ledger, 0, 1)
    assert folder.exists()
    del ledger
    gc.collect()
    assert not folder.exists()


def test_a_copy_in_another_process_writes_where_the_first_one_reads():
    ledger = Ledger(BUDGET)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=worked, args=(ledger, 0, 1, 2))
    process.start()
    process.join(50)
    assert process.exitcode == 0
    assert ledger.total().num_packs == 2
    assert ledger._folder.exists(), "the copy's end must not remove the folder"


def test_a_copy_in_the_same_process_keeps_its_own_counts():
    ledger = Ledger(BUDGET)
    for twin in (copy.deepcopy(ledger), pickle.loads(pickle.dumps(ledger))):  # noqa: S301 - our own
        worked(twin, 0, 1, num_packs=3)
        worked(ledger, 0, 1, num_packs=1)
        assert (twin.total().num_packs, ledger.total().num_packs) == (3, 1)


def test_a_copy_that_outlives_the_first_still_counts():
    ledger = Ledger(BUDGET)
    frozen = pickle.dumps(ledger)
    del ledger
    gc.collect()
    twin = pickle.loads(frozen)  # noqa: S301 - our own
    worked(twin, 0, 1, num_packs=3)
    assert twin.total().num_packs == 3


def rank(ledger, number, results):
    """A training process of its own, with two workers."""
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=worked, args=(ledger, worker, 2, number)) for worker in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    results.put((number, ledger.total().num_packs))


def test_ranks_that_got_the_data_set_from_one_launcher_do_not_mix_their_counts():
    context = multiprocessing.get_context("fork")
    ledger, results = Ledger(BUDGET), context.Queue()
    ranks = [context.Process(target=rank, args=(ledger, number, results)) for number in (1, 2)]
    for process in ranks:
        process.start()
    counts = dict(results.get(timeout=30) for _ in ranks)
    for process in ranks:
        process.join(20)
    assert counts == {1: 2, 2: 4}


def test_reading_while_workers_begin_anew_is_safe(monkeypatch):
    ledger = Ledger(BUDGET)
    worked(ledger, 0, 2)
    worked(ledger, 1, 2)
    gone = files(ledger)[0]
    listed = list(ledger._folder.glob("*.json"))
    gone.unlink()
    monkeypatch.setattr(type(ledger._folder), "glob", lambda *_: iter(listed))
    assert ledger.total().num_packs == 1


def test_a_worker_whose_data_set_is_gone_ends_quietly():
    ledger = Ledger(BUDGET)
    own = as_in_a_worker(ledger)
    report = own.start(0, 1)
    for file in files(ledger):
        file.unlink()
    os.rmdir(ledger._folder)
    count(report)
    own.write(now=True)
    assert own.finish().num_packs == 1
