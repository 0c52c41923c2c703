"""Compiling kernels ahead: about 2 seconds once, instead of 2 seconds in each worker of a DataLoader."""

from __future__ import annotations

import numpy as np

from vlmpack.kernels.completion import make_scratch
from vlmpack.kernels.shares import num_entries
from vlmpack.kernels.window import make_window
from vlmpack.kernels.window_fill import window_feed
from vlmpack.kernels.worst_fit_decreasing import worst_fit_decreasing


def warm_up(*, drop_in: bool = False) -> None:
    """Compile what a stream needs. Call it before workers fork; a spawned worker compiles for itself.

    Args:
        drop_in: Also the reference pipeline's worst-fit decreasing.
    """
    cost_NA, budget_A = np.ones((1, 1), np.int64), np.ones(1, np.int64)
    members, ends = np.empty(1, np.int64), np.empty(1, np.int64)
    window, scratch = make_window(1, 1), make_scratch(1, budget_A)
    window_feed(
        *window,
        budget_A,
        1,
        scratch.room,
        scratch.price,
        scratch.trial,
        scratch.pack,
        0,
        1,
        cost_NA,
        0,
        1,
        1,
        members,
        ends,
    )
    if drop_in:
        worst_fit_decreasing(cost_NA, np.zeros(1, np.int64), budget_A, num_entries(1), 1, members)
