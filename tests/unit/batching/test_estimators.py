"""Where searches begin: the documented tables, and their corrections."""

from __future__ import annotations

import pytest

from vlmpack.batching import (
    estimate_batch_size_for_blocks,
    estimate_batch_size_for_max_crops,
    estimate_batch_size_for_num_blocks,
    estimate_batch_size_for_top_k,
    estimate_for_depth,
    starting_size,
)
from vlmpack.errors import ConfigError


@pytest.mark.parametrize(
    ("crops", "expected"),
    [(1, 64), (2, 64), (3, 51), (4, 51), (6, 38), (8, 32), (9, 25), (10, 25), (12, 19), (13, 16), (100, 16)],
)
def test_the_documented_table_for_crops(crops, expected):
    assert estimate_batch_size_for_max_crops(crops, 64) == expected


@pytest.mark.parametrize(("top_k", "expected"), [(1, 64), (2, 64), (3, 57), (4, 57), (8, 51), (9, 44)])
def test_the_documented_table_for_experts(top_k, expected):
    assert estimate_batch_size_for_top_k(top_k, 64) == expected


def test_the_documented_estimate_for_depth_and_its_correction():
    # 8 of 16 blocks: documented 64 * 8 / 16 = 32; half the memory a sample allows 128, capped at the base.
    assert estimate_batch_size_for_blocks(8, 16, 64) == 32
    assert estimate_batch_size_for_num_blocks is estimate_batch_size_for_blocks
    assert estimate_for_depth(8, 16, 64) == 64
    assert estimate_for_depth(8, 16, 64, cap=1000) == 128
    assert estimate_for_depth(16, 16, 64) == 64


def test_shares_can_be_tuned():
    scales = ((2, 1.0), (12, 0.5), (float("inf"), 0.25))
    assert estimate_batch_size_for_max_crops(12, 64, scales) == 32
    with pytest.raises(ConfigError, match="beyond the last row"):
        estimate_batch_size_for_max_crops(13, 64, scales[:2])


def test_an_estimate_of_nothing_is_no_start():
    assert estimate_batch_size_for_max_crops(13, 3) == 0, "int(3 * 0.25), exactly as documented"
    assert starting_size(0, 3) == 1
    assert starting_size(19, 64) == 19
    assert starting_size(100, 64) == 64


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: estimate_batch_size_for_max_crops(0, 64), "max_crops"),
        (lambda: estimate_batch_size_for_top_k(2, True), "base_batch_size"),
        (lambda: estimate_batch_size_for_blocks(17, 16, 64), "17 active blocks"),
        (lambda: estimate_for_depth(0, 16, 64), "num_active"),
    ],
)
def test_wrong_numbers_are_named(call, word):
    with pytest.raises(ConfigError, match=word):
        call()
