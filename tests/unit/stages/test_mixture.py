"""A mixture draws by weight, ends as it says, and names and counts each source apart."""

from __future__ import annotations

import json

import pytest

from tests.conformance import same
from tests.fakes import Stream, row, samples_of
from tests.in_process import as_worker
from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling
from vlmpack.loader import ResumableLoader
from vlmpack.packing import ConstantLengthDataset
from vlmpack.stages import Mixture

NARROW = Tiling(tile_size=32, max_side=96, patch_size=16, tokens_per_tile=4)


NUMBERED = [row(f"b {i}") for i in range(9)]


def source(name, n, **settings):
    return samples_of([row(f"{name} {i}") for i in range(n)], **settings)


def keys(mixture):
    return [item.key for item in mixture]


def test_each_row_of_each_source_comes_once_in_its_order():
    mixture = Mixture({"a": source("a", 30), "b": source("b", 5), "c": source("c", 0)}, seed=1)
    found = keys(mixture)
    assert [key for key in found if key.startswith("a/")] == [f"a/{i}" for i in range(30)]
    assert [key for key in found if key.startswith("b/")] == [f"b/{i}" for i in range(5)]
    assert len(found) == 35
    assert keys(mixture) == found, "the same epoch again"
    mixture.set_epoch(1)
    assert keys(mixture) != found
    assert sorted(keys(mixture)) == sorted(found)


def test_draws_follow_the_weights():
    mixture = Mixture({"a": source("a", 900), "b": source("b", 900)}, {"a": 3, "b": 1})
    first = keys(mixture)[:800]
    # 600 expected, standard deviation sqrt(800 * 3/4 * 1/4) = 12
    assert 550 < sum(key.startswith("a/") for key in first) < 650


def test_the_first_that_ends_may_end_the_pass():
    found = keys(Mixture({"a": source("a", 200), "b": source("b", 20)}, seed=2, stop="first_exhausted"))
    assert sum(key.startswith("b/") for key in found) == 20
    assert sum(key.startswith("a/") for key in found) < 60
    assert keys(Mixture({"a": source("a", 3), "b": source("b", 0)}, seed=5, stop="first_exhausted")) in (
        [], ["a/0"], ["a/0", "a/1"], ["a/0", "a/1", "a/2"]
    )  # fmt: skip


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_share_each_source_out(num_workers):
    found = []
    for worker in range(num_workers):
        with as_worker(worker, num_workers):
            found += keys(Mixture({"a": source("a", 17), "b": source("b", 4)}))
    assert sorted(found) == sorted([f"a/{i}" for i in range(17)] + [f"b/{i}" for i in range(4)])


def test_the_report_counts_each_source_apart():
    bad = samples_of([row(answer=""), row("b 1"), {}])
    dataset = ConstantLengthDataset(Mixture({"a": source("a", 6), "b": bad}), seq_length=120)
    packs = list(dataset)
    by_source = dataset.report.by_source
    assert (by_source["a/read"], by_source["a/packed"], by_source["a/refused"]) == (6, 6, 0)
    assert (by_source["b/read"], by_source["b/packed"], by_source["b/refused"]) == (3, 1, 2)
    assert by_source["a/tokens"] + by_source["b/tokens"] == sum(map(len, packs))


@pytest.mark.parametrize("stop", ["all_exhausted", "first_exhausted"])
def test_any_sample_is_a_place_to_go_on_from(stop):
    def make():
        shuffled = samples_of(Stream(NUMBERED.__getitem__, 9), shuffle_seed=3, shuffle_window=4)
        made = Mixture({"a": source("a", 12), "b": shuffled}, {"a": 2, "b": 1}, seed=1, stop=stop)
        made.set_epoch(1)
        return made

    whole = keys(make())
    for at in range(len(whole) + 1):
        first = make()
        running = iter(first)
        head = [next(running).key for _ in range(at)]
        second = make()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert head + keys(second) == whole
        second.set_epoch(1)
        assert keys(second) == whole, "the next pass begins at the beginning"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_packs_of_a_mixture_go_on_from_any_batch(num_workers, monkeypatch):
    monkeypatch.setattr("vlmpack.packing.lookahead.MIN_STRETCH", 6)

    def loader():
        mixture = Mixture({"a": source("a", 30), "b": source("b", 9)}, {"a": 2, "b": 1})
        dataset = ConstantLengthDataset(mixture, seq_length=120, lookahead=5)
        return ResumableLoader(dataset, batch_size=1, collate_fn=list, num_workers=num_workers)

    whole = list(loader())
    for stop in (1, len(whole) // 2, len(whole) - 1):
        first = loader()
        running = iter(first)
        head = [next(running) for _ in range(stop)]
        second = loader()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        del running
        assert same(head + list(second), whole)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Mixture({}), "at least one source"),
        (lambda: Mixture({"a/b": source("a", 1)}), "must not be empty nor hold '/'"),
        (lambda: Mixture({"a": [row()]}), "must be a VQADataset, got list"),
        (lambda: Mixture({"a": source("a", 1)}, {"b": 1}), "weights are for"),
        (lambda: Mixture({"a": source("a", 1)}, {"a": 0}), "must be positive"),
        (lambda: Mixture({"a": source("a", 1)}, {"a": float("nan")}), "must be positive"),
        (lambda: Mixture({"a": source("a", 1)}, stop="never"), "stop must be one of"),
        (
            lambda: Mixture({"a": source("a", 1), "b": source("b", 1, tiling=NARROW)}),
            "'b' cuts images by another tiling than 'a'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, told):
    with pytest.raises(ConfigError, match=told):
        make()
