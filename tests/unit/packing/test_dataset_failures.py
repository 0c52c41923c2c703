"""Whatever breaks, in a row, a worker or a thread: an error or a count at the consumer, never a hang."""

from __future__ import annotations

import gc
import os
import pickle
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from tests.fakes import Rows, Stream, broken_at, drawn, jpeg, packs_of, png, row, samples_of
from vlmpack.errors import ConfigError, OversizeError, SourceError
from vlmpack.packing import ConstantLengthDataset
from vlmpack.packing.assemble import Assembler

pytestmark = pytest.mark.timeout(60)


def loader(dataset, num_workers=2, **settings):
    return DataLoader(dataset, batch_size=None, num_workers=num_workers, **settings)


def load(dataset, num_workers=2, **settings):
    """Run a pass through a DataLoader; return sorted packed and refused keys."""
    packs = iter(loader(dataset, num_workers, **settings))
    try:
        packed = [key for pack in packs for key in pack.keys]
    finally:
        stop(packs)
    return sorted(packed), sorted(refusal.key for refusal in dataset.report.refusals)


def stop(packs):
    """End the workers now: left to the garbage collector, torch takes 5 seconds for each."""
    if hasattr(packs, "_shutdown_workers"):
        packs._shutdown_workers()


def broken_body(width=64):
    file = jpeg(width, width)
    return file[: len(file) // 2]


# A user's code that raises


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_map_style_row_that_raises_is_counted_and_the_rest_is_packed(num_workers):
    dataset = packs_of(Rows(broken_at(1, 5), 8))
    assert load(dataset, num_workers) == (list("023467"), ["1", "5"])
    assert dataset.report.num_refused == {"source_error": 2}
    assert dataset.report.num_read == 8


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_stream_that_raises_is_an_error_at_the_consumer_that_names_the_row(num_workers):
    with pytest.raises(SourceError, match=r"KeyError on row 3"):
        load(packs_of(Stream(broken_at(3), 8)), num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mapped_hugging_face_data_set_that_raises(num_workers):
    def transform(batch):
        if "bad" in batch["id"]:
            raise ValueError("user bug")
        return {"texts": [[{"user": "q", "assistant": name}] for name in batch["id"]]}

    data = Dataset.from_dict({"id": ["a", "bad", "c"]})
    assert load(packs_of(data.with_transform(transform)), num_workers) == (["0", "2"], ["1"])
    stream = data.to_iterable_dataset().map(lambda row: {"texts": transform({"id": [row["id"]]})["texts"][0]})
    with pytest.raises(SourceError, match="ValueError on row"):
        load(packs_of(stream), num_workers)


class Evil(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])  # torch waits 5 s
def test_an_exit_in_the_data_set_is_not_swallowed(num_workers):
    def make(index):
        if index == 1:
            raise SystemExit("user bug") if num_workers else Evil
        return row()

    with pytest.raises((Evil, RuntimeError, SourceError)):
        load(packs_of(Rows(make, 4)), num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_oversized_sample_under_raise_reaches_the_consumer(num_workers):
    with pytest.raises(OversizeError, match="sample 2"):
        load(packs_of([row(), row(), row("x " * 900), row()], oversize="raise"), num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("decode_threads", [0, 2])
def test_a_fault_of_our_own_in_a_decode_thread_reaches_the_consumer(monkeypatch, num_workers, decode_threads):
    def fail(*args, **settings):
        raise MemoryError("in a thread")

    monkeypatch.setattr("vlmpack.packing.assemble.tile_image", fail)
    with pytest.raises(MemoryError, match="in a thread"):
        load(packs_of([row(images=[png(9, 9)])] * 9, decode_threads=decode_threads), num_workers)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlmpack")]


# Nothing to pack


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("kind", [list, lambda rows: Stream(rows.__getitem__, len(rows))])
def test_an_empty_data_set_is_an_error_with_any_number_of_workers(kind, infinite, num_workers):
    with pytest.raises(SourceError, match="the data set is empty"):
        load(packs_of(kind([]), infinite=infinite), num_workers)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("infinite", [False, True])
def test_a_data_set_of_which_nothing_can_be_packed_is_an_error_with_the_reasons(infinite, num_workers):
    dataset = packs_of([{}, row("x " * 900), {}, {}], infinite=infinite)
    reasons = r"none of 4 rows can be packed: 3 bad_row, 1 sample_too_long\. The first refusal"
    with pytest.raises(SourceError, match=reasons):
        load(dataset, num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("infinite", [False, True])
def test_images_that_all_fail_to_decode_are_an_error_not_a_spin(infinite, num_workers):
    dataset = packs_of([row(images=[broken_body()])] * 3, infinite=infinite, lookahead=2)
    with pytest.raises(SourceError, match=r"image_truncated"):
        load(dataset, num_workers)


def test_images_that_stop_decoding_in_mid_run_are_an_error_not_a_spin(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(64, 64))
    samples = samples_of([row(images=[f"{name}.jpg"]) for name in "ab"], image_root=tmp_path)
    dataset = ConstantLengthDataset(samples, infinite=True, seq_length=80, lookahead=2, queue_size=1)
    packs = iter(dataset)
    for _ in range(5):
        next(packs)
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(broken_body())
    with pytest.raises(SourceError, match=r"any more.*\(image_truncated\)"):
        list(zip(packs, range(50), strict=False))


def test_one_worker_without_rows_does_not_stop_the_others():
    dataset = packs_of([row(), {}, {}])
    assert load(dataset, 2) == (["0"], ["1", "2"])
    assert load(packs_of([row()]), 2) == (["0"], [])


def test_an_infinite_pass_over_an_iterator_ends_with_an_error_and_loses_nothing():
    dataset = packs_of(iter([row("a"), row("b"), row("c")]), infinite=True)
    packs = []
    with pytest.raises(SourceError, match="only once"):
        packs.extend(dataset)
    assert sorted(key for pack in packs for key in pack.keys) == ["0", "1", "2"]


def test_a_second_pass_over_an_iterator_is_an_error_that_says_why():
    dataset = packs_of(iter([row()]))
    assert drawn(dataset) == (["0"], [])
    with pytest.raises(SourceError, match="an iterator yields its rows only once"):
        list(dataset)


# Without end


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_infinite_pass_gives_every_row_again_and_again(num_workers):
    dataset = packs_of([row(f"q{i}") for i in range(6)] + [{}], infinite=True, lookahead=3)
    seen = {}
    for count, pack in enumerate(loader(dataset, num_workers)):
        for key in pack.keys:
            seen[key] = seen.get(key, 0) + 1
        if count == 40:
            break
    assert set(seen) == set("012345")
    assert min(seen.values()) >= 3
    if not num_workers:
        assert dataset.epoch >= 3


def test_some_broken_images_do_not_stop_an_infinite_pass():
    dataset = packs_of([row(images=[broken_body()])] * 5 + [row()], infinite=True, lookahead=2)
    packs = iter(dataset)
    assert [next(packs).keys for _ in range(20)] == [("5",)] * 20


# Early stops


def left_behind(before_threads, before_folders):
    gc.collect()
    threads = {thread for thread in threading.enumerate() if thread not in before_threads}
    folders = set(Path(tempfile.gettempdir()).glob(f"vlmpack-{os.getpid()}-*")) - before_folders
    return threads, folders


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("how", ["close", "forget", "raise"])
def test_a_consumer_that_stops_early_leaves_no_thread_and_no_folder(how, num_workers):
    before_threads = set(threading.enumerate())
    before_folders = set(Path(tempfile.gettempdir()).glob(f"vlmpack-{os.getpid()}-*"))
    dataset = packs_of([row(images=[png(40, 40)])] * 60, lookahead=8)
    source = loader(dataset, num_workers) if num_workers else dataset
    packs = iter(source)
    next(packs)
    if how == "close" and not num_workers:
        packs.close()
    elif how == "raise":
        with pytest.raises(ZeroDivisionError):
            [1 // 0 for _ in packs]
    del packs, source, dataset
    deadline = time.monotonic() + 10
    while any(left_behind(before_threads, before_folders)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind(before_threads, before_folders) == (set(), set())


def test_a_pass_after_an_early_stop_begins_anew():
    dataset = packs_of([row(f"q{i}") for i in range(30)], lookahead=4)
    packs = iter(dataset)
    next(packs)
    packs.close()
    assert len(drawn(dataset)[0]) == 30
    assert dataset.report.num_read == 30


# Workers


COUNTS = ("num_read", "num_packed", "num_refused", "num_tiles", "num_texts_with_image_token")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_together_report_what_one_process_does(num_workers):
    rows = [row(f"q{i} " * (i % 5 + 1)) for i in range(20)]
    rows += [{}, row(images=[broken_body()]), row("<|image|>")]
    alone = packs_of(rows)
    expected = drawn(alone)
    dataset = packs_of(rows)
    assert load(dataset, num_workers) == expected
    for name in COUNTS:
        assert getattr(dataset.report, name) == getattr(alone.report, name), name
    assert load(dataset, num_workers) == expected, "a second pass counts from nothing"
    assert drawn(dataset) == expected


def test_persistent_workers_count_each_pass_anew():
    dataset = packs_of([row(f"q{i}") for i in range(10)] + [{}])
    source = loader(dataset, 2, persistent_workers=True)
    for _ in range(3):
        assert len([key for pack in source for key in pack.keys]) == 10
        assert (dataset.report.num_read, dataset.report.num_packed) == (11, 10)


@pytest.mark.slow
def test_workers_started_by_spawn_do_the_same():
    rows = [row(f"q{i}", images=[png(30 + i, 40)]) for i in range(6)] + [{}]
    dataset = packs_of(rows)
    assert load(dataset, 2, multiprocessing_context="spawn") == drawn(packs_of(rows))
    assert dataset.report.num_read == 7


def test_a_pickled_data_set_packs_and_reports_the_same():
    rows = [row(f"q{i}", images=[png(30 + i, 40)]) for i in range(6)] + [{}]
    dataset = packs_of(rows)
    frozen = pickle.dumps(dataset)
    expected = list(dataset)
    del dataset
    twin = pickle.loads(frozen)  # noqa: S301 - our own
    for num_workers in (0, 1):
        packs = list(loader(twin, num_workers))
        assert [pack.keys for pack in packs] == [pack.keys for pack in expected]
        assert all(torch.equal(a.tiles, b.tiles) for a, b in zip(packs, expected, strict=True))
        assert twin.report.num_read == 7


def test_a_key_column_that_does_not_exist_is_an_error_in_workers_too():
    dataset = ConstantLengthDataset(samples_of([row()] * 4, key_column="ID"), seq_length=120)
    with pytest.raises(ConfigError, match="key_column 'ID' is not a column"):
        load(dataset, 2)


def test_a_pack_over_budget_would_be_a_value_error_at_the_consumer(monkeypatch):
    dataset = packs_of([row()] * 10)
    tight = dataset.budget.__class__(max_tokens=3)
    monkeypatch.setattr(dataset, "_assemble", Assembler(
        budget=tight, tile_size=32, pad_token_id=0, append_pad=True, max_pixels=100
    ))  # fmt: skip
    with pytest.raises(ValueError, match="over the budget"):
        load(dataset, 2)


def test_hugging_face_streams_of_few_shards_lose_nothing_to_idle_workers():
    rows = [{"id": str(i), **row(f"q{i}")} for i in range(9)]
    for shards in (1, 3):
        parts = [rows[number::shards] for number in range(shards)]
        stream = IterableDataset.from_generator(_chain, gen_kwargs={"parts": parts})
        dataset = ConstantLengthDataset(samples_of(stream, key_column="id"), seq_length=120)
        assert load(dataset, 2)[0] == list("012345678")


def _chain(parts):
    for part in parts:
        yield from part
