"""The baseline is the reference pipeline in what it makes: else comparing with it would mean nothing."""

from __future__ import annotations

import itertools

import torch

from benchmarks import baseline_nanovlm, mix
from benchmarks.bench_decode import RULES, tiled
from vlmpack.corpus import load_tokenizer
from vlmpack.geometry import Tiling
from vlmpack.images import to_float
from vlmpack.integrations import nanovlm
from vlmpack.stages import add_image_tokens


def test_the_baseline_cuts_the_same_tiles():
    for name in ("photo 640x480", "document 1240x1754"):
        (file,) = mix.pictures(name, 1)
        for tiling in RULES.values():
            expected, _ = baseline_nanovlm.tiles_of(file, 512, 2048, tiling.resize_to_max_side)
            found = to_float(tiled(file, tiling))
            assert torch.equal(found[1:], expected[1:])
            assert (found[0] - expected[0]).abs().max() * 255 < 1.01


def test_the_baseline_makes_the_same_ids_and_labels():
    tokenizer = load_tokenizer()
    add_image_tokens(tokenizer, Tiling())
    # nanoVLM's tokenizer names its tokens by attributes.
    tokenizer.image_token, tokenizer.global_image_token = "<|image|>", "<|global_image|>"
    for row, column in itertools.product(range(1, 5), repeat=2):
        setattr(tokenizer, f"r{row}c{column}", f"<row_{row}_col_{column}>")
    rows = mix.rows(0.1)
    processor = nanovlm.get_image_processor(2048, 512, resize_to_max_side_len=False)
    items = nanovlm.VQADataset(rows, tokenizer, processor, 64)
    prefix = baseline_nanovlm.prefix_length(tokenizer)
    for row, item in zip(rows, items.iter_for_worker(), strict=True):
        expected = baseline_nanovlm.item_of(row, tokenizer, prefix, 512, 2048, False)
        assert item is not None
        assert torch.equal(item["input_ids"], expected["input_ids"])
        assert torch.equal(item["labels"], expected["labels"])
        assert [len(tiles) for tiles in item["images"]] == [len(tiles) for tiles in expected["images"]]


def test_the_baseline_packs_every_sample_once():
    rows = mix.rows(0.1)
    tokenizer = load_tokenizer()
    add_image_tokens(tokenizer, Tiling())
    packs = list(baseline_nanovlm.packs(rows, tokenizer, to_largest=False))
    assert sum(len(pack["images"]) for pack in packs) == sum(len(row["images"]) for row in rows)
    assert all(len(pack["input_ids"]) == len(pack["labels"]) <= 4096 for pack in packs)
