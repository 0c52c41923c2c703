"""What is wrong in the reference pipeline and right here, one test each; the letters are ours."""

from __future__ import annotations

import logging
import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fakes import Rows, Stream, broken_at, drop_in_tokenizer, jpeg, picture, png, row, turns
from vlmpack.corpus import CHATML
from vlmpack.errors import BudgetError, ConfigError, SourceError
from vlmpack.integrations.nanovlm import (
    ConstantLengthDataset,
    VQACollator,
    VQADataset,
    get_image_processor,
    get_image_string,
    synchronized_dataloader_step,
)

pytestmark = pytest.mark.timeout(60)

TOKENIZER = drop_in_tokenizer(CHATML)
IMAGE = TOKENIZER.convert_tokens_to_ids("<|image|>")


def samples(rows, max_side=128, **settings):
    return VQADataset(rows, TOKENIZER, get_image_processor(max_side, 32), 4, **settings)


def packs(rows, **settings):
    return ConstantLengthDataset(samples(rows), **{"seq_length": 120, "max_sample_length": 120, **settings})


def words(n):
    return row("q", " word" * n)


def num_tokens(item):
    return len(samples([item])[0]["input_ids"])


def test_a_an_exception_in_a_row_or_in_packing_reaches_the_consumer(monkeypatch):
    counted = packs(Rows(broken_at(1), 3))
    assert len(list(counted)) > 0
    assert counted.report.num_refused == {"source_error": 1}
    with pytest.raises(SourceError, match="KeyError on row 1"):
        list(packs(Stream(broken_at(1), 3)))

    def fail(*args, **settings):
        raise RuntimeError("in the packer")

    monkeypatch.setattr("vlmpack.packing.stream.StreamPacker.flush", fail)
    with pytest.raises(RuntimeError, match="in the packer"):
        list(packs([row()]))


@pytest.mark.parametrize("over", range(-2, 3))
def test_b_a_sample_about_as_long_as_the_pack_never_breaks_it(over):
    tokens = num_tokens(words(50))
    dataset = packs([words(50), row()], seq_length=tokens + over, max_sample_length=9999)
    items = list(dataset)
    assert all(len(item["input_ids"]) <= tokens + over for item in items)
    # One padding token is appended: the sample fits from tokens + 1 on.
    assert dataset.report.num_packed == (2 if over >= 1 else 1)


def test_c_every_dropped_row_is_counted_with_key_and_reason():
    rows = [words(500), row(images=[png(9, 9)] * 3), {"images": [], "texts": []}, row()]
    dataset = packs(rows, max_images_per_example=2)
    list(dataset)
    reasons = {refusal.key: refusal.reason for refusal in dataset.report.refusals}
    assert reasons == {"0": "sample_too_long", "1": "too_many_images", "2": "no_text"}
    assert dataset.report.num_read == dataset.report.num_packed + 3


def test_d_the_image_limit_of_a_pack_holds_for_a_single_sample():
    dataset = packs([row(images=[png(9, 9)] * 4), row(images=[png(9, 9)])], max_images_per_knapsack=2)
    assert [len(item["images"]) for item in dataset] == [1]
    assert dataset.report.num_refused == {"over_budget": 1}


@pytest.mark.parametrize("rows", [[], [words(500)], [row(images=[jpeg(64, 64)[:900]])]])
def test_e_an_endless_pass_over_nothing_ends_with_an_error(rows):
    with pytest.raises(SourceError):
        next(iter(packs(rows, infinite=True, lookahead=2)))


@pytest.mark.parametrize("num_of_sequences", [8, 64])
def test_f_a_small_buffer_fills_packs(num_of_sequences):
    rng = np.random.default_rng(0)
    rows = [words(int(n)) for n in rng.integers(5, 200, 400)]
    dataset = packs(rows, seq_length=1024, max_sample_length=1024, num_of_sequences=num_of_sequences)
    list(dataset)
    # The reference fills 58 % with its training script's buffer of 8 packs.
    assert dataset.report.fill["tokens"] > 0.85


def test_g_packs_are_tensors_not_lists_of_tokens():
    item = next(iter(packs([row()])))
    for name in ("input_ids", "labels", "attention_mask"):
        assert isinstance(item[name], torch.Tensor)
        assert item[name].is_contiguous()


def test_i_no_global_generator_is_touched():
    states = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global one is what is looked at
    list(packs([row(f"q{n}") for n in range(30)]))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_k_a_size_that_cannot_be_cut_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"does not divide max_side 1024.*Use max_side 896 or 1120"):
        get_image_processor(1024, 224)


def test_l_a_consumer_that_stops_leaves_no_thread_and_bounded_memory():
    read = []

    def make(index):
        read.append(index)
        return row(f"q{index}", images=[png(64, 64)])

    before = set(threading.enumerate())
    dataset = packs(Rows(make, 500), lookahead=8, queue_size=2048)
    iterator = iter(dataset)
    next(iterator)
    assert len(read) < 60, "2,048 packs of pixels are not held, whatever queue_size says"
    iterator.close()
    assert set(threading.enumerate()) <= before


def test_m_the_length_knows_of_tiles_and_a_stream_says_that_it_has_none():
    rows = [row(images=[png(128, 128)]) for _ in range(20)]  # 17 tiles: 85 tokens and the text
    dataset = packs(rows)
    assert len(list(dataset)) == 20
    assert len(dataset) == 21  # 2 % more, for what workers leave half full
    with pytest.raises(TypeError, match="streaming"):
        len(packs(Stream(broken_at(), 3)))
    with pytest.raises(TypeError, match="streaming"):
        len(samples(Stream(broken_at(), 3)))
    assert len(samples(rows)) == 20


def test_o_labels_are_never_padded_with_a_token():
    batch = VQACollator(TOKENIZER, 120)(list(packs([row(), words(80)])))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()


def test_p_what_is_filtered_is_never_decoded(monkeypatch):
    def fail(*args, **settings):
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr("vlmpack.packing.assemble.tile_image", fail)
    dataset = packs([row("x " * 500, images=[png(9, 9)]), row(images=[png(9, 9)] * 5), row()])
    assert len(list(dataset)) == 1
    assert dataset.report.total_refused == 2


def test_q_a_merge_over_a_boundary_shifts_no_label():
    """ "assistant\\n" + "\\nb": tokenised apart, the two newlines would be two tokens."""
    item = samples([row("q", "\nb")])[0]
    ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
    supervised = [label for label in labels if label != -100]
    assert TOKENIZER.decode(supervised) == "b<|im_end|>\n"
    assert all(labels[at] in {-100, ids[at + 1]} for at in range(len(ids) - 1))
    assert labels[-1] == -100


def test_r_images_may_stand_in_the_text_in_the_library_itself():
    from vlmpack.stages import VQADataset as Samples

    tiling = get_image_processor(128, 32).tiling(4, global_tile=True)
    in_place = next(iter(Samples([row("a <image> b", images=[png(32, 32)])], TOKENIZER, tiling=tiling)))
    assert in_place.image_starts[0] > 4
    first = samples([row("a <image> b", images=[png(32, 32)])])[0]
    text = TOKENIZER.decode(first["input_ids"])
    # The drop-in puts them first, as the reference does, and takes nothing for a marker.
    assert text.startswith("<|im_start|>user\n<|global_image|>")
    assert "a <image> b" in text


# What must be as in the reference


def test_labels_are_shifted_and_end_with_nothing():
    item = samples([{"images": [], "texts": turns(("q", "a"), ("r", "b"))}])[0]
    ids, labels = item["input_ids"], item["labels"]
    supervised = labels != -100
    assert torch.equal(labels[:-1][supervised[:-1]], ids[1:][supervised[:-1]])
    assert labels[-1] == -100
    assert TOKENIZER.decode(labels[supervised]) == "a<|im_end|>\nb<|im_end|>\n"


def test_a_pack_is_its_samples_each_with_a_masked_token_behind_it():
    rows = [row("q", "a", images=[png(32, 32)]), row("r", "b")]
    alone = [samples(rows)[index] for index in range(2)]
    (item,) = packs(rows)
    pad, at = TOKENIZER.pad_token_id, 0
    first_is_first = len(alone[0]["input_ids"]) == int((item["attention_mask"] == 0).nonzero()[0])
    for index in [0, 1] if first_is_first else [1, 0]:
        length = len(alone[index]["input_ids"])
        for name in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(item[name][at : at + length], alone[index][name]), name
        end = [item[name][at + length].item() for name in ("input_ids", "labels", "attention_mask")]
        assert end == [pad, -100, 0]
        at += length + 1
    assert at == len(item["input_ids"])
    assert [len(image) for image in item["images"]] == [1]


def test_tiles_are_those_of_the_image_processor():
    image = picture(70, 40)
    processor = get_image_processor(128, 32)
    tiles, grid = processor(image)
    assert grid == (2, 3)
    item = samples([row(images=[image])])[0]
    assert torch.equal(item["images"][0], tiles)
    assert tiles.dtype == torch.float32
    assert int((item["input_ids"] == IMAGE).sum()) == 4 * 7
    assert TOKENIZER.decode(item["input_ids"]).count(get_image_string(TOKENIZER, [grid], 4)) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_has_three_channels(mode):
    image = Image.new(mode, (40, 40))
    tiles, _ = get_image_processor(128, 32)(image)
    assert tiles.shape == (5, 3, 32, 32)
    assert torch.equal(samples([row(images=[image])])[0]["images"][0], tiles)


def test_ratings_are_arguments_in_the_reference_order():
    raw = {"images": [], "texts": turns(("q", "a"), ("r", "b")), "formatting_ratings": [1, 4]}
    item = VQADataset([raw], TOKENIZER, get_image_processor(128, 32), 4, 1, 1, 1, 3)[0]
    assert "r" in TOKENIZER.decode(item["input_ids"])
    assert "q" not in TOKENIZER.decode(item["input_ids"])
    kept = samples([raw], formatting_min_rating=5)
    assert kept[0] is None


def test_max_sample_length_refuses_at_the_limit():
    tokens = num_tokens(words(20))
    for limit, packed in ((tokens, 0), (tokens + 1, 1)):
        dataset = packs([words(20), row("q", "a")], max_sample_length=limit)
        list(dataset)
        assert dataset.report.num_packed == 1 + packed


def test_the_collator_takes_no_length_too():
    items = list(packs([row(), words(60)], max_images_per_knapsack=0, seq_length=90))
    batch = VQACollator(TOKENIZER, None)(items)
    assert batch["input_ids"].shape == (len(items), max(len(item["input_ids"]) for item in items))


# Ranks


def test_the_documents_lines_give_a_batchs_images_and_tokens():
    rows = [row(images=[png(32, 32)] * 2), row(images=[png(20, 20)])]
    batch = VQACollator(TOKENIZER, 120)(list(packs(rows, max_images_per_knapsack=2)))
    lines = [
        f"Batch images: {sum(len(img) for img in batch['images'])}",
        f"Batch tokens: {batch['input_ids'].shape}",
    ]
    assert lines == ["Batch images: 3", "Batch tokens: torch.Size([2, 120])"]


def batches_of(*sizes):
    """Batches with this many images each; None for one that the collator left empty."""
    empty = {"input_ids": [], "labels": [], "attention_mask": [], "images": []}
    ids, image = torch.ones(1, 2), torch.ones(1)
    return [empty if size is None else {"input_ids": ids, "images": [[image] * size]} for size in sizes]


def test_j_an_empty_batch_never_reaches_the_training_loop(caplog):
    with caplog.at_level(logging.WARNING):
        left = list(synchronized_dataloader_step(batches_of(1, None, 0, 2), False))
    # On one process a batch of text is a batch like any other.
    assert [len(batch["images"][0]) for batch in left] == [1, 0, 2]
    assert any("empty" in record.getMessage() for record in caplog.records)


@pytest.fixture
def ranks(monkeypatch):
    """Two ranks of which this is one; the other has data, or says what a test puts into `other`."""

    class Ranks:
        other = 1
        asked = 0
        heard = 0

        def all_reduce(self, tensor):
            self.asked += 1
            self.heard = int(tensor)
            tensor += self.other

    made = Ranks()
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", made.all_reduce)
    return made


def test_j_on_several_ranks_a_batch_without_images_is_left_out_not_waited_for(ranks, caplog):
    """Its rank would have no gradient for the vision encoder, and the others would wait for it."""
    with caplog.at_level(logging.WARNING):
        left = list(synchronized_dataloader_step(batches_of(0, 1, None, 0, 2, 0), True))
    assert [len(batch["images"][0]) for batch in left] == [1, 2]
    assert ranks.asked == 3, "once a batch, and once at the end"
    assert any("without images" in record.getMessage() for record in caplog.records)


def test_ranks_end_together_when_one_runs_out(ranks, caplog):
    batches = synchronized_dataloader_step(batches_of(1, 1, 1), True)
    next(batches)
    ranks.other = 0
    assert list(batches) == []
    assert "leaves at least one batch unused" in caplog.text


def test_a_rank_whose_data_fails_tells_the_others_before_it_raises(ranks):
    def loader():
        yield from batches_of(1)
        raise KeyError("user bug")

    batches = synchronized_dataloader_step(loader(), True)
    next(batches)
    with pytest.raises(KeyError, match="user bug"):
        next(batches)
    assert (ranks.asked, ranks.heard) == (2, -2)


def test_a_rank_stops_with_an_error_when_the_data_of_another_failed(ranks):
    ranks.other = -2
    with pytest.raises(SourceError, match="the data of another rank failed"):
        next(synchronized_dataloader_step(batches_of(1), True))


def test_a_budget_error_is_a_value_error():
    assert issubclass(BudgetError, ValueError)
