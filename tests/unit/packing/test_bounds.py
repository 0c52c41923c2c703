"""Lower bounds on examples worked by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from vlmpack.budget import UNLIMITED
from vlmpack.errors import BudgetError, ConfigError
from vlmpack.packing.bounds import MAX_SIZES, lower_bounds
from vlmpack.packing.configuration_bound import configuration_bound
from vlmpack.packing.workloads import BUDGET, costs_of


def test_l1_is_the_sum_of_each_axis_rounded_up():
    # 21 of 10 tokens, 0 images, 5 of 4 tiles.
    bounds = lower_bounds([[7, 0, 1], [7, 0, 2], [7, 0, 2]], [10, 3, 4])
    assert bounds.per_axis == (3, 0, 2)


def test_l2_counts_samples_that_cannot_share_a_pack():
    # Five samples of 6 of 10 sum to 3 packs, but no two of them fit together. With a = 4, five samples of 4
    # fit exactly beside them; of a sixth, 4 are too much: 6 packs.
    assert lower_bounds([[6]] * 5, [10]).martello_toth == (5,)
    assert lower_bounds([[6]] * 5 + [[4]] * 5, [10]).martello_toth == (5,)
    assert lower_bounds([[6]] * 5 + [[4]] * 6, [10]).martello_toth == (6,)


def test_the_crossed_bound_counts_what_cannot_stand_beside_a_long_text():
    # Texts of 90 of 100 tokens leave 10: one image of 10 tokens and 2 of 10 tiles. So 3 texts and 33 images
    # are 3 packs with 3 images, and 30 / 5 packs of images. By the sums it is 600 / 100 = 6 and 66 / 10 = 7.
    bounds = lower_bounds([[90, 0]] * 3 + [[10, 2]] * 33, [100, 10])
    assert (bounds.per_axis, bounds.crossed, bounds.best) == ((6, 7), 9, 9)
    # Texts of 95 leave 5, half an image: 10 x (1 - 1 / 10) + 40 x 2 / 10 = 17. By the sums 1,350 / 100 and 8.
    bounds = lower_bounds([[95, 0]] * 10 + [[10, 2]] * 40, [100, 10])
    assert (bounds.per_axis, bounds.crossed) == ((14, 8), 17)


def test_one_dense_sample_does_not_spoil_the_crossed_bound():
    costs = np.array([[95, 0]] * 1000 + [[10, 2]] * 4000)
    assert lower_bounds(costs, [100, 10]).crossed == 1700
    costs[-1] = [1, 10]  # fifty times denser: by its density, everything fits beside a text
    assert lower_bounds(costs, [100, 10]).crossed >= 1699


def test_bounds_of_nothing_and_of_axes_without_limits():
    empty = lower_bounds(np.empty((0, 2), np.int64), [10, 10])
    assert (empty.best, empty.crossed) == (0, 0)
    assert lower_bounds([[6, 7]] * 4, [10, UNLIMITED]).best == 4
    assert lower_bounds([[6, 0]] * 4, [10, 0]).martello_toth == (4, 0)


def test_limits_beyond_the_histogram_are_rounded_and_stay_bounds():
    limit = 3 * MAX_SIZES
    bounds = lower_bounds([[2 * MAX_SIZES]] * 5, [limit])
    assert bounds.martello_toth == (5,)
    assert lower_bounds([[limit // 2]] * 6, [limit]).martello_toth[0] <= 3


def test_bad_costs_are_refused():
    with pytest.raises(BudgetError):
        lower_bounds([[11]], [10])


def test_the_configuration_bound_sees_what_the_sums_do_not():
    # Of three samples of 40 of 100, two share a pack: 9 samples need 9 / 2 packs, by their sum only 3.6.
    bound = configuration_bound([[40]] * 9, [100])
    assert (bound.num_packs, bound.is_converged) == (5, True)
    assert bound.value == pytest.approx(4.5)


def test_the_configuration_bound_is_above_the_cheap_ones_on_mixed_samples():
    costs = costs_of("vlm_tiles", 400)
    bound = configuration_bound(costs, BUDGET, levels=128)
    cheap = lower_bounds(costs, BUDGET)
    assert bound.is_converged
    assert max(cheap.per_axis) <= bound.num_packs <= 1.05 * cheap.best


def test_a_bound_that_ran_out_of_time_is_still_a_bound():
    costs = costs_of("vlm_tiles", 400)
    early = configuration_bound(costs, BUDGET, time_limit_s=0.01)
    assert not early.is_converged
    assert early.num_packs <= configuration_bound(costs, BUDGET).num_packs


def test_the_configuration_bound_of_nothing_is_nothing():
    assert configuration_bound(np.empty((0, 3), np.int64), BUDGET).num_packs == 0


def test_wrong_levels_are_refused():
    with pytest.raises(ConfigError, match="levels must be at least 1"):
        configuration_bound([[1]], [10], levels=0)


def test_without_highspy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlmpack\[bounds\]'"):
        configuration_bound([[1]], [10])
