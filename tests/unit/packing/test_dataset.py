"""Every row ends in a pack or in the report, under every budget, in a reproducible order."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
import torch

from tests.fakes import (
    Rows,
    Stream,
    broken_at,
    drawn,
    jpeg,
    only,
    packs_of,
    png,
    row,
    samples_of,
    tokenizer,
    turns,
)
from tests.strategies import BROKEN, mixed_rows
from vlmpack.budget import PackBudget
from vlmpack.corpus import load_tokenizer
from vlmpack.errors import ConfigError, OversizeError, SourceError
from vlmpack.packing import ConstantLengthDataset
from vlmpack.packing.pad_token import pad_token_id

pytestmark = pytest.mark.timeout(60)


def texts(n, length=5):
    return [row(f"Question {i}?", " word" * (length + i % 7)) for i in range(n)]


def test_every_broken_row_is_refused_with_its_reason_and_every_good_one_packed():
    dataset = packs_of(mixed_rows(), seq_length=400)
    packed, refused = drawn(dataset)
    names = sorted(BROKEN)
    assert packed == sorted(str(2 * number) for number in range(len(names)))
    assert refused == sorted(str(2 * number + 1) for number in range(len(names)))
    reasons = {int(refusal.key): refusal.reason for refusal in dataset.report.refusals}
    for number, name in enumerate(names):
        assert reasons[2 * number + 1] == BROKEN[name][1], name
    report = dataset.report
    assert report.num_read == 2 * len(names) == report.num_packed + report.total_refused


def test_the_report_agrees_with_the_packs():
    dataset = packs_of([row(f"q{i}", images=[png(32 * (i % 4) + 1, 40)] * (i % 3)) for i in range(40)])
    packs = list(dataset)
    report = dataset.report
    assert report.num_packs == len(packs) > 5
    assert report.num_packed == sum(len(pack.keys) for pack in packs) == 40
    assert report.num_tiles == sum(len(pack.tiles) for pack in packs)
    assert report.num_supervised == sum(int((pack.labels != -100).sum()) for pack in packs)
    assert report.num_appended == 40
    assert report.load.num_tokens == sum(map(len, packs))
    assert report.max_load[0] == max(map(len, packs))
    assert report.fill["tokens"] == pytest.approx(sum(map(len, packs)) / (120 * len(packs)))


def test_segments_and_tiles_belong_to_the_keys():
    rows = {str(i): row(f"q{i}" * (i + 1), images=[png(20 + 9 * i, 30)] * (i % 3)) for i in range(12)}
    alone = {sample.key: sample for sample in samples_of(list(rows.values()))}
    for pack in packs_of(list(rows.values())):
        assert len(pack.keys) == pack.segment_ids.max() == len(pack.costs)
        for segment, key in enumerate(pack.keys, start=1):
            at = pack.segment_ids == segment
            assert pack.input_ids[at].tolist() == alone[key].input_ids.tolist()
            assert pack.labels[at][1:].tolist() == alone[key].labels[1:].tolist()
        tiles = [geometry.num_tiles for key in pack.keys for geometry in alone[key].geometries]
        assert list(pack.tiles_per_image) == tiles


@pytest.mark.parametrize(
    ("settings", "axis"),
    [
        ({"seq_length": 60}, "tokens"),
        ({"seq_length": 4000, "max_images_per_knapsack": 2}, "images"),
        ({"seq_length": 4000, "max_patches": 40}, "patches"),
    ],
)
def test_each_budget_alone_shapes_the_packs(settings, axis):
    # 70 x 40 pixels: 7 tiles, 28 patches; 32 x 32: 1 tile, 4 patches
    rows = [row(images=[jpeg(70, 40)] if i % 2 else [png(32, 32)]) for i in range(20)]
    dataset = packs_of(rows, **settings)
    packs = list(dataset)
    report = dataset.report
    assert report.num_packed == 20
    assert all(not dataset.budget.exceeded_by(pack.cost) for pack in packs)
    assert report.fill[axis] > 0.7, "this budget binds"
    assert len(packs) >= report.lower_bound > 4


def test_max_sample_length_defaults_to_what_a_pack_holds():
    tokens = only(samples_of([row()])).cost.num_tokens
    assert drawn(packs_of([row(), row("x" * 3000)], seq_length=tokens + 1)) == (["0"], ["1"])
    assert packs_of([row()], seq_length=tokens, append_pad=False).dataset
    assert drawn(packs_of([row(), row("x" * 3000)], seq_length=tokens, append_pad=False)) == (["0"], ["1"])


@pytest.mark.parametrize("delta", range(-2, 3))
@pytest.mark.parametrize("append_pad", [True, False])
def test_a_sample_as_long_as_the_pack_never_breaks_it(delta, append_pad):
    tokens = only(samples_of([row()])).cost.num_tokens
    settings = {"seq_length": tokens + delta, "append_pad": append_pad, "max_sample_length": 9999}
    dataset = packs_of([row(), row("q", "a")], **settings)
    fits = tokens + append_pad <= tokens + delta
    packed, refused = drawn(dataset)
    assert ("0" in packed, "0" in refused) == (fits, not fits)
    assert not fits or dataset.report.max_load[0] <= tokens + delta


@pytest.mark.parametrize(("limit", "packed"), [(None, "012"), (2, "012"), (1, "01"), (0, "0")])
def test_max_images_per_example(limit, packed):
    rows = [row(images=[png(9, 9)] * number) for number in range(3)]
    keys, refused = drawn(packs_of(rows, max_images_per_example=limit))
    assert "".join(keys) == packed
    assert set(keys) | set(refused) == set("012")


def test_one_sample_over_the_image_budget_of_a_pack_is_refused_not_let_through():
    rows = [row(images=[png(9, 9)] * 4), row()]
    dataset = packs_of(rows, max_images_per_example=None, max_images_per_knapsack=2)
    assert drawn(dataset) == (["1"], ["0"])
    assert dataset.report.num_refused == {"over_budget": 1}


def test_oversize_raise_stops_with_the_key():
    dataset = packs_of([row(), row(" word" * 500)], oversize="raise")
    with pytest.raises(OversizeError, match="sample 1: "):
        list(dataset)


def test_oversize_fewer_tiles_packs_what_drop_refuses():
    rows = [row(images=[png(128, 128)]), row(images=[png(32, 32)])]
    assert drawn(packs_of(rows, max_patches=40)) == (["1"], ["0"])
    dataset = packs_of(rows, max_patches=40, oversize="fewer_tiles")
    assert drawn(dataset) == (["0", "1"], [])
    assert dataset.report.num_shrunk == 1
    assert dataset.report.num_tokens_removed == 5 * (17 - 10)  # 96 x 96: 9 tiles and the global one
    assert dataset.report.num_tiles == 10 + 1


def test_oversize_truncate_text_packs_what_drop_refuses():
    rows = [row("q", " word" * 300)]
    dataset = packs_of(rows, oversize="truncate_text")
    pack = only(dataset)
    assert len(pack) == 120
    assert dataset.report.num_shrunk == 1


# Order


def order(dataset):
    return [pack.keys for pack in dataset]


def test_the_order_is_a_function_of_the_data_and_the_settings():
    rows = texts(60)
    first = order(packs_of(rows, seed=1))
    assert first == order(packs_of(rows, seed=1))
    dataset = packs_of(rows, seed=1, decode_threads=0)
    assert first == order(dataset) == order(dataset), "a second pass, and no threads"
    assert first != order(packs_of(rows, seed=2))
    other = order(packs_of(rows, seed=2))
    assert sorted(key for keys in first for key in keys) == sorted(key for keys in other for key in keys)


@pytest.mark.parametrize("queue_size", [1, 3])
@pytest.mark.parametrize("decode_threads", [0, 1, 4])
def test_threads_and_queues_change_no_pack(queue_size, decode_threads):
    rows = [row(f"q{i}", images=[png(30 + i, 30)]) for i in range(20)]
    expected = list(packs_of(rows))
    packs = list(packs_of(rows, queue_size=queue_size, decode_threads=decode_threads))
    assert [pack.keys for pack in packs] == [pack.keys for pack in expected]
    assert all(torch.equal(a.tiles, b.tiles) for a, b in zip(packs, expected, strict=True))


def test_nothing_global_is_seeded_or_used():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    order(packs_of(texts(20)))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.mark.parametrize(("lookahead", "num_of_sequences"), [(4, 1024), (4096, 1), (1, 1)])
def test_the_buffer_is_bounded_and_loses_nothing(lookahead, num_of_sequences):
    read = []

    def make(index):
        read.append(index)
        return row(f"q{index}")

    dataset = packs_of(Rows(make, 100), lookahead=lookahead, num_of_sequences=num_of_sequences, queue_size=1)
    iterator = iter(dataset)
    next(iterator)
    assert len(read) <= 12, "a pack comes out before the whole data set is in"
    rest = [key for pack in iterator for key in pack.keys]
    assert len(set(rest)) == len(rest)
    assert dataset.report.num_packed == 100


# Length, settings, refused data sets


def test_the_estimate_of_packs_is_close_and_not_low():
    for rows in (texts(300), [row(images=[png(70, 40)]) for _ in range(50)], texts(1)):
        number = len(list(packs_of(rows)))
        assert number < packs_of(rows).estimate_num_packs() <= 1.1 * number + 1
        assert number <= packs_of(rows).estimate_num_packs(max_rows=20) <= 1.3 * number + 1


def test_the_estimate_survives_broken_rows_and_nothing_at_all():
    assert packs_of(Rows(broken_at(1, 2), 4)).estimate_num_packs() >= 1
    assert packs_of([]).estimate_num_packs() == 0
    with pytest.raises(TypeError, match="streaming"):
        packs_of(Stream(broken_at(), 3)).estimate_num_packs()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq_length", 0),
        ("seq_length", "4096"),
        ("seq_length", None),
        ("num_of_sequences", 0),
        ("queue_size", 0),
        ("queue_size", 2.0),
        ("decode_threads", -1),
        ("lookahead", 0),
        ("lookahead", 1.5),
        ("lookahead", "8"),
        ("delta", -1),
        ("delta", 0.5),
        ("seed", -1),
        ("seed", 1.5),
        ("max_patches", -1),
        ("max_images_per_knapsack", -1),
        ("max_images_per_example", -1),
        ("max_sample_length", 0),
        ("method", "magic"),
        ("oversize", "hope"),
    ],
)
def test_a_wrong_setting_is_refused_at_construction_by_name(name, value):
    shown = "max_tokens" if name == "seq_length" else name.replace("_per_knapsack", "")
    with pytest.raises(ConfigError, match=shown):
        packs_of([row()], **{name: value})


def test_a_data_set_that_is_not_wrapped_is_refused_and_the_remedy_named():
    with pytest.raises(ConfigError, match="wrap list in a VQADataset first"):
        ConstantLengthDataset([row()])


def test_the_padding_token_falls_back_to_the_end_of_sequence():
    assert pad_token_id(tokenizer()) == tokenizer().pad_token_id
    bare = load_tokenizer()
    bare.pad_token = None
    assert pad_token_id(bare) == bare.eos_token_id
    bare.eos_token = None
    with pytest.raises(ConfigError, match=r"set tokenizer\.pad_token"):
        pad_token_id(bare)


def test_refusals_are_logged_with_key_and_reason(caplog):
    with caplog.at_level(logging.INFO):
        drawn(packs_of([row(), {}]))
    assert any("refused 1 (bad_row)" in record.getMessage() for record in caplog.records)


def test_texts_with_image_tokens_are_counted_each_pass():
    dataset = packs_of([row("a<|image|>"), row(), row("<row_1_col_1>", "b<|image|>")])
    for _ in range(2):
        list(dataset)
        assert dataset.report.num_texts_with_image_token == 3


def test_a_budget_of_no_images_takes_text_only():
    dataset = packs_of([row(), row(images=[png(9, 9)])], max_images_per_knapsack=0)
    assert drawn(dataset) == (["0"], ["1"])
    assert dataset.budget == PackBudget(max_tokens=120, max_images=0)


def test_a_conversation_of_many_turns_is_one_sample():
    pack = only(packs_of([{"texts": turns(*[("q", "a")] * 8)}], seq_length=400))
    assert pack.keys == ("0",)
    assert set(pack.segment_ids.tolist()) == {0, 1}


def test_no_thread_outlives_a_pass():
    before = set(threading.enumerate())
    list(packs_of(texts(20)))
    assert set(threading.enumerate()) <= before


def test_an_empty_data_set_is_an_error_that_says_so():
    with pytest.raises(SourceError, match="the data set is empty"):
        list(packs_of([]))
