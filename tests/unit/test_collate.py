"""Batches: padding, order of tiles, and the refusal of what is over its length or budget."""

from __future__ import annotations

import pytest
import torch

from tests.fakes import tokenizer
from tests.unit.memory.small import SMALL_MODEL, gpu_for
from vlmpack.budget import BatchBudget, SampleCost
from vlmpack.collate import VQACollator
from vlmpack.errors import BudgetError, ConfigError
from vlmpack.memory import BatchGuard
from vlmpack.packing import PackedSequence

PAD = tokenizer().pad_token_id


def pack(*costs: tuple[str, int, int, int], fill: int = 0) -> PackedSequence:
    """Return a pack of samples (key, tokens, images, tiles); a tile has 4 patches and the colour `fill`."""
    lengths = [tokens for _, tokens, _, _ in costs]
    num_tiles = sum(tiles for *_, tiles in costs)
    return PackedSequence(
        input_ids=torch.arange(1, sum(lengths) + 1),
        labels=torch.cat([torch.tensor([-100] + [7] * (length - 1)) for length in lengths]),
        segment_ids=torch.cat([torch.full((length,), n) for n, length in enumerate(lengths, start=1)]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        tiles=torch.full((num_tiles, 3, 2, 2), fill, dtype=torch.uint8),
        tiles_per_image=(1,) * num_tiles,
        keys=tuple(key for key, *_ in costs),
        costs=tuple(
            SampleCost(num_tokens=tokens, num_images=images, num_patches=4 * tiles)
            for _, tokens, images, tiles in costs
        ),
    )


def test_rows_are_padded_on_the_right_and_tiles_follow_row_by_row():
    batch = VQACollator(tokenizer(), 6)([
        pack(("a", 2, 1, 1), ("b", 3, 0, 0), fill=1),
        pack(("c", 4, 1, 2), fill=2),
    ])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, PAD], [1, 2, 3, 4, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 7, -100, 7, 7, -100], [-100, 7, 7, 7, -100, -100]]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0]]
    assert batch["tiles"][:, 0, 0, 0].tolist() == [1, 2, 2]
    assert batch["tiles"].dtype == torch.uint8
    assert batch["tiles_per_pack"].tolist() == [1, 2]
    assert batch["keys"] == [("a", "b"), ("c",)]
    assert "attention_mask" not in batch  # it would switch off the isolation by positions


def test_a_pack_over_the_length_raises_and_names_its_samples():
    with pytest.raises(BudgetError, match=r"5 positions, over max_length 4 \(samples a, b\)"):
        VQACollator(tokenizer(), 4)([pack(("a", 2, 0, 0), ("b", 3, 0, 0))])


def test_a_pack_over_the_length_is_discarded_and_counted_on_request(caplog):
    collator = VQACollator(tokenizer(), 4, over_length="discard")
    batch = collator([pack(("a", 5, 0, 0)), pack(("b", 3, 0, 0))])
    assert batch["keys"] == [("b",)]
    assert collator.num_discarded == 1
    assert "discarded: a pack has 5 positions" in caplog.text
    with pytest.raises(BudgetError, match="no pack is left"):
        collator([pack(("a", 5, 0, 0))])


def test_patches_over_the_budget_name_the_most_expensive_packs_and_samples():
    # Row 0: 2 + 1 tiles = 12 patches; row 1: 5 + 0 tiles = 20. Together 32 of 30: 2 too many. The most
    # expensive sample is c (20), then a (8), then b (4). 30 patches for 2 rows are 15 a row.
    packs = [pack(("a", 2, 1, 2), ("b", 2, 1, 1)), pack(("c", 2, 2, 5), ("d", 2, 0, 0))]
    with pytest.raises(BudgetError) as caught:
        VQACollator(tokenizer(), 8, budget=BatchBudget(max_patches=30))(packs)
    message = str(caught.value)
    assert "the batch holds 32 patches, over its budget of 30 by 2." in message
    assert "row 1 (20 patches, 2 images), row 0 (12 patches, 2 images)" in message
    assert "samples: c (20 patches), a (8 patches), b (4 patches)." in message
    assert "max_patches of at most 15" in message
    VQACollator(tokenizer(), 8, budget=BatchBudget(max_patches=32))(packs)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (BatchBudget(max_packs=1), "holds 2 packs, over its budget of 1 by 1"),
        (BatchBudget(max_tokens=15), "holds 16 tokens, over its budget of 15 by 1"),  # 2 rows of 8
    ],
)
def test_other_budgets_hold_too(budget, words):
    with pytest.raises(BudgetError, match=words):
        VQACollator(tokenizer(), 8, budget=budget)([pack(("a", 2, 0, 0)), pack(("b", 2, 0, 0))])


def test_what_does_not_fit_the_gpu_is_refused_before_tiles_are_stacked(monkeypatch):
    guard = BatchGuard(SMALL_MODEL, None, gpu_for(rows=2, tokens_per_row=8, tiles=7))
    collator = VQACollator(tokenizer(), 8, memory=guard)
    small, large = pack(("a", 2, 1, 2), ("b", 2, 1, 1)), pack(("c", 2, 2, 4), ("d", 2, 0, 0))
    assert len(collator([small, large])["tiles"]) == 7
    monkeypatch.setattr(torch, "cat", None)
    with pytest.raises(BudgetError) as caught:
        collator([large, large])
    message = str(caught.value)
    assert "a batch of 2 pack(s) of 8 tokens with 32 patches needs" in message
    assert "At its peak (" in message
    assert "Dearest samples: c (16 patches, 2 tokens), d (0 patches, 2 tokens)." in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 0}, "max_length must be a positive integer, got 0"),
        ({"max_length": True}, "max_length must be a positive integer, got True"),
        ({"max_length": 8, "over_length": "cut"}, "over_length must be one of"),
    ],
)
def test_wrong_settings_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        VQACollator(tokenizer(), **options)
