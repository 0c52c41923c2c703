"""Splitting keeps order and items, stays within the cap, and cuts packs between samples only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import jpeg, packs_of, row
from vlmpack.batching import split_pack
from vlmpack.batching.split import divide_item, split_by_cost


def fewest_parts(costs: list[float], cap: float) -> int:
    """Try every way to cut a list: an oracle for short ones."""
    best = len(costs)
    for cuts in range(1 << max(0, len(costs) - 1)):
        parts, load, ok = 1, 0.0, True
        for index, cost in enumerate(costs):
            if index and cuts >> (index - 1) & 1:
                parts, load = parts + 1, 0.0
            ok &= load == 0.0 or load + cost <= cap
            load += cost
        if ok:
            best = min(best, parts)
    return best


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 20))
def test_parts_are_contiguous_within_the_cap_and_as_few_as_possible(costs, cap):
    parts = split_by_cost(costs, cap)
    assert [index for part in parts for index in part] == list(range(len(costs)))
    for part in parts:
        assert len(part) == 1 or sum(costs[index] for index in part) <= cap
    assert len(parts) == fewest_parts(costs, cap)


def test_parts_are_even():
    # as many as fit would be 4 + 4 + 3 and 5 + 2; the even parts cost 8 and 10
    assert [list(part) for part in split_by_cost([4, 4, 3, 5, 2], 12)] == [[0, 1], [2, 3, 4]]
    assert split_by_cost([], 5) == []
    assert split_by_cost([7.0], 5) == [range(1)]


PACKS = list(packs_of([row(f"Q{i}?", "A" * (3 * i), [jpeg(40 + 30 * i, 40)] * (i % 3)) for i in range(8)]))


@pytest.mark.parametrize("pack", [pack for pack in PACKS if len(pack.keys) > 1])
def test_both_halves_of_a_pack_are_packs_of_whole_samples(pack):
    first, second = split_pack(pack)
    assert first.keys + second.keys == pack.keys
    for name in ("input_ids", "labels", "position_ids", "tiles"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(pack, name))
    assert first.tiles_per_image + second.tiles_per_image == pack.tiles_per_image
    assert first.cost + second.cost == pack.cost
    for half in (first, second):
        assert len(half.tiles) == sum(half.tiles_per_image)
        numbers = half.segment_ids[half.segment_ids > 0]
        assert torch.unique(numbers).tolist() == list(range(1, len(half.keys) + 1))
        assert int(half.position_ids[0]) == 0
        assert int(half.labels[0]) == -100


def test_what_is_one_sample_is_not_divided():
    assert any(len(pack.keys) > 1 for pack in PACKS)
    (single,) = packs_of([row()])
    assert divide_item(single) is None
    assert divide_item({"input_ids": [1, 2]}) is None
