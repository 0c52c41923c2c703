"""Whatever the rows are: each ends once in a pack or in the report, and no pack is over any budget."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.fakes import SMALL, Rows, Stream, drop_in_tokenizer, jpeg, packs_of, png, row, samples_of
from tests.strategies import BROKEN, any_rows, mixed_rows, rows
from vlmpack.budget import NO_COST
from vlmpack.corpus import CHATML
from vlmpack.errors import OversizeError, SourceError
from vlmpack.integrations import nanovlm
from vlmpack.packing import ConstantLengthDataset

pytestmark = pytest.mark.timeout(300)

FEW = settings.get_profile(settings.get_current_profile_name()).max_examples // 2 or 1

packer_settings = st.fixed_dictionaries({
    "seq_length": st.integers(1, 160),
    "max_images_per_knapsack": st.none() | st.integers(0, 4),
    "max_images_per_example": st.none() | st.integers(0, 4),
    "max_patches": st.none() | st.integers(0, 120),
    "max_sample_length": st.none() | st.integers(1, 300),
    "lookahead": st.integers(1, 8),
    "num_of_sequences": st.integers(1, 4),
    "queue_size": st.integers(1, 3),
    "decode_threads": st.integers(0, 2),
    "append_pad": st.booleans(),
    "oversize": st.sampled_from(("drop", "fewer_tiles", "truncate_text")),
    "seed": st.integers(0, 3),
    "method": st.sampled_from(("auto", "worst_fit_decreasing")),
})


def run(dataset):
    """Return the packs of a pass; none if nothing can be packed, which is an error of its own."""
    packs = []
    try:
        packs.extend(dataset)
    except SourceError:
        assert not packs
        assert not dataset.report.num_packed
    return packs


def keys_of(packs):
    return Counter(key for pack in packs for key in pack.keys)


def refused_keys(report):
    return Counter(refusal.key for refusal in report.refusals)


@settings(max_examples=FEW)
@given(raw=any_rows(), options=packer_settings)
def test_each_row_ends_exactly_once_in_a_pack_or_in_the_report(raw, options):
    dataset = packs_of(raw, **options)
    packs = run(dataset)
    report = dataset.report
    packed, refused = keys_of(packs), refused_keys(report)
    assert packed + refused == Counter(str(index) for index in range(len(raw)))
    assert report.num_read == len(raw) == report.num_packed + report.total_refused
    assert report.num_packed == packed.total()
    assert report.num_packs == len(packs)
    assert all(pack.keys for pack in packs), "no pack is empty"


@settings(max_examples=FEW)
@given(raw=any_rows(), options=packer_settings)
def test_no_pack_is_over_any_budget_and_every_figure_is_what_it_says(raw, options):
    dataset = packs_of(raw, **options)
    for pack in run(dataset):
        assert not dataset.budget.exceeded_by(pack.cost)
        assert len(pack) == pack.cost.num_tokens <= options["seq_length"]
        assert len(pack.tiles_per_image) == pack.cost.num_images
        assert len(pack.tiles) == sum(pack.tiles_per_image)
        assert len(pack.tiles) * SMALL.patches_per_tile == pack.cost.num_patches
        image_token = dataset.dataset.image_tokens.image
        assert int((pack.input_ids == image_token).sum()) == len(pack.tiles) * SMALL.tokens_per_tile
        assert sum(pack.costs, NO_COST) == pack.cost
        for segment in range(1, len(pack.keys) + 1):
            at = pack.segment_ids == segment
            assert pack.labels[at][0] == -100
            assert bool((pack.labels[at] != -100).any()), "every sample teaches something"
            assert pack.position_ids[at].tolist() == list(range(int(at.sum())))
        supervised = pack.labels != -100
        assert torch.equal(pack.labels[supervised], pack.input_ids[supervised])


@settings(max_examples=FEW)
@given(raw=any_rows(), options=packer_settings)
def test_the_same_settings_give_the_same_packs(raw, options):
    first, second = run(packs_of(raw, **options)), run(packs_of(raw, **options))
    assert [pack.keys for pack in first] == [pack.keys for pack in second]
    for one, other in zip(first, second, strict=True):
        for name in ("input_ids", "labels", "segment_ids", "position_ids", "tiles"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@settings(max_examples=FEW)
@given(raw=st.lists(rows(), min_size=1, max_size=6), options=packer_settings)
def test_raise_stops_exactly_when_drop_would_refuse_for_size(raw, options):
    dropping = packs_of(raw, **{**options, "oversize": "drop"})
    run(dropping)
    raising = packs_of(raw, **{**options, "oversize": "raise"})
    if dropping.report.total_refused:
        with pytest.raises(OversizeError, match=f"sample {dropping.report.refusals[0].key}: "):
            list(raising)
    else:
        assert keys_of(raising).total() == len(raw)


# Independence of the number of workers and of the kind of data set


def load(dataset, num_workers):
    loader = iter(DataLoader(dataset, batch_size=None, num_workers=num_workers))
    try:
        packed = keys_of(loader)
    finally:
        if num_workers:
            loader._shutdown_workers()  # the garbage collector would wait 5 s for each
    return packed, refused_keys(dataset.report)


def shown(raw):
    """Return the rows that the columns of a Hugging Face data set can hold."""
    return [item for item in raw if all(isinstance(image, bytes) for image in item["images"])]


def hugging_face(raw):
    features = Features({
        "id": Value("string"),
        "images": List(Image()),
        "texts": List({"user": Value("string"), "assistant": Value("string")}),
    })
    columns = {
        "id": [str(number) for number in range(len(raw))],
        "images": [[{"bytes": image, "path": None} for image in item["images"]] for item in raw],
        "texts": [item["texts"] for item in raw],
    }
    return Dataset.from_dict(columns, features=features)


GOOD = [row(f"q{i}", f"a{i}", images=[png(20 + 5 * i, 40)] * (i % 3)) for i in range(10)]
BODY = jpeg(64, 64)[:900]
BAD = [row(answer=""), row("<image><image>", images=[png(9, 9)]), row(images=[b""]), row(images=[BODY])]
RAW = [item for pair in zip(GOOD, [*BAD, *GOOD[:6]], strict=True) for item in pair] + [row(images=[b"x"])]


def sources():
    whole = hugging_face(shown(RAW))
    with_ids = [{"id": str(number), **item} for number, item in enumerate(shown(RAW))]
    return {
        "list": with_ids,
        "map-style": Rows(with_ids.__getitem__, len(with_ids)),
        "stream": Stream(with_ids.__getitem__, len(with_ids)),
        "Hugging Face": whole,
        "Hugging Face, shuffled": whole.shuffle(seed=1),
        "Hugging Face stream of 1 shard": whole.to_iterable_dataset(num_shards=1),
        "Hugging Face stream of 3 shards": whole.to_iterable_dataset(num_shards=3),
        "Hugging Face stream from a generator": IterableDataset.from_generator(lambda: iter(with_ids)),
    }


@pytest.mark.parametrize("kind", sources())
def test_what_is_packed_depends_on_neither_the_workers_nor_the_kind_of_data_set(kind):
    reference = ConstantLengthDataset(samples_of(shown(RAW)), seq_length=120)
    expected = load(reference, 0)
    assert len(expected[0]) == 16
    assert len(expected[1]) == 5
    for num_workers in (0, 1, 2):
        dataset = ConstantLengthDataset(samples_of(sources()[kind], key_column="id"), seq_length=120)
        assert load(dataset, num_workers) == expected, num_workers
        for name in ("num_read", "num_refused", "num_tiles", "num_supervised"):
            assert getattr(dataset.report, name) == getattr(reference.report, name), (name, num_workers)


def test_every_kind_of_broken_row_is_refused_by_two_workers_as_by_none():
    expected = load(packs_of(mixed_rows(), seq_length=400), 0)
    assert len(expected[1]) == len(BROKEN)
    assert load(packs_of(mixed_rows(), seq_length=400), 2) == expected


def test_each_worker_makes_the_packs_of_its_part():
    raw = [row(f"q{number}") for number in range(16)]
    halves = [[pack.keys for pack in packs_of(raw[:8])], [pack.keys for pack in packs_of(raw[8:])]]
    moved = [tuple(str(int(key) + 8) for key in keys) for keys in halves[1]]
    loaded = [pack.keys for pack in DataLoader(packs_of(raw), batch_size=None, num_workers=2)]
    assert sorted(loaded) == sorted(halves[0] + moved)


# The drop-in is the same engine


@settings(max_examples=FEW)
@given(raw=any_rows(max_size=8), seq_length=st.integers(20, 160), max_images=st.integers(1, 4))
def test_the_drop_in_packs_each_row_once_too(raw, seq_length, max_images):
    samples = nanovlm.VQADataset(raw, drop_in_tokenizer(CHATML), nanovlm.get_image_processor(128, 32), 4)
    dataset = nanovlm.ConstantLengthDataset(
        samples, max_sample_length=seq_length, seq_length=seq_length, max_images_per_knapsack=max_images
    )
    packs = run(dataset)
    report = dataset.report
    assert report.num_read == len(raw) == report.num_packed + report.total_refused
    for pack in packs:
        assert len(pack["input_ids"]) <= seq_length
        assert len(pack["images"]) <= max_images
        tiles = sum(len(image) for image in pack["images"])
        assert int((pack["input_ids"] == samples.samples.image_tokens.image).sum()) == 4 * tiles
        assert int((pack["attention_mask"] == 0).sum()) > 0
