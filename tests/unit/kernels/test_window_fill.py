"""The window packer on examples worked by hand."""

from __future__ import annotations

import numpy as np

from vlmpack.packing.engine import WindowEngine


def packs(costs, budget, *, lookahead=16, tries=4, seed=0):
    costs = np.array(costs, np.int64)
    engine = WindowEngine(np.array(budget, np.int64), lookahead=lookahead, tries=tries, seed=seed)
    ids = np.empty(len(costs), np.int64)
    num_packs = engine.pack_all(costs, np.arange(len(costs), dtype=np.int32), ids)
    return [sorted(np.flatnonzero(ids == pack).tolist()) for pack in range(num_packs)]


def test_a_pack_starts_with_the_oldest_sample_and_closes_with_the_exact_pair():
    # 4 tokens and 1 tile leave 6 tokens and 3 tiles: only samples 2 and 4 are exactly that.
    costs = [[4, 1], [3, 1], [2, 2], [5, 2], [4, 1], [9, 4]]
    assert packs(costs, [10, 4])[0] == [0, 2, 4]


def test_one_sample_that_fits_exactly_beats_a_pair_that_does_not():
    assert packs([[4, 1], [3, 1], [2, 1], [6, 3]], [10, 4])[0] == [0, 3]


def test_an_axis_that_is_not_indexed_is_still_kept():
    # Tokens and tiles bind; sample 2 would close the pack exactly but for its 9 images.
    assert packs([[4, 0, 2], [5, 0, 2], [6, 9, 2], [5, 0, 1]], [10, 8, 4])[0] == [0, 1]


def test_every_sample_alone_where_none_fits_with_another():
    assert packs([[6], [7], [8], [6]], [10]) == [[0], [1], [2], [3]]


def test_packs_come_out_by_the_age_of_their_oldest_sample():
    rng = np.random.default_rng(0)
    made = packs(rng.integers(1, 50, (200, 1)), [100], lookahead=20)
    assert [pack[0] for pack in made] == sorted(pack[0] for pack in made)


def test_the_seed_decides_the_random_picks():
    costs = np.random.default_rng(0).integers(1, 12, (300, 2))
    one, two = (packs(costs, [100, 100], lookahead=64, seed=seed) for seed in (1, 2))
    assert one != two
    assert one == packs(costs, [100, 100], lookahead=64, seed=1)
