"""Real workers and loaders: any batch is a place to stop at, and a foreign place is refused."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.conformance import same
from tests.fakes import SMALL, Stream, jpeg, packs_of, png, row, samples_of
from vlmpack.errors import ConfigError, SourceError
from vlmpack.geometry import Tiling
from vlmpack.loader import ResumableLoader
from vlmpack.packing import ConstantLengthDataset

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

ROWS = [
    row(f"q{i}" * (i % 5 + 1), " word" * (1 + 7 * i % 13), images=[png(20 + 5 * (i % 9), 40)] * (i % 3))
    for i in range(90)
]
ROWS[7] = {}
ROWS[40] = row(images=[jpeg(64, 64)[:900]])  # the header is fine


def at(index):
    return ROWS[index]


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    monkeypatch.setattr("vlmpack.packing.lookahead.MIN_STRETCH", 16)


def packs(dataset=None, **settings):
    return packs_of(Stream(at, len(ROWS)) if dataset is None else dataset, **{"lookahead": 12, **settings})


def loader(num_workers, dataset=None, **settings):
    return ResumableLoader(packs(dataset), batch_size=2, collate_fn=list, num_workers=num_workers, **settings)


def torchdata_loader(num_workers):
    return StatefulDataLoader(packs(), batch_size=2, collate_fn=list, num_workers=num_workers)


def stopped(made, num_batches):
    """Take some batches and stop; return them and the position."""
    batches = iter(made)
    head = [next(batches) for _ in range(num_batches)]
    state = made.state_dict()
    del batches
    gc.collect()
    return head, state


@pytest.mark.parametrize("make", [loader, torchdata_loader])
@pytest.mark.parametrize("num_workers", [0, 1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_stop_after_any_batch_goes_on_bit_for_bit(make, num_workers):
    whole = make(num_workers)
    batches = list(whole)
    counts = getattr(whole, "packs", getattr(whole, "dataset", None)).report.counts()
    assert counts["num_read"] == 90
    assert counts["num_refused"] == {"bad_row": 1, "image_truncated": 1}
    for stop in (1, len(batches) // 2, len(batches) - 1):
        head, state = stopped(make(num_workers), stop)
        again = make(num_workers)
        again.load_state_dict(json.loads(json.dumps(state)) if make is loader else state)
        assert same(head + list(again), batches), stop
        assert getattr(again, "packs", getattr(again, "dataset", None)).report.counts() == counts
        assert len(json.dumps(state)) < 4096 * max(num_workers, 1)


@pytest.mark.slow
@pytest.mark.parametrize("make", [loader, torchdata_loader])
@pytest.mark.parametrize("num_workers", [2, 4])
def test_many_batches_are_such_places(make, num_workers):
    batches = list(make(num_workers))
    for stop in range(0, len(batches) + 1, 4):
        head, state = stopped(make(num_workers), stop)
        again = make(num_workers)
        again.load_state_dict(state)
        assert same(head + list(again), batches), stop


def test_epochs_count_on_by_themselves_and_are_restored():
    def shuffled():
        samples = samples_of(Stream(at, len(ROWS)), shuffle_seed=5, shuffle_window=32)
        dataset = ConstantLengthDataset(samples, seq_length=120, lookahead=12)
        return ResumableLoader(dataset, batch_size=4, collate_fn=list)

    first = shuffled()
    epochs = [list(first) for _ in range(3)]
    assert not same(epochs[0], epochs[1])
    second = shuffled()
    list(second)
    head, state = stopped(second, 3)
    assert state["epoch"] == 1
    third = shuffled()
    third.load_state_dict(state)
    third.set_epoch(1)
    assert same(head + list(third), epochs[1])
    assert same(list(third), epochs[2])


def test_a_hugging_face_stream_is_told_its_epoch_before_its_place():
    rows = [{"texts": item["texts"]} for item in ROWS if "texts" in item]
    stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=6)
    whole = loader(0, stream.shuffle(seed=3, buffer_size=1))
    epochs = [list(whole) for _ in range(3)]
    assert not same(epochs[0], epochs[1])
    made = loader(0, stream.shuffle(seed=3, buffer_size=1))
    made.set_epoch(2)
    head, state = stopped(made, 4)
    again = loader(0, stream.shuffle(seed=3, buffer_size=1))
    again.load_state_dict(state)
    assert same(head + list(again), epochs[2])
    assert again.state_dict()["epoch"] == 3
    assert stream.epoch == 0, "the user's own stream is left as it was"


def test_a_loop_that_stopped_early_goes_on_where_it_stopped():
    batches = list(loader(0))
    made = loader(0)
    head, _ = stopped(made, 3)
    assert same(head + list(made), batches)


def test_the_batch_size_may_change():
    expected = [pack for batch in loader(2) for pack in batch]
    head, state = stopped(loader(2), 4)
    again = ResumableLoader(packs(), batch_size=1, collate_fn=list, num_workers=2)
    again.load_state_dict(state)
    rest = [pack for batch in again for pack in batch]
    found = [pack for batch in head for pack in batch] + rest
    assert sorted(pack.keys for pack in found) == sorted(pack.keys for pack in expected)


# Faults


def processes_and_threads():
    return set(multiprocessing.active_children()), set(threading.enumerate())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_consumer_that_stops_early_leaves_no_thread_and_no_process(num_workers):
    before = processes_and_threads()
    stopped(loader(num_workers), 2)
    ended = time.monotonic() + 20
    while processes_and_threads() != before and time.monotonic() < ended:
        time.sleep(0.05)
    assert processes_and_threads() == before


def test_a_killed_worker_is_an_error_and_the_run_goes_on_behind_the_last_batch():
    batches = list(loader(2))
    made = loader(2, prefetch_factor=1)
    handed_out = iter(made)
    head = [next(handed_out) for _ in range(3)]
    victim = multiprocessing.active_children()[0]
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(SourceError, match=r"worker.*(killed|exited).*position behind the last batch is safe"):
        head.extend(handed_out)
    state = json.loads(json.dumps(made.state_dict()))
    again = loader(2)
    again.load_state_dict(state)
    assert same(head + list(again), batches)
    assert same(head + list(made), batches), "the same loader can be iterated again, too"
    assert again.packs.report.counts() == made.packs.report.counts()


class Failing:
    """A stream that raises in the middle of its first pass, as one does whose server goes away."""

    def __init__(self):
        self.is_down = True

    def __iter__(self):
        for index in range(len(ROWS)):
            if index == 60 and self.is_down:
                raise TimeoutError("the server went away")
            yield at(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_that_raises_in_the_middle_can_be_gone_on_from_once_it_is_back(num_workers):
    batches = list(loader(num_workers))
    source = Failing()
    made = loader(num_workers, source)
    head = []
    with pytest.raises(SourceError, match="TimeoutError on row 60"):
        head.extend(made)
    assert head
    source.is_down = False
    assert same(head + list(made), batches)


class Slow:
    def __iter__(self):
        for index in range(24):
            time.sleep(0.02)
            yield at(index)


def test_a_slow_source_is_waited_for():
    assert same(list(loader(2, Slow())), list(loader(2, Stream(at, 24))))


# What is refused


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: packs(ROWS[:60]), "another data set"),
        (lambda: packs(Stream(at, len(ROWS)), seed=1), "another seed.*saved 0, now 1"),
        (lambda: packs(seq_length=121), "another budget"),
        (lambda: packs(lookahead=13), "another lookahead"),
        (lambda: packs(method="best"), "another method"),
        (lambda: packs(append_pad=False), "another other settings"),
        (lambda: packs(oversize="truncate_text"), "another other settings"),
    ],
)
def test_a_position_of_other_data_or_settings_is_refused_and_says_of_what(other, reason):
    dataset = packs()
    next(iter(dataset))
    with pytest.raises(ConfigError, match=f"the saved position is of {reason}"):
        other().load_state_dict(dataset.state_dict())


def test_a_position_of_another_tokenizer_or_tiling_is_refused():
    def with_template(template):
        samples = samples_of(Stream(at, len(ROWS)), chat_template=template)
        return ConstantLengthDataset(samples, seq_length=120, lookahead=12)

    dataset = packs()
    next(iter(dataset))
    state = dataset.state_dict()
    template = dataset.dataset.tokenizer.chat_template
    with pytest.raises(ConfigError, match="another rows, tiling or chat template"):
        with_template(template.replace("\n", "\n ")).load_state_dict(state)
    wide = Tiling(tile_size=32, max_side=160, patch_size=16, tokens_per_tile=4)
    assert wide != SMALL
    samples = samples_of(Stream(at, len(ROWS)), tiling=Tiling(**{**_fields(SMALL), "max_side": 96}))
    with pytest.raises(ConfigError, match="another rows, tiling or chat template"):
        ConstantLengthDataset(samples, seq_length=120, lookahead=12).load_state_dict(state)
    with pytest.raises(ConfigError, match="another tokenizer"):
        packs().load_state_dict({**state, "settings": {**state["settings"], "tokenizer": "00000000"}})


def _fields(record):
    return {name: getattr(record, name) for name in record.__slots__}


def test_a_position_of_another_number_of_workers_is_refused_by_every_loader():
    _, state = stopped(loader(2), 2)
    with pytest.raises(ConfigError, match=r"had 2 workers, this one has 1.*num_workers=2"):
        loader(1).load_state_dict(state)
    dataset = packs()
    dataset.load_state_dict(state["workers"][0])
    with pytest.raises(ConfigError, match=r"worker 0 of 2, this is worker 0 of 1.*num_workers=2"):
        next(iter(dataset))


def test_no_worker_and_one_worker_are_the_same_run():
    batches = list(loader(0))
    head, state = stopped(loader(0), 5)
    again = loader(1)
    again.load_state_dict(state)
    assert same(head + list(again), batches)


def test_data_that_changed_is_noticed_when_it_is_read_again():
    dataset = packs()
    running = iter(dataset)
    for _ in range(12):
        next(running)
    state = dataset.state_dict()
    read = state["stretch"]["rows"]
    assert read[0] > 0, "packing began anew by then"

    def changed(index):
        return at(index) if index < read[0] else row("other", "words")

    again = packs(Stream(changed, len(ROWS)))
    again.load_state_dict(state)
    with pytest.raises(SourceError, match="not what was read before the position was saved"):
        list(again)


def test_a_shuffle_buffer_upstream_is_refused_with_the_remedy():
    rows = [{"texts": item["texts"]} for item in ROWS if "texts" in item]
    stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=20)
    dataset = packs(stream.filter(bool))
    with pytest.raises(ConfigError, match=r"shuffle\(buffer_size=20\).*shuffle_window=20"):
        loader(0, stream.filter(bool))
    next(iter(dataset))
    with pytest.raises(ConfigError, match="lost or come twice"):
        dataset.state_dict()
    assert len(list(packs(stream))) > 5, "without a position it is no fault"


def test_samples_that_keep_no_place_are_refused():
    class Bare:
        tokenizer, tiling, max_pixels = samples_of([]).tokenizer, SMALL, 10**6

        def retile(self, sample, tiling):
            return sample

        def __iter__(self):
            return iter(samples_of(ROWS))

    dataset = ConstantLengthDataset(Bare(), seq_length=120)
    next(iter(dataset))
    with pytest.raises(ConfigError, match="Bare keeps no place: it has no state_dict"):
        dataset.state_dict()
    with pytest.raises(ConfigError, match="Bare keeps no place"):
        ResumableLoader(dataset, batch_size=1, collate_fn=list)


def test_a_position_is_not_given_where_workers_have_it():
    dataset = packs()
    list(DataLoader(dataset, batch_size=None, num_workers=1))
    with pytest.raises(ConfigError, match=r"ask the loader: vlmpack\.ResumableLoader"):
        dataset.state_dict()


def test_an_epoch_that_would_throw_a_position_away_is_refused():
    made = loader(0)
    stopped(made, 1)
    with pytest.raises(ConfigError, match=r"inside epoch 0, so set_epoch\(2\) would throw"):
        made.set_epoch(2)
    dataset = packs()
    next(iter(dataset))
    again = packs()
    again.load_state_dict(dataset.state_dict())
    with pytest.raises(ConfigError, match="epoch 0, so set_epoch"):
        again.set_epoch(1)
    again.load_state_dict(None)
    again.set_epoch(1)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "2"])
def test_a_wrong_batch_size_is_refused(batch_size):
    with pytest.raises(ConfigError, match="batch_size must be an integer of at least 1"):
        ResumableLoader(packs(), batch_size=batch_size, collate_fn=list)


@pytest.mark.parametrize("option", ["shuffle", "sampler", "drop_last", "persistent_workers", "in_order"])
def test_options_that_would_break_the_resume_are_refused(option):
    with pytest.raises(ConfigError, match=f"{option} would break the resume"):
        loader(0, **{option: True})
