"""The order of packs in an epoch, and an even number of them."""

from __future__ import annotations

import numpy as np
import pytest

from vlmpack.errors import ConfigError
from vlmpack.packing import plan
from vlmpack.packing.workloads import costs_of
from vlmpack.ranks import epoch_order, even


def test_even_splits_the_packs_with_most_samples_and_moves_nothing():
    # 3 packs of 1, 4 and 4 samples for 5 ranks: two splits are missing. The last of the largest goes
    # first (5..9 -> 5..7, 7..9), then the other (1..5 -> 1..3, 3..5).
    spans = np.array([[0, 1], [1, 5], [5, 9]], np.int64)
    assert even(spans, 5).tolist() == [[0, 1], [1, 3], [3, 5], [5, 7], [7, 9]]
    assert even(spans, 3).tolist() == spans.tolist()
    with pytest.raises(ConfigError, match="9 samples are left, too few to give each of 10 ranks"):
        even(spans, 10)


def test_epochs_differ_and_a_seed_decides_them():
    spans = np.stack([np.arange(50), np.arange(50) + 1], axis=1)
    first, second = epoch_order(spans, seed=0, epoch=0), epoch_order(spans, seed=0, epoch=1)
    assert sorted(first.tolist()) == sorted(second.tolist()) == spans.tolist()
    assert first.tolist() != second.tolist()
    assert first.tolist() == epoch_order(spans, seed=0, epoch=0).tolist()
    assert first.tolist() != epoch_order(spans, seed=1, epoch=0).tolist()


@pytest.mark.parametrize("seed", [0, 3])
def test_the_first_epoch_does_not_undo_the_shuffle_of_the_plan(seed):
    # Best-fit decreasing makes its packs longest sample first, and the plan then shuffles them by the same
    # seed. In random order no correlation of 250 places is over 0.3: five standard deviations are 0.32.
    costs = np.ascontiguousarray(costs_of("text", 2_000)[:, :1])
    made = plan(costs, [4096], method="best_fit_decreasing", seed=seed)
    samples, starts = made.members()
    spans = epoch_order(np.stack([starts[:-1], starts[1:]], axis=1), seed=seed, epoch=0)
    longest = [costs[samples[start:stop]].max() for start, stop in spans]
    places = np.arange(len(longest))
    assert len(longest) > 200
    assert abs(np.corrcoef(places, np.argsort(np.argsort(longest)))[0, 1]) < 0.3
