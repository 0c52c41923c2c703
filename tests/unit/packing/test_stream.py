"""The stream packer's settings, errors, limits and state."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vlmpack.budget import PackBudget, SampleCost
from vlmpack.errors import BudgetError, ConfigError
from vlmpack.packing.methods import METHODS
from vlmpack.packing.stream import StreamPacker
from vlmpack.packing.workloads import BUDGET, costs_of


def cost(num_tokens, num_images=0, num_patches=0):
    return SampleCost(num_tokens=num_tokens, num_images=num_images, num_patches=num_patches)


def everything(packer, costs):
    return [pack for each in costs for pack in packer.push(each)] + packer.flush()


def test_costs_and_budgets_of_either_kind_mean_the_same():
    typed = StreamPacker(PackBudget(max_tokens=10, max_images=4, max_patches=9), lookahead=3)
    plain = StreamPacker(np.array([10, 4, 9]), lookahead=3)
    for tokens in (4, 6, 3, 5, 7):
        assert typed.push(cost(tokens, 1, 2)) == plain.push([tokens, 1, 2])
    assert typed.flush() == plain.flush()


def test_a_pack_comes_out_when_the_window_is_full():
    packer = StreamPacker([10], lookahead=3)
    assert packer.push([4]) == packer.push([3]) == []
    assert packer.push([6]) == [[0, 2]]
    assert (packer.num_waiting, packer.num_arrived, packer.num_packs) == (1, 3, 1)
    assert packer.flush() == [[1]]


def test_textbook_methods_collect_a_window_and_pack_it_whole():
    packer = StreamPacker([10], lookahead=4, method="first_fit")
    assert [packer.push([tokens]) for tokens in (4, 7, 6)] == [[], [], []]
    assert sorted(packer.push([3])) == [[0, 2], [1, 3]]
    assert packer.num_waiting == 0


def test_a_look_ahead_of_one_packs_each_sample_at_once():
    packer = StreamPacker([10], lookahead=1)
    assert everything(packer, [[4], [6], [1]]) == [[0], [1], [2]]


def test_waiting_tokens_are_bounded_as_well():
    packer = StreamPacker([10], lookahead=1000, max_waiting_tokens=20)
    assert [packer.push([tokens]) for tokens in (4, 7, 6)] == [[], [], []]
    assert packer.push([3]) == [[0, 2]], "20 tokens wait, so a pack is due; 10 are left"
    assert packer.push([2]) == []


def test_auto_is_the_window_packer_and_says_so():
    assert StreamPacker([10]).method == "balanced"
    assert StreamPacker([10], method="best").method == "best"


def test_costs_that_cannot_be_packed_say_why_and_are_not_taken():
    packer = StreamPacker(PackBudget(max_tokens=10, max_images=1, max_patches=5), lookahead=4)
    packer.push(cost(1))
    with pytest.raises(
        BudgetError, match=r"sample 1: 11 tokens alone are over the pack's limit of 10\. Raise"
    ):
        packer.push(cost(11))
    with pytest.raises(BudgetError, match="6 patches"):
        packer.push(cost(1, 0, 6))
    with pytest.raises(ConfigError, match="at least one token"):
        packer.push(cost(0))
    with pytest.raises(ConfigError, match="no negative cost"):
        packer.push((3, -1, 0))
    with pytest.raises(ConfigError, match="2 axes, the budget 3"):
        packer.push((3, 1))
    with pytest.raises(ConfigError, match="made of integers"):
        packer.push((3.5, 0, 0))
    assert packer.num_arrived == packer.num_waiting == 1
    assert packer.flush() == [[0]]


def test_one_bad_sample_among_many_refuses_all_of_them():
    packer = StreamPacker([10], lookahead=4)
    with pytest.raises(BudgetError, match="1 such samples of 3"):
        packer.push_many([[3], [11], [4]])
    assert packer.num_arrived == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lookahead": 0}, "lookahead must be at least 1"),
        ({"lookahead": 1 << 17}, "at most 65536"),
        ({"max_waiting_tokens": 0}, "max_waiting_tokens must be at least 1"),
        ({"delta": -1}, "delta must not be negative"),
        ({"method": "ffd"}, "no packing method 'ffd'"),
        ({"balance": "attention", "method": "next_fit"}, "needs one of fast, balanced, best"),
        ({"balance": "both"}, "third axis"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, words):
    with pytest.raises(ConfigError, match=words):
        StreamPacker([10], **settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_without_samples_has_no_packs(method):
    packer = StreamPacker([10], method=method)
    assert packer.flush() == []
    assert packer.push_many(np.empty((0, 1), np.int64)) == []
    assert (packer.longest_wait, packer.longest_delay) == (0, 0)


def test_packs_of_one_window_do_not_come_out_from_the_fullest_to_the_emptiest():
    packer = StreamPacker(BUDGET, lookahead=4096, method="best_fit_decreasing")
    costs = costs_of("text", 4096)
    sizes = [len(pack) for pack in everything(packer, costs.tolist())]
    assert len(sizes) > 300
    assert abs(np.corrcoef(np.arange(len(sizes)), sizes)[0, 1]) < 0.15


def test_state_of_another_packer_is_refused():
    state = StreamPacker([10], lookahead=3).state_dict()
    with pytest.raises(ConfigError, match=r"'lookahead': 3.*'lookahead': 4.*packs would differ"):
        StreamPacker([10], lookahead=4).load_state_dict(state)


def test_state_is_small_and_plain():
    packer = StreamPacker(BUDGET, lookahead=1024)
    packer.push_many(costs_of("vlm_tiles", 3000))
    text = json.dumps(packer.state_dict())
    assert len(text) < 64 * 1024
    other = StreamPacker(BUDGET, lookahead=1024)
    other.load_state_dict(json.loads(text))
    assert other.num_waiting == packer.num_waiting > 1000
    assert other.flush() == packer.flush()


@pytest.mark.parametrize(
    ("workload", "lookahead", "method", "fill"),
    [
        ("vlm_tiles", 256, "balanced", 0.989),
        ("vlm_tiles", 256, "best", 0.991),
        ("vlm_tiles", 1024, "balanced", 0.989),
        ("vlm_tiles", 1024, "best", 0.991),
        ("text", 256, "balanced", 0.9997),
    ],
)
def test_streams_are_as_full_as_promised_with_the_flush_included(workload, lookahead, method, fill):
    costs = costs_of(workload, 100_000)
    packer = StreamPacker(BUDGET, lookahead=lookahead, method=method)
    packer.push_many(costs)
    packer.flush()
    assert costs[:, 0].sum() / (packer.num_packs * BUDGET[0]) >= fill
    assert packer.longest_wait < lookahead
    assert packer.longest_delay <= lookahead * 64
