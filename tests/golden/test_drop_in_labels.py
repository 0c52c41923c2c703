"""Token ids, labels and tiles of real records, as the reference pipeline made them.

`data/vqa_labels.json` and `data/image_string.json` were made by running nanoVLM's `VQADataset` and
`get_image_string` with the tokenizer and the settings that the files name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fakes import drop_in_tokenizer
from vlmpack.integrations.nanovlm import VQADataset, get_image_processor, get_image_string

DATA = Path(__file__).parent / "data"
LABELS = json.loads((DATA / "vqa_labels.json").read_text())
STRINGS = json.loads((DATA / "image_string.json").read_text())


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    rows = [
        {
            "texts": case["texts"],
            "images": [
                Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
                for width, height in case["image_sizes"]
            ],
        }
        for case in LABELS["cases"]
    ]
    processor = get_image_processor(
        LABELS["max_side_len"], LABELS["patch_size"], LABELS["resize_to_max_side_len"]
    )
    tokenizer = drop_in_tokenizer(LABELS["chat_template"])
    return VQADataset(rows, tokenizer, processor, LABELS["image_token_length"])


@pytest.mark.parametrize("index", range(len(LABELS["cases"])))
def test_ids_labels_and_tiles_equal_the_reference(dataset, index):
    case, item = LABELS["cases"][index], dataset[index]
    assert item["input_ids"].tolist() == case["input_ids"]
    assert item["labels"].tolist() == case["labels"]
    assert [len(tiles) for tiles in item["images"]] == case["tiles"]
    assert case["attention_mask_all_ones"]
    assert (item["attention_mask"] == 1).all()
    assert item["input_ids"].dtype == item["labels"].dtype == item["attention_mask"].dtype == torch.int64
    for tiles in item["images"]:
        assert tiles.dtype == torch.float32
        assert tiles.shape[1:] == (3, LABELS["patch_size"], LABELS["patch_size"])
        assert 0 <= tiles.min() < tiles.max() <= 1


def test_the_reference_supervises_something_in_every_record():
    assert len(LABELS["cases"]) == 40
    assert all(any(label != -100 for label in case["labels"]) for case in LABELS["cases"])


@pytest.mark.parametrize("index", range(len(STRINGS)))
def test_image_string_equals_the_reference(index):
    case = STRINGS[index]
    tokenizer = drop_in_tokenizer(LABELS["chat_template"], has_global=case["has_global_token"])
    text = get_image_string(tokenizer, [tuple(grid) for grid in case["grids"]], case["image_token_length"])
    assert hashlib.sha256(text.encode()).hexdigest() == case["sha256"]
    assert text.count(tokenizer.image_token) == case["image_tokens"]
