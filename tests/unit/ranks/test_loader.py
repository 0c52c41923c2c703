"""Index mode: even ranks without talk, exact resume under any change of ranks, workers and batches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.fakes import SMALL, jpeg, row, tokenizer
from vlmpack.collate import VQACollator
from vlmpack.errors import ConfigError, SourceError
from vlmpack.packing import ConstantLengthDataset
from vlmpack.ranks import PackLoader
from vlmpack.stages import VQADataset

LENGTH = 96


def rows(count: int = 40) -> list[dict]:
    rng = np.random.default_rng(7)
    made = [
        row("What is it? " * int(rng.integers(1, 6)), "Yes. " * int(rng.integers(1, 4)), [jpeg(40, 40, n)])
        for n in range(count)
    ]
    made[5] = {"images": [], "texts": []}
    return made


@pytest.fixture(scope="module")
def packs():
    samples = VQADataset(rows(), tokenizer(), tiling=SMALL)
    return ConstantLengthDataset(samples, seq_length=LENGTH, max_images_per_knapsack=4).index()


def loader(packs, **options) -> PackLoader:
    settings = {"batch_size": 2, "collate_fn": VQACollator(tokenizer(), LENGTH), **options}
    return PackLoader(packs, **settings)


def keys(batches) -> list[str]:
    return [key for batch in batches for pack in batch["keys"] for key in pack]


def test_the_index_counts_every_row_and_the_plan_keeps_the_budgets(packs):
    assert packs.index.report.num_read == 40
    assert dict(packs.index.report.num_refused) == {"no_text": 1}
    assert packs.index.rows.tolist() == [n for n in range(40) if n != 5]
    assert (packs.index.plan.loads <= [LENGTH, 4, 1 << 62]).all()


def test_each_pack_is_what_the_plan_says(packs):
    seen = []
    for number in range(len(packs)):
        pack = packs[number]
        assert pack.cost.as_tuple() == tuple(packs.index.plan.loads[number].tolist())
        seen += pack.keys
    assert sorted(map(int, seen)) == packs.index.rows.tolist()
    with pytest.raises(IndexError, match="pack 999"):
        packs[999]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_are_even_and_share_every_sample_once(packs, world_size):
    ranks = [loader(packs, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    lengths = [len(rank) for rank in ranks]
    batches = [list(rank) for rank in ranks]
    assert [len(batch) for batch in batches] == lengths
    seen = [key for rank in batches for key in keys(rank)]
    assert sorted(map(int, seen)) == packs.index.rows.tolist()


@pytest.mark.parametrize("stop", [0, 1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(packs, stop, num_workers):
    whole = list(loader(packs))
    interrupted = loader(packs, num_workers=num_workers)
    batches = iter(interrupted)
    for _ in range(stop):
        next(batches)
    state = json.loads(json.dumps(interrupted.state_dict()))
    assert len(json.dumps(state)) < 200
    resumed = loader(packs, num_workers=num_workers)
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert len(rest) == len(whole) - stop
    for got, expected in zip(rest, whole[stop:], strict=True):
        assert got["keys"] == expected["keys"]
        for name in ("input_ids", "labels", "position_ids", "segment_ids", "tiles", "tiles_per_pack"):
            assert torch.equal(got[name], expected[name])


def test_a_run_goes_on_with_other_ranks_and_batches_and_then_begins_the_next_epoch(packs):
    seen = []
    states = []
    for rank in range(2):
        part = loader(packs, rank=rank, world_size=2, batch_size=1)
        batches = iter(part)
        seen += keys(next(batches) for _ in range(3))
        states.append(part.state_dict())
    assert states[0] == states[1]
    middle = []
    for rank in range(3):
        part = loader(packs, rank=rank, world_size=3, batch_size=2)
        part.load_state_dict(states[0])
        seen += keys([next(iter(part))])
        middle.append(part.state_dict())
    assert middle[0] == middle[1] == middle[2]
    last = loader(packs)
    last.load_state_dict(middle[0])
    seen += keys(last)
    assert sorted(map(int, seen)) == packs.index.rows.tolist()
    assert last.state_dict() == {**states[0], "epoch": 1, "stages": []}
    assert sorted(map(int, keys(last))) == packs.index.rows.tolist()


def test_a_foreign_position_is_refused(packs):
    other = ConstantLengthDataset(VQADataset(rows(12), tokenizer(), tiling=SMALL), seq_length=LENGTH).index()
    with pytest.raises(ConfigError, match="the position means nothing"):
        loader(packs).load_state_dict(loader(other).state_dict())
    with pytest.raises(ConfigError, match="had seed 0, this one has 1"):
        loader(packs, seed=1).load_state_dict(loader(packs).state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in 0\.\.1"),
        ({"shuffle": True}, "shuffle would break"),
        ({"balance": "tokens"}, "balance must be one of patches, attention, both or None, got 'tokens'"),
        ({"balance": "both", "window": 0}, "window must be a positive integer"),
        ({"window": 64}, "window=64 has no use without balance"),
        (
            {"balance": "both", "window": 7, "world_size": 2},
            "a step has 4 packs, and a window needs two steps or more to choose from. Use 512",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(packs, options, words):
    with pytest.raises(ConfigError, match=words):
        loader(packs, **options)


def test_a_changed_row_is_an_error_not_another_pack():
    data = rows(6)
    packs = ConstantLengthDataset(VQADataset(data, tokenizer(), tiling=SMALL), seq_length=LENGTH).index()
    data[0] = row("Something longer than it was before, by many words.", "No.")
    with pytest.raises(SourceError, match="row 0 changed since the index was made"):
        [packs[number] for number in range(len(packs))]


def test_a_pack_whose_images_all_break_is_empty_and_counted():
    whole = jpeg(64, 64)
    packs = ConstantLengthDataset(
        VQADataset([row(images=[whole[: len(whole) // 2]])], tokenizer(), tiling=SMALL), seq_length=LENGTH
    ).index()
    pack = packs[0]
    assert len(pack) == 0
    assert pack.tiles.shape == (0, 3, 32, 32)
    assert dict(packs.report.num_refused) == {"image_truncated": 1}
    batch = VQACollator(tokenizer(), 8)([pack])
    assert (batch["labels"] == -100).all()


def test_a_stream_has_no_index():
    with pytest.raises(ConfigError, match="a stream is packed as it comes"):
        ConstantLengthDataset(VQADataset(iter(rows(6)), tokenizer(), tiling=SMALL)).index()


def test_balanced_steps_have_the_same_samples_and_their_figures_need_no_data(packs):
    plain, balanced = loader(packs, world_size=2), loader(packs, world_size=2, balance="both")
    before, after = plain.load_imbalance(), balanced.load_imbalance()
    assert before.num_steps == after.num_steps == len(plain)
    assert after.attention.mean < before.attention.mean
    other = loader(packs, world_size=2, rank=1, balance="both")
    tokens = dict(zip(packs.index.rows.tolist(), packs.index.costs[:, 0].tolist(), strict=True))
    steps = list(zip(balanced, other, strict=True))
    found = []
    for step in steps:
        attention = [sum(tokens[int(key)] ** 2 for key in keys([batch])) for batch in step]
        found.append(2 * max(attention) / sum(attention))
    assert found == pytest.approx(after.attention.per_step.tolist())
    assert sorted(int(key) for step in steps for key in keys(step)) == packs.index.rows.tolist()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"balance": "patches"}, "had balance both, this one has patches: .* go on with balance='both'"),
        ({"balance": None, "window": None}, "had balance both, this one has None"),
        ({"window": 30}, "had window 40, this one has 30"),
    ],
)
def test_a_position_in_another_balance_is_refused(packs, changed, words):
    settings = {"balance": "both", "window": 40}
    state = loader(packs, **settings).state_dict()
    with pytest.raises(ConfigError, match=words):
        loader(packs, **{**settings, **changed}).load_state_dict(state)


def test_what_is_no_position_is_refused(packs):
    with pytest.raises(ConfigError, match="lacks balance, window: it is not one of this version"):
        loader(packs).load_state_dict({"digest": "", "seed": 0, "epoch": 0, "stages": []})
