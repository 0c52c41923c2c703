"""Plans of whole data sets: what is refused, what "auto" chooses, order, balance, and how full packs are."""

from __future__ import annotations

import numpy as np
import pytest

from vlmpack.budget import UNLIMITED, PackBudget
from vlmpack.errors import BudgetError, ConfigError
from vlmpack.packing.engine import EFFORTS
from vlmpack.packing.methods import METHODS
from vlmpack.packing.plan import SHUFFLED, mixed_order, plan
from vlmpack.packing.workloads import BUDGET, costs_of

EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


@EVERY_METHOD
def test_no_samples_make_no_packs(method):
    made = plan(np.empty((0, 3), np.int64), BUDGET, method=method)
    assert (made.num_packs, made.num_samples, made.lower_bound, made.loads.shape) == (0, 0, 0, (0, 3))
    assert made.as_lists() == []


@EVERY_METHOD
def test_one_sample_is_one_pack(method):
    made = plan([[5, 1, 2]], [5, 1, 2], method=method)
    assert (made.as_lists(), made.lower_bound, made.loads.tolist()) == ([[0]], 1, [[5, 1, 2]])


@EVERY_METHOD
def test_equal_samples_fill_packs_to_the_last(method):
    # 4 of 25 tokens fit into 100; 3 of 4 tiles into 12: tiles decide, 30 samples make 10 packs.
    made = plan([[25, 1, 4]] * 30, [100, 18, 12], method=method)
    assert (made.num_packs, made.lower_bound) == (10, 10)
    assert set(made.loads[:, 2].tolist()) == {12}


@EVERY_METHOD
def test_one_giant_gets_a_pack_to_itself(method):
    made = plan([[1, 0, 0]] * 7 + [[4096, 18, 48]] + [[1, 0, 0]] * 7, BUDGET, method=method)
    giant = made.pack_ids[7]
    assert made.loads[giant].tolist() == [4096, 18, 48]
    assert (made.pack_ids == giant).sum() == 1


@EVERY_METHOD
def test_an_axis_that_nobody_uses_may_have_a_budget_of_zero(method):
    made = plan([[3, 0, 1], [2, 0, 1], [4, 0, 1]], [5, 0, 9], method=method, shuffle=False)
    assert sorted(map(len, made.as_lists())) == [1, 2]


def test_a_pack_budget_without_limits_is_a_token_budget():
    made = plan([[60, 9, 9000], [40, 9, 9000], [50, 0, 0]], PackBudget(max_tokens=100))
    assert sorted(made.as_lists()) == [[0, 1], [2]]
    assert made.budget.tolist() == [100, UNLIMITED, UNLIMITED]


@pytest.mark.parametrize(
    ("costs", "budget", "error", "words"),
    [
        (
            [[5, 0, 0], [9, 0, 49]],
            BUDGET,
            BudgetError,
            "sample 1: 49 patches .* limit of 48.*1 such samples of 2",
        ),
        (
            [[5, 0, 0], [4097, 0, 0]],
            BUDGET,
            BudgetError,
            "sample 1: 4097 tokens .* Raise the budget, or drop",
        ),
        ([[5, 0, 0], [0, 0, 0]], BUDGET, ConfigError, "sample 1: needs at least one token"),
        ([[5, 0, -1]], BUDGET, ConfigError, "sample 0: .* no negative cost"),
        ([[5.0, 0, 0]], BUDGET, ConfigError, "costs are integers, got float64"),
        ([[float("nan"), 0, 0]], BUDGET, ConfigError, "costs are integers"),
        ([[5, 0]], BUDGET, ConfigError, r"costs must be \[n, 3\]"),
        ([5, 6], BUDGET, ConfigError, r"costs must be \[n, 3\]"),
        (np.array([[1 << 63, 0, 0]], np.uint64), [UNLIMITED, 1, 1], ConfigError, "over 2.62"),
        ([[1 << 61, 0, 0]] * 3, [UNLIMITED, 1, 1], ConfigError, "overflow"),
        ([[5, 0, 1]], [9, 0, 0], BudgetError, "1 patches alone are over the pack's limit of 0"),
        ([[5, 0, 0]], [0, 1, 1], ConfigError, "the first .tokens. is at least 1"),
        ([[5, 0, 0]], [9, -1, 1], ConfigError, "between 0 and"),
        ([[5, 0, 0]], [9.5, 1, 1], ConfigError, "a budget holds integers"),
        ([[5] * 7], [9] * 7, ConfigError, "1 to 6 limits"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_its_numbers(costs, budget, error, words):
    with pytest.raises(error, match=words):
        plan(costs, budget)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "magic"}, "no packing method 'magic'; choose one of auto, fast"),
        ({"delta": -1}, "delta must be at least 0"),
        ({"lookahead": 0}, "lookahead at least 1"),
        ({"lookahead": 1 << 17, "method": "best"}, "at most 65536"),
        ({"method": "first_fit", "balance": "patches"}, "needs one of fast, balanced, best, not first_fit"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        plan([[5, 0, 0]], BUDGET, **settings)


def test_patches_cannot_be_balanced_without_patches():
    with pytest.raises(ConfigError, match="third axis"):
        plan([[5, 0]], [9, 9], balance="patches")


def test_one_axis_takes_a_plain_list():
    assert plan([3, 2, 5], [5]).num_packs == 2


# What "auto" chooses


@pytest.mark.parametrize(
    ("workload", "expected"),
    [
        ("text", "best_fit_decreasing"),
        ("planted_half", "best_fit_decreasing"),
        ("vlm_tiles", "balanced"),
        ("anticorrelated", "balanced"),
    ],
)
def test_auto_looks_at_which_axes_bind(workload, expected):
    assert plan(costs_of(workload, 500), BUDGET).method == expected


def test_auto_packs_by_patches_where_patches_bind_alone():
    # 10 x 5 of 10 patches need 5 packs, the tokens less than one; best fit by tokens would make one pack.
    made = plan([[1, 0, 5]] * 10, [1000, 18, 10])
    assert (made.method, made.num_packs) == ("best_fit_decreasing", 5)


def test_a_pack_over_another_budget_is_not_kept():
    # Tokens bind alone (4 packs against 1.5), but by tokens alone all seven images would share one pack.
    costs = [[90, 0, 0]] * 4 + [[10, 3, 0], [9, 3, 0], [1, 0, 0]]
    made = plan(costs, [100, 4, 9])
    assert made.method == "best_fit_decreasing"
    assert (made.loads <= made.budget).all()
    assert made.num_packs == 4


# Order


def test_packs_do_not_come_out_sorted_by_fullness():
    made = plan(costs_of("text", 20000), BUDGET, method="first_fit_decreasing")
    order = np.corrcoef(np.arange(made.num_packs), made.loads[:, 0])[0, 1]
    in_order = plan(costs_of("text", 20000), BUDGET, method="first_fit_decreasing", shuffle=False)
    members = np.bincount(in_order.pack_ids)
    assert abs(np.corrcoef(np.arange(made.num_packs), np.bincount(made.pack_ids))[0, 1]) < 0.1
    assert np.corrcoef(np.arange(made.num_packs), members)[0, 1] > 0.5, "the kernel's own order is sorted"
    assert abs(order) < 0.1


def test_data_sorted_by_kind_is_mixed_unless_its_order_shall_stay():
    # 2,000 texts of 50 of 100 tokens, then 2,000 images of 10 tokens and 5 of 10 tiles.
    costs = [[50, 0, 0]] * 2000 + [[10, 1, 5]] * 2000
    mixed = plan(costs, [110, 9, 10], method="balanced")
    kept = plan(costs, [110, 9, 10], method="balanced", shuffle=False)
    assert mixed.num_packs < 1700, "50 + 50 + 10 tokens, and pairs of images for the rest"
    assert kept.num_packs > 1900, "pairs of either kind, but for those that wait when the kind changes"
    assert kept.pack_ids[0] == 0


def test_neighbours_in_the_mixed_order_come_from_all_over_the_data():
    n = SHUFFLED + 12345
    order = mixed_order(n, np.random.default_rng(3))
    assert np.array_equal(np.sort(order), np.arange(n)), "each sample once"
    assert not np.array_equal(order, mixed_order(n, np.random.default_rng(4)))
    # Any 512 neighbours meet the tenths of the data evenly: 51 +- 7 if they were drawn at random.
    for low in range(0, n - 512, 50000):
        tenths = np.bincount(order[low : low + 512] * 10 // n, minlength=10)
        assert tenths.min() > 20
        assert tenths.max() < 90


# Quality: the figures that the documentation promises, on fewer samples


@pytest.mark.parametrize(
    ("workload", "method", "at_most"),
    [
        ("vlm_tiles", "fast", 1.020),
        ("vlm_tiles", "balanced", 1.011),
        ("vlm_tiles", "best", 1.009),
        ("anticorrelated", "balanced", 1.025),
        ("anticorrelated", "best", 1.018),
        ("planted_half", "auto", 1.002),
        ("text", "auto", 1.001),
        ("text", "balanced", 1.001),
        ("over_half", "balanced", 1.0),
    ],
)
def test_packs_are_within_the_promised_share_of_the_lower_bound(workload, method, at_most):
    made = plan(costs_of(workload, 40000), BUDGET, method=method)
    assert made.num_packs <= at_most * made.lower_bound
    assert (made.loads <= BUDGET).all()


def test_more_effort_never_costs_a_tenth_of_a_percent():
    costs = costs_of("vlm_tiles", 40000)
    packs = [plan(costs, BUDGET, method=method).num_packs for method in EFFORTS]
    assert packs[1] <= packs[0]
    assert packs[2] <= packs[1] * 1.001


@pytest.mark.parametrize(("balance", "axis"), [("patches", 1), ("attention", 2), ("both", 1)])
def test_balance_evens_out_packs_for_less_than_a_tenth_of_a_percent(balance, axis):
    costs = costs_of("vlm_tiles", 20000)
    budget = [16384, UNLIMITED, UNLIMITED]

    def spread(made):
        attention = np.bincount(made.pack_ids, weights=costs[:, 0].astype(float) ** 2)
        return [load.std() / load.mean() for load in (made.loads[:, 0], made.loads[:, 2], attention)]

    plain = plan(costs, budget, method="best")
    even = plan(costs, budget, method="best", balance=balance)
    assert even.num_packs <= 1.001 * plain.num_packs + 1
    assert spread(even)[axis] < 0.75 * spread(plain)[axis]
