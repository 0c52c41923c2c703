"""How unevenly ranks are loaded."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vlmpack.errors import ConfigError
from vlmpack.ranks import load_imbalance


def test_the_figures_of_three_steps():
    # Two ranks. Patches (1, 3), (2, 2), (0, 0): max / mean 1.5, 1 and, without any load, 1.
    # Attention (10, 10), (30, 10), (20, 20): 1, 1.5, 1; the largest sum to 60, the means to 50.
    loads = np.array([[1, 10], [3, 10], [2, 30], [2, 10], [0, 20], [0, 20]], np.int64)
    figures = load_imbalance(loads, world_size=2)
    assert figures.num_steps == 3
    assert figures.patches.per_step.tolist() == [1.5, 1.0, 1.0]
    assert figures.patches.mean == pytest.approx(3.5 / 3)
    assert figures.patches.total == pytest.approx(5 / 4)
    assert figures.attention.per_step.tolist() == [1.0, 1.5, 1.0]
    assert figures.attention.worst == 1.5
    assert figures.attention.total == pytest.approx(60 / 50)
    plain = json.loads(json.dumps(figures.as_dict()))
    assert plain["attention"] == {"mean": pytest.approx(3.5 / 3), "p95": 1.45, "worst": 1.5, "total": 1.2}


def test_several_packs_a_rank_are_added_up_and_the_last_step_may_be_short():
    # Two ranks, two packs each: rank 0 has packs 0 and 2, rank 1 has packs 1 and 3. 1 + 5 = 6 against
    # 2 + 2 = 4: 6 / 5. The last step has packs 4 and 5 only.
    loads = np.array([[1, 0], [2, 0], [5, 0], [2, 0], [3, 0], [1, 0]], np.int64)
    figures = load_imbalance(loads, world_size=2, batch_size=2)
    assert figures.patches.per_step.tolist() == [1.2, 1.5]
    assert figures.attention.mean == figures.attention.worst == figures.attention.total == 1.0


def test_nothing_left_is_even():
    assert load_imbalance(np.empty((0, 2), np.int64), world_size=4).num_steps == 0


def test_packs_that_are_not_even_are_refused():
    with pytest.raises(ConfigError, match="3 packs are not even over 2 ranks"):
        load_imbalance(np.ones((3, 2), np.int64), world_size=2)
