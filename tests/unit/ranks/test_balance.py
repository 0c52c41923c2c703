"""Packs into steps whose ranks are alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import reference_balance as reference
from tests.unit.kernels.test_balance_swaps import windows
from vlmpack.packing import plan
from vlmpack.packing.workloads import BUDGET, costs_of
from vlmpack.ranks import balanced_steps, load_imbalance
from vlmpack.ranks.balance import alike


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def packs_of(workload: str, num_packs: int = 1024):
    """Return int64 [packs, 2]: the tiles and the attention of packs of a workload, in random order."""
    costs = costs_of(workload, 10 * num_packs)
    made = plan(costs, BUDGET)
    attention = np.bincount(made.pack_ids, weights=costs[:, 0].astype(float) ** 2).astype(np.int64)
    loads = np.stack([made.loads[:, 2], attention], axis=1)
    return loads[rng(1).permutation(len(loads))[:num_packs]]


@given(window=windows(), seed=st.integers(0, 3))
def test_each_pack_comes_once_and_steps_are_never_less_even(window, seed):
    loads = np.array(window.loads, np.int64)
    order = balanced_steps(loads, window.num_ranks, window.batch_size, rng(seed))
    assert sorted(order.tolist()) == list(range(len(loads)))
    again = balanced_steps(loads, window.num_ranks, window.batch_size, rng(seed))
    assert order.tolist() == again.tolist()
    objective = [
        reference.objective(window.loads, list(packs), window.num_ranks, window.batch_size)
        for packs in (range(len(loads)), order)
    ]
    assert objective[1] <= objective[0]


@pytest.mark.parametrize(
    ("workload", "limit"),
    # Where both loads vary widely and apart from each other, a single window is a little over the target.
    [("vlm_tiles", 1.03), ("anticorrelated", 1.03), ("text", 1.03), ("planted_half", 1.035)],
)
def test_a_window_of_1024_packs_over_8_ranks_keeps_the_target(workload, limit):
    loads = packs_of(workload)
    before = load_imbalance(loads, world_size=8)
    after = load_imbalance(loads[balanced_steps(loads, 8, 1, rng())], world_size=8)
    assert max(before.attention.mean, before.patches.mean) > 1.2
    assert after.attention.mean <= limit
    assert after.patches.mean <= limit
    assert after.attention.mean + after.patches.mean <= 2 * 1.03


def test_neighbours_in_the_tree_are_alike():
    # Loads (100, 100) to (107, 107) as an 8 x 8 chessboard, in groups of 4: four median cuts, each through
    # the load that varies more, leave squares of 2 x 2.
    loads = np.array([[100 + row, 100 + column] for row in range(8) for column in range(8)], np.int64)
    loads = loads[rng().permutation(64)]
    groups = loads[alike(loads, 4)].reshape(16, 4, 2)
    assert (groups.max(axis=1) - groups.min(axis=1) == 1).all()


def test_steps_and_the_ranks_in_them_come_in_random_order():
    # Packs 0..999 load their number; groups of 4 neighbours. Sorted steps would correlate fully with their
    # place, and rank 3 would always have the largest pack. 250 places: five standard deviations are 0.32.
    loads = np.arange(1000, dtype=np.int64)[:, None]
    steps = balanced_steps(loads, 4, 1, rng()).reshape(250, 4)
    assert (np.sort(steps, axis=1) % 4 == np.arange(4)).all()
    assert abs(np.corrcoef(steps.mean(axis=1), np.arange(250))[0, 1]) < 0.32
    # Each rank has the largest pack in a quarter of the steps, 62.5 +- 7 (one standard deviation).
    assert np.bincount(steps.argmax(axis=1), minlength=4) == pytest.approx(62.5, abs=35)


def test_a_shorter_last_step_stays_last():
    # 2 ranks, 3 packs each a step: 10 packs are a step of 6 and one of 4. The packs of load 0 fit together.
    loads = np.array([[5], [0], [5], [0], [5], [0], [5], [0], [5], [5]], np.int64)
    order = balanced_steps(loads, 2, 3, rng())
    assert sorted(order.tolist()) == list(range(10))
    assert load_imbalance(np.repeat(loads[order], 2, axis=1), world_size=2, batch_size=3).patches.worst == 1.0


def test_packs_without_load_are_even():
    loads = np.zeros((8, 2), np.int64)
    assert sorted(balanced_steps(loads, 4, 1, rng()).tolist()) == list(range(8))


def test_one_long_sample_cannot_be_matched():
    # 7 packs of attention 10 and one of 80: whatever its step, it loads 80 where the others have 10.
    loads = np.array([[0, 10]] * 15 + [[0, 80]], np.int64)
    figures = load_imbalance(loads[balanced_steps(loads, 8, 1, rng())], world_size=8).attention
    # Its step has 150 in all, 18.75 on average: 80 / 18.75 = 4.27; the other is even.
    assert sorted(figures.per_step) == pytest.approx([1.0, 80 / 18.75])
