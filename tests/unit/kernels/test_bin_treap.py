"""The treap keeps its order, its maxima and a small depth through adding and dropping."""

from __future__ import annotations

import numpy as np
import pytest

from vlmpack.kernels.bin_treap import LEFT, RIGHT, add_bin, drop_bin, first_in_order
from vlmpack.kernels.shares import measure, num_entries

BUDGET = np.array([100, 50], np.int64)


class Treap:
    def __init__(self, num_bins, tie):
        self.rooms = np.zeros((num_bins, 2), np.int64)
        self.shares = np.zeros((num_bins, num_entries(2)), np.int32)
        self.children = np.full((num_bins, 2), -9, np.int32)
        self.path = np.zeros(num_bins, np.int32)
        self.root, self.tie = -1, tie

    def add(self, bin_id, room):
        self.rooms[bin_id] = room
        self.root = add_bin(
            self.shares, self.children, self.rooms, self.root, self.tie, bin_id, BUDGET, self.path
        )

    def drop(self, bin_id):
        self.root = drop_bin(
            self.shares, self.children, self.rooms, self.root, self.tie, bin_id, BUDGET, self.path
        )

    def first(self, side, need):
        row = np.zeros((1, num_entries(2)), np.int32)
        costs = np.array([need], np.int64)
        measure(costs, 0, BUDGET, row, 0)
        return first_in_order(
            self.shares, self.children, self.rooms, self.root, side, row, costs, 0, self.path
        )

    def in_order(self, node=None, depth=1):
        """Return (bin, depth) from left to right; also checks the maxima."""
        node = self.root if node is None else node
        if node < 0:
            return []
        left, right = (self.in_order(int(child), depth + 1) for child in self.children[node])
        below = [bin_id for bin_id, _ in left + right] + [int(node)]
        own = np.zeros((1, num_entries(2)), np.int32)
        maxima = np.zeros(num_entries(2), np.int32)
        for bin_id in below:
            measure(self.rooms, bin_id, BUDGET, own, 0)
            maxima = np.maximum(maxima, own[0])
        assert self.shares[node].tolist() == maxima.tolist()
        return [*left, (int(node), depth), *right]


@pytest.mark.parametrize("tie", [1, -1])
def test_bins_stay_in_order_while_rooms_change(tie):
    rng, treap, rooms = np.random.default_rng(3), Treap(60, tie), {}
    for _ in range(400):
        bin_id = int(rng.integers(60))
        if bin_id in rooms:
            treap.drop(bin_id)
            del rooms[bin_id]
        else:
            rooms[bin_id] = (int(rng.integers(5)), int(rng.integers(50)))  # many ties
            treap.add(bin_id, rooms[bin_id])
        order = [bin_id for bin_id, _ in treap.in_order()]
        assert order == sorted(rooms, key=lambda b: (rooms[b][0], tie * b))
    assert rooms


def test_the_depth_is_logarithmic_when_bins_come_in_order():
    treap = Treap(1000, 1)
    for bin_id in range(1000):
        treap.add(bin_id, (bin_id % 100, 0))
    assert max(depth for _, depth in treap.in_order()) < 40  # 2 ln 1000 = 14 on average, 10 at best


def test_the_first_bin_that_fits_is_found_from_both_sides():
    treap = Treap(4, 1)
    for bin_id, room in enumerate([(20, 0), (30, 9), (40, 9), (50, 2)]):
        treap.add(bin_id, room)
    assert treap.first(LEFT, (10, 0)) == 0
    assert treap.first(LEFT, (10, 3)) == 1
    assert treap.first(RIGHT, (10, 3)) == 2
    assert treap.first(LEFT, (45, 2)) == treap.first(RIGHT, (10, 1)) == 3
    assert treap.first(LEFT, (45, 3)) == treap.first(RIGHT, (45, 3)) == -1


def test_an_empty_treap_has_no_bin():
    assert Treap(1, 1).first(LEFT, (1, 0)) == -1
