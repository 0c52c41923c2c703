"""The packing algorithms as numba kernels: arrays in, arrays out; numpy and numba only.

| kernel | what it is | time |
|---|---|---|
| `window_fill`, `window_feed` | the vector packer over a look-ahead window: the default | O(n) |
| `best_fit_decreasing_one_axis` | best fit, longest first, where one axis binds alone | O(n + limit) |
| `first_fit`, `best_fit` | the textbook algorithms on any number of axes | about O(n log n) |
| `worst_fit_decreasing` | even loads: the reference's "balanced greedy knapsack" | about O(n log n) |
| `next_fit` | no look-ahead at all | O(n) |
| `best_fit_tasks`, `first_position_tasks` | batches of mixed tasks by priority | O(n tasks log n) |
| `split_pairs`, `swap_to_balance` | packs into steps whose ranks carry alike loads | O(n) sweeps |
"""

from vlmpack.kernels.balance_splits import split_pairs
from vlmpack.kernels.balance_swaps import swap_to_balance
from vlmpack.kernels.best_fit import best_fit
from vlmpack.kernels.best_fit_decreasing_one_axis import (
    best_fit_decreasing_one_axis,
    place_loads,
    take_places,
)
from vlmpack.kernels.first_fit import first_fit
from vlmpack.kernels.next_fit import next_fit
from vlmpack.kernels.task_batches import best_fit_tasks, first_position_tasks
from vlmpack.kernels.warm import warm_up
from vlmpack.kernels.window_fill import window_feed, window_fill
from vlmpack.kernels.worst_fit_decreasing import worst_fit_decreasing

__all__ = [
    "best_fit",
    "best_fit_decreasing_one_axis",
    "best_fit_tasks",
    "first_fit",
    "first_position_tasks",
    "next_fit",
    "place_loads",
    "split_pairs",
    "swap_to_balance",
    "take_places",
    "warm_up",
    "window_feed",
    "window_fill",
    "worst_fit_decreasing",
]
