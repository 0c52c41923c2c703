"""The data part of nanoVLM's training script, with only its imports changed."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, DistributedSampler

from tests.fakes import jpeg, tokenizer
from vlmpack.corpus import CHATML
from vlmpack.errors import ConfigError
from vlmpack.integrations.nanovlm import (
    ConstantLengthDataset,
    VQACollator,
    VQADataset,
    get_image_processor,
    get_tokenizer,
    synchronized_dataloader_step,
)

TOKENS = {"image_token": "<|image|>", "global_image_token": "<|global_image|>"} | {
    f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)
}
TEMPLATE = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LENGTH = 128


def seed_worker(worker_id):
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)  # noqa: NPY002  as the script does
    random.seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def loaders(folder):
    rows = Dataset.from_list([
        {
            "images": [{"bytes": jpeg(40 + number, 30, number), "path": None}] * (number % 3),
            "texts": [{"user": f"Question {number}?", "assistant": "Answer. " * (1 + number % 5)}],
        }
        for number in range(30)
    ])
    processor = get_image_processor(64, 32, False)
    loaded = get_tokenizer(folder, TOKENS, TEMPLATE)
    train = VQADataset(rows.select(range(24)), loaded, processor, 4, 1, 1, 1, 1)
    val = VQADataset(rows.select(range(24, 30)), loaded, processor, 4, 1, 1, 1, 1)
    packs = ConstantLengthDataset(
        train,
        infinite=False,
        max_sample_length=LENGTH,
        seq_length=LENGTH,
        num_of_sequences=8,
        queue_size=8,
        max_images_per_example=2,
        max_images_per_knapsack=6,
    )
    collator = VQACollator(loaded, LENGTH)
    generator = torch.Generator()
    generator.manual_seed(0)
    train_loader = DataLoader(
        packs,
        batch_size=2,
        collate_fn=collator,
        num_workers=2,
        persistent_workers=True,
        drop_last=True,
        worker_init_fn=seed_worker,
        generator=generator,
    )
    val_loader = DataLoader(
        val,
        batch_size=2,
        sampler=DistributedSampler(val, rank=0, num_replicas=1, shuffle=False),
        collate_fn=collator,
        drop_last=True,
    )
    return train_loader, val_loader


def check(batch, tokenizer):
    assert set(batch) == {"input_ids", "labels", "attention_mask", "images"}
    for name in ("input_ids", "labels", "attention_mask"):
        assert batch[name].dtype == torch.int64
        assert batch[name].shape == (2, LENGTH)
    image_id = tokenizer.convert_tokens_to_ids("<|image|>")
    for row in range(2):
        ids, labels, mask = (batch[name][row] for name in ("input_ids", "labels", "attention_mask"))
        tiles = sum(len(image) for image in batch["images"][row])
        assert int((ids == image_id).sum()) == 4 * tiles
        for image in batch["images"][row]:
            assert image.dtype == torch.float32
            assert image.shape[1:] == (3, 32, 32)
        supervised = labels != -100
        assert supervised.any()
        # Shifted: the label of a position is the next token, which is never one of an image.
        assert torch.equal(labels[:-1][supervised[:-1]], ids[1:][supervised[:-1]])
        assert (labels[supervised] != image_id).all()
        first = int(mask.argmax())
        assert (ids[:first] == tokenizer.pad_token_id).all()  # padded on the left
        assert (labels[:first] == -100).all()


def test_two_epochs_of_training_and_a_validation(loaders):
    train_loader, val_loader = loaders
    packs = train_loader.dataset
    for _ in range(2):
        batches = list(synchronized_dataloader_step(train_loader, False))
        assert 1 <= len(batches) <= len(train_loader) + 1
        for batch in batches:
            check(batch, packs.dataset.tokenizer)
        report = packs.report
        assert (report.num_read, report.num_packed, report.total_refused) == (24, 24, 0)
    val = list(val_loader)
    assert len(val) == len(val_loader) == 3
    for batch in val:
        check(batch, packs.dataset.tokenizer)


def test_the_tokenizer_pads_with_its_end_token_and_is_loaded_once(folder):
    loaded = get_tokenizer(folder, TOKENS, TEMPLATE)
    assert loaded.pad_token == loaded.eos_token
    assert loaded.image_token == "<|image|>"
    assert loaded.r8c8 == "<row_8_col_8>"
    assert get_tokenizer(folder, TOKENS, TEMPLATE) is loaded
    assert get_tokenizer(folder, TOKENS, TEMPLATE + " ") is not loaded


def test_the_collator_drops_none_and_what_is_too_long_and_may_be_left_with_nothing(folder, caplog):
    collator = VQACollator(get_tokenizer(folder, TOKENS, TEMPLATE), 4)

    def item(length):
        ones = torch.ones(length, dtype=torch.int64)
        return {"input_ids": ones * 5, "labels": ones * 6, "attention_mask": ones, "images": []}

    pad = collator.tokenizer.pad_token_id
    batch = collator([None, item(3), item(5)])
    assert batch["input_ids"].tolist() == [[pad, 5, 5, 5]]
    assert batch["labels"].tolist() == [[-100, 6, 6, 6]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1]]
    assert collator.num_discarded == 1
    assert "discarded 1 items" in caplog.text
    assert collator([None]) == {"input_ids": [], "labels": [], "attention_mask": [], "images": []}


def test_a_row_that_cannot_be_used_is_none_logged_and_counted(folder, caplog):
    whole = jpeg(64, 64)
    texts = [{"user": "What?", "assistant": "This."}]
    rows = [
        {"images": [whole[:500]], "texts": texts},
        {"images": [], "texts": []},
        {"images": None, "texts": texts},
    ]
    dataset = VQADataset(rows, get_tokenizer(folder, TOKENS, TEMPLATE), get_image_processor(64, 32), 4)
    assert [dataset[index] is None for index in range(3)] == [True, True, False]
    assert dataset.num_refused == 2
    assert "row 0 is left out (image_truncated)" in caplog.text
    assert "row 1 is left out (no_text)" in caplog.text
    assert [item is None for item in dataset.iter_for_worker()] == [True, True, False]


def test_other_peoples_parts_and_sizes_that_cannot_be_cut_are_refused(folder):
    loaded = get_tokenizer(folder, TOKENS, TEMPLATE)
    with pytest.raises(ConfigError, match="the image processor must come from"):
        VQADataset([], loaded, lambda image: image, 4)
    with pytest.raises(ConfigError, match=r"wrap the data in vlmpack\.integrations\.nanovlm\.VQADataset"):
        ConstantLengthDataset([])
    with pytest.raises(ConfigError, match="does not divide"):
        get_image_processor(1024, 224)


RANK = textwrap.dedent(
    """
    import sys
    from torch import distributed
    from vlmpack.integrations.nanovlm import synchronized_dataloader_step
    rank, file = int(sys.argv[1]), sys.argv[2]
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    print(len(list(synchronized_dataloader_step(range(3 + 4 * rank), True))))
    distributed.destroy_process_group()
    """
)


def test_ranks_stop_together_at_the_shortest(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=100) for rank in ranks]
    assert [out.strip() for out, _ in outputs] == ["3", "3"], outputs
    assert "leaves at least one batch unused" in outputs[1][1]
