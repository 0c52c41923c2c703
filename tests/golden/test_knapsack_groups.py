"""The groups of nanoVLM's `_balanced_greedy_knapsack`, recorded by running it on seeded buffers.

Each vector of data/balanced_greedy_knapsack.json holds lengths, image counts, the sequence length, the
spare knapsacks and the groups before the final `random.shuffle`; empty knapsacks are left out.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlmpack.budget import UNLIMITED
from vlmpack.kernels import worst_fit_decreasing
from vlmpack.kernels.shares import num_entries
from vlmpack.packing import StreamPacker, plan

VECTORS = json.loads(
    (Path(__file__).parent / "data" / "balanced_greedy_knapsack.json").read_text(encoding="utf-8")
)


def costs_and_budget(vector):
    costs = np.array([vector["lengths"], vector["images"]], np.int64).T.copy()
    max_images = vector["max_images_per_knapsack"]
    return costs, np.array([vector["seq_length"], UNLIMITED if max_images is None else max_images], np.int64)


def test_there_are_vectors_with_and_without_spare_bins_and_image_limits():
    kinds = {(v["delta"] > 0, v["max_images_per_knapsack"] is None) for v in VECTORS}
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}


@pytest.mark.parametrize("vector", VECTORS)
def test_kernel_returns_the_groups_in_the_reference_order(vector):
    costs, budget = costs_and_budget(vector)
    longest_first = np.argsort(-costs[:, 0], kind="stable")
    num_open = -(-sum(vector["lengths"]) // vector["seq_length"]) + vector["delta"]
    bins = np.empty(len(costs), np.int64)
    num_bins = worst_fit_decreasing(costs, longest_first, budget, num_entries(2), num_open, bins)
    groups = [[] for _ in range(num_bins)]
    for sample in longest_first.tolist():
        groups[bins[sample]].append(sample)
    assert [group for group in groups if group] == vector["groups"]


@pytest.mark.parametrize("vector", VECTORS)
def test_plan_without_shuffle_returns_the_groups(vector):
    costs, budget = costs_and_budget(vector)
    made = plan(costs, budget, method="worst_fit_decreasing", delta=vector["delta"], shuffle=False)
    assert made.as_lists() == [sorted(group) for group in vector["groups"]]


@pytest.mark.parametrize("vector", VECTORS)
def test_stream_emits_the_groups_in_some_order(vector):
    costs, budget = costs_and_budget(vector)
    packer = StreamPacker(
        budget, lookahead=len(costs) + 1, method="worst_fit_decreasing", delta=vector["delta"]
    )
    early = [pack for cost in costs.tolist() for pack in packer.push(cost)]
    assert early == []
    assert sorted(packer.flush()) == sorted(sorted(group) for group in vector["groups"])
