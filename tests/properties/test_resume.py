"""A run that stops anywhere and goes on from its position gives the same rest, bit for bit."""

from __future__ import annotations

import json
from unittest.mock import patch

import datasets
import pytest
from datasets import Dataset, Features, Image, IterableDataset, List, Value, interleave_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance import same
from tests.fakes import Rows, Stream, jpeg, png, row, samples_of
from tests.in_process import InProcessLoader
from vlmpack.errors import SourceError
from vlmpack.loader import ResumableLoader
from vlmpack.packing import ConstantLengthDataset

pytestmark = pytest.mark.timeout(300)

FEW = settings.get_profile(settings.get_current_profile_name()).max_examples // 2 or 1

BROKEN = row(images=[jpeg(64, 64)[:900]])
"""The header is fine: only the decoder finds out."""

POOL = [
    *(row(f"q{i}" * (i % 4 + 1), " word" * (1 + 5 * i % 11)) for i in range(6)),
    *(row(f"q{i}", images=[png(20 + 9 * i, 40)] * (i % 3 + 1)) for i in range(4)),
    BROKEN,
    row(answer=""),
    {},
    row(" word" * 200),
    row("a<|image|>"),
]
"""Rows that become samples, rows that are refused at once, one that is refused when it is decoded."""

raw_rows = st.lists(st.sampled_from(POOL), max_size=40)

packer_settings = st.fixed_dictionaries({
    "seq_length": st.sampled_from((60, 120)),
    "max_images_per_example": st.just(3),
    "lookahead": st.integers(1, 12),
    "num_of_sequences": st.integers(1, 6),
    "queue_size": st.integers(1, 3),
    "decode_threads": st.integers(0, 1),
    "oversize": st.sampled_from(("drop", "fewer_tiles", "truncate_text")),
    "seed": st.integers(0, 3),
    "method": st.sampled_from(("auto", "balanced", "worst_fit_decreasing")),
})


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Keep `datasets` from telling of each map that it runs."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(autouse=True, scope="module")
def short_stretches():
    """Let packing begin anew every few rows, which by itself it does every few hundred."""
    with (
        patch("vlmpack.packing.lookahead.MIN_STRETCH", 5),
        patch("vlmpack.packing.lookahead._ROWS_PER_SNAPSHOT", 2),
    ):
        yield


def hugging_face(raw):
    features = Features({
        "images": List(Image()),
        "texts": List({"user": Value("string"), "assistant": Value("string")}),
    })
    columns = {
        "images": [[{"bytes": image, "path": None} for image in item.get("images", [b"x"])] for item in raw],
        "texts": [item.get("texts") for item in raw],
    }
    return Dataset.from_dict(columns, features=features)


def same_row(raw):
    return raw


def interleaved(raw):
    half = len(raw) // 2 or 1
    parts = [hugging_face(part).to_iterable_dataset(num_shards=2) for part in (raw[:half], raw[half:])]
    return interleave_datasets(
        parts, [0.4, 0.6], seed=3, stopping_strategy="all_exhausted_without_replacement"
    )


class Maker:
    """Makes a generator, from many processes."""

    def __init__(self, raw):
        self.raw = raw

    def __call__(self):
        return iter(self.raw)


SOURCES = {
    "list": (lambda raw: raw, {}),
    "list, shuffled": (lambda raw: raw, {"shuffle_seed": 7}),
    "map-style": (lambda raw: Rows(raw.__getitem__, len(raw)), {}),
    "stream": (lambda raw: Stream(raw.__getitem__, len(raw)), {}),
    "stream, shuffled in windows": (
        lambda raw: Stream(raw.__getitem__, len(raw)),
        {"shuffle_seed": 7, "shuffle_window": 6},
    ),
    "Hugging Face": (hugging_face, {}),
    "Hugging Face, shuffled": (hugging_face, {"shuffle_seed": 7}),
    "Hugging Face stream": (lambda raw: hugging_face(raw).to_iterable_dataset(num_shards=3), {}),
    "Hugging Face stream, shuffled in windows": (
        lambda raw: hugging_face(raw).to_iterable_dataset(num_shards=3),
        {"shuffle_seed": 7, "shuffle_window": 6},
    ),
    "Hugging Face stream, mapped": (
        lambda raw: (  # mapping decodes, and dies of a broken image
            hugging_face([item for item in raw if item is not BROKEN])
            .to_iterable_dataset(num_shards=2)
            .map(same_row)
            .shuffle(4, buffer_size=1)
        ),
        {},
    ),
    "Hugging Face streams, interleaved": (interleaved, {}),
    "Hugging Face generator": (lambda raw: IterableDataset.from_generator(Maker(raw)), {}),
}


def enough(raw, kind):
    """Return at least as many rows as the data set has shards."""
    return raw + POOL[: max(6 - len(raw), 0)] if kind.startswith("Hugging Face") else raw


def packs_of(raw, kind, options, epoch=0):
    make, shuffle = SOURCES[kind]
    dataset = ConstantLengthDataset(samples_of(make(raw), **shuffle), **options)
    dataset.set_epoch(epoch)
    return dataset


def rest_of(dataset):
    """Return the packs that are left and all that was counted; nothing left is an error where nothing was."""
    packs = []
    try:
        packs.extend(dataset)
    except SourceError:
        assert not packs
    return packs, dataset.report.counts()


def saved(state):
    """Return a state as a file would give it back."""
    text = json.dumps(state)
    assert len(text) < 4096
    return json.loads(text)


@pytest.mark.parametrize("kind", SOURCES)
@settings(max_examples=max(FEW // 10, 6))
@given(
    raw=raw_rows,
    options=packer_settings,
    where=st.floats(0, 1),
    again=st.floats(0, 1),
    epoch=st.integers(0, 2),
)
def test_a_run_that_stops_anywhere_goes_on_bit_for_bit(kind, raw, options, where, again, epoch):
    raw = enough(raw, kind)
    whole, counts = rest_of(packs_of(raw, kind, options, epoch))
    stop = round(where * len(whole))
    first = packs_of(raw, kind, options, epoch)
    packs = iter(first)
    head = [next(packs) for _ in range(stop)]
    state = saved(first.state_dict())
    packs.close()
    second = packs_of(raw, kind, options)
    second.load_state_dict(state)
    assert same(head, whole[:stop])
    later = round(again * (len(whole) - stop))
    packs = iter(second)
    middle = [next(packs) for _ in range(later)]
    state = saved(second.state_dict())
    packs.close()
    third = packs_of(raw, kind, options)
    third.load_state_dict(state)
    assert same((middle + rest_of(third)[0]), whole[stop:])
    assert third.report.counts() == counts
    if whole:
        third.set_epoch(epoch)
        assert same(rest_of(third)[0], whole), "the next pass begins at the beginning again"


@settings(max_examples=max(FEW // 2, 10))
@given(
    kind=st.sampled_from(sorted(SOURCES)),
    raw=raw_rows,
    options=packer_settings,
    num_workers=st.integers(0, 4),
    batch_size=st.integers(1, 3),
    where=st.floats(0, 1),
    epoch=st.integers(0, 2),
)
def test_with_any_number_of_workers_too(kind, raw, options, num_workers, batch_size, where, epoch):
    raw = enough(raw, kind)

    def loader():
        made = ResumableLoader(
            packs_of(raw, kind, options), batch_size=batch_size, collate_fn=list, num_workers=num_workers
        )
        made.set_epoch(epoch)
        return made

    def rest(made):
        batches = []
        try:
            batches.extend(made)
        except SourceError:
            assert not batches
        return batches

    with patch("vlmpack.loader.DataLoader", InProcessLoader):
        whole = loader()
        batches = rest(whole)
        stop = round(where * len(batches))
        first = loader()
        handed_out = iter(first)
        head = [next(handed_out) for _ in range(stop)]
        text = json.dumps(first.state_dict())
        handed_out.close()
        assert len(text) < 4096 * max(num_workers, 1)
        second = loader()
        second.load_state_dict(json.loads(text))
        tail = rest(second)
    assert same(head + tail, batches)
    if batches:
        assert second.packs.report.counts() == whole.packs.report.counts()


def own(state):
    """Return a state without Hugging Face's part, whose cursor depends on how far it read ahead."""
    state = json.loads(json.dumps(state))
    (state["stretch"] or {}).get("source", {}).pop("upstream", None)
    return state


@settings(max_examples=max(FEW // 3, 10))
@given(
    raw=st.lists(st.sampled_from(POOL), min_size=1, max_size=12),
    kind=st.sampled_from(("list, shuffled", "stream", "Hugging Face stream, shuffled in windows")),
    options=packer_settings,
    stop=st.integers(0, 12),
    more=st.integers(1, 12),
)
def test_a_stream_without_end_goes_on_across_passes(raw, kind, options, stop, more):
    raw = enough([*raw, POOL[0]], kind)
    options = {**options, "infinite": True}

    def take(dataset, num_packs):
        packs = iter(dataset)
        try:
            return [next(packs) for _ in range(num_packs)]
        finally:
            state.append(saved(dataset.state_dict()))
            packs.close()

    state = []
    whole = take(packs_of(raw, kind, options), stop + more)
    head = take(packs_of(raw, kind, options), stop)
    second = packs_of(raw, kind, options)
    second.load_state_dict(state[-1])
    assert same(head + take(second, more), whole)
    assert own(second.state_dict()) == own(state[0])
