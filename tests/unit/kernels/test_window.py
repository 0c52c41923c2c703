"""The look-ahead window's bookkeeping, and its choice of axes, on examples worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vlmpack.budget import UNLIMITED
from vlmpack.kernels.window import (
    ARRIVAL,
    BLUR,
    CLASS,
    COARSE,
    COUNT,
    FINE,
    HIDDEN,
    KEY,
    LEAST,
    NEWER,
    OLDEST,
    SHIFT,
    SIZE,
    SLICES,
    SLOT_BITS,
    TOTAL,
    UNIT,
    hide,
    insert,
    is_hidden,
    largest_key,
    make_window,
    remove,
    show,
)
from vlmpack.kernels.window_axes import refresh_axes


def window_of(costs, budget, *, lookahead=None):
    costs = np.array(costs, np.int64)
    window = make_window(lookahead or len(costs), costs.shape[1])
    for arrival in range(len(costs)):
        insert(*window, costs, arrival, arrival)
    refresh_axes(*window, np.array(budget, np.int64), len(budget))
    return window


def by_age(window):
    slot, arrivals = window.meta[OLDEST], []
    while slot >= 0:
        arrivals.append(int(window.slots[slot, ARRIVAL]))
        slot = window.slots[slot, NEWER]
    return arrivals


def test_samples_leave_in_any_order_and_age_and_totals_follow():
    window = window_of([[10, 1], [20, 2], [30, 3], [40, 4]], [100, 10])
    slots = {int(row[ARRIVAL]): slot for slot, row in enumerate(window.slots)}
    remove(*window, slots[2])
    remove(*window, slots[0])
    assert by_age(window) == [1, 3]
    assert window.meta[COUNT] == 2
    assert window.meta[TOTAL : TOTAL + 2].tolist() == [60, 6]
    assert window.meta[TOTAL + 2 : TOTAL + 4].tolist() == [100, 10], "what ever came"
    insert(*window, np.array([[5, 5]], np.int64), 0, 4)
    assert by_age(window) == [1, 3, 4]
    for arrival in (3, 1):
        remove(*window, slots[arrival])
    assert by_age(window) == [4]


def test_the_largest_key_is_found_in_its_class_unless_it_is_hidden():
    # Tiles are the coarse axis: classes 1 and 5; the keys are tokens.
    window = window_of([[300, 5], [731, 5], [732, 5], [100, 1]], [1000, 10])
    assert window.meta[[FINE, COARSE, UNIT, BLUR]].tolist() == [0, 1, 1, 0]
    limit = (731 << SLOT_BITS) | (1 << SLOT_BITS) - 1
    found = largest_key(window.classes, 5, limit)
    assert (found >> SLOT_BITS, window.slots[found & 0xFFFF, ARRIVAL]) == (731, 1)
    hide(window.slots, window.classes, found & 0xFFFF)
    assert is_hidden(window.slots, window.classes, found & 0xFFFF)
    assert largest_key(window.classes, 5, limit) >> SLOT_BITS == 300
    show(window.slots, window.classes, found & 0xFFFF)
    assert largest_key(window.classes, 5, limit) == found
    assert largest_key(window.classes, 5, (299 << SLOT_BITS)) == -1
    assert largest_key(window.classes, 2, limit) == -1


def test_the_least_key_of_a_class_follows_removals():
    window = window_of([[300, 5], [201, 5], [400, 5]], [1000, 10])
    group = window.slots[0, CLASS]
    assert window.classes[group, LEAST] >> SLOT_BITS == 201
    for arrival, least in ((1, 300), (0, 400)):
        slot = int(np.flatnonzero(window.slots[:, ARRIVAL] == arrival)[0])
        remove(*window, slot)
        assert window.classes[group, LEAST] >> SLOT_BITS == least
    remove(*window, window.meta[OLDEST])
    assert (window.classes[group, LEAST], window.classes[group, SIZE]) == (HIDDEN, 0)


@pytest.mark.parametrize("count", [31, 32, 33, 64, 100])
def test_classes_longer_than_a_vector_are_scanned_to_their_end(count):
    # Two tiles each, so all are in one class; one more sample makes the axis' step 1.
    costs = np.stack([np.arange(1, count + 1), np.full(count, 2)], axis=1)
    costs = np.concatenate([costs[np.random.default_rng(0).permutation(count)], [[1, 1]]])
    window = window_of(costs, [25 * count, 100])
    assert window.meta[[FINE, COARSE, UNIT]].tolist() == [0, 1, 1]
    assert largest_key(window.classes, 2, HIDDEN - 1) >> SLOT_BITS == count
    assert largest_key(window.classes, 2, (17 << SLOT_BITS) - 1) >> SLOT_BITS == 16


@pytest.mark.parametrize(
    ("costs", "budget", "fine", "coarse", "unit"),
    [
        # 60 of 100 tokens and 6 of 10 tiles: both bind; tokens have more levels.
        ([[21, 2], [39, 4]], [100, 10], 0, 1, 2),
        # 3 of 10 tiles are half of what the tokens need: still indexed. 2 of 10 are not.
        ([[21, 1], [39, 2]], [100, 10], 0, 1, 1),
        ([[21, 1], [39, 1]], [100, 10], 0, 0, 3),
        # Tokens in steps of 20 have 5 levels, tiles 10.
        ([[20, 1], [40, 5]], [100, 10], 1, 0, 20),
        # Patches in tiles of 1,024: 48 levels. Tokens 7 of 10, images none.
        ([[3, 0, 17408], [4, 0, 1024]], [10, 18, 49152], 2, 0, 1),
        ([[300, 0, 17408], [401, 0, 1024]], [1000, 18, 49152], 0, 2, 1024),
        # 5,000 levels without a divisor are cut into 48 slices of 5,000 // 48 + 1.
        ([[1, 1001], [1, 1500]], [2, 5000], 1, 0, 1),
        ([[3001, 1001], [1000, 1500]], [9000, 5000], 0, 1, 5000 // SLICES + 1),
        # An axis without a limit needs nothing.
        ([[1, 99], [1, 99]], [4, UNLIMITED], 0, 0, 1),
    ],
)
def test_the_two_axes_that_need_most_packs_are_indexed(costs, budget, fine, coarse, unit):
    window = window_of(costs, budget)
    assert window.meta[[FINE, COARSE, UNIT]].tolist() == [fine, coarse, unit]
    for row in window.slots:
        assert window.classes[row[CLASS], SIZE] > 0


def test_a_sample_that_does_not_share_the_divisor_blurs_the_classes():
    window = window_of([[301, 10], [400, 20]], [1000, 50], lookahead=3)
    assert window.meta[[UNIT, BLUR]].tolist() == [10, 0]
    insert(*window, np.array([[500, 25]], np.int64), 0, 2)
    assert window.meta[BLUR] == 18, "two floors can hide 2 x 9"


def test_huge_limits_are_shifted_into_a_key():
    window = window_of([[1 << 60, 1], [3 << 58, 1]], [1 << 61, 1 << 40])
    assert (1 << 61) >> window.meta[SHIFT] < 1 << (62 - SLOT_BITS)
    assert (window.slots[:, KEY] > 0).all()
    assert (window.slots[:, KEY] < HIDDEN).all()
