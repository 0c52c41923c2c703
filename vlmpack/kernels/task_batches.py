"""Batches of mixed tasks under a memory limit, by priority. O(tasks x log N) a sample instead of O(N).

A batch takes, again and again, the sample of the highest priority that fits. Within a task the priority
orders samples in a way that is known beforehand, so each task offers one candidate:

    best_fit_tasks      the costliest sample that fits (the fuller the better): binary search by cost, then
                        the nearest one left at or below, by a union-find over places already taken
    first_position_tasks   every sample of a task ties (the reference document's formula), so the lowest
                        position that fits: a tree of the least cost over positions

Shapes: N samples sorted by task and within it by cost or position, T tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]


@njit(nogil=True)
def nearest_left(below_N: Int64s, place: int, first: int) -> int:
    """Return the highest place at or below `place` that is not taken, or one below `first`.

    Args:
        below_N: int64 [N + 1], shifted by one: entry p + 1 is p where p is not taken, else a place below.
        place: Where to begin.
        first: First place of the task.
    """
    found = place
    while found >= first and below_N[found + 1] != found:
        found = below_N[found + 1]
    while place >= first and below_N[place + 1] != place:  # shorten the path for the next search
        following = below_N[place + 1]
        below_N[place + 1] = max(found, first - 1)
        place = following
    return max(found, first - 1)


@njit(nogil=True)
def best_fit_tasks(
    cost_N: Int64s,
    position_N: Int64s,
    start_T: Int64s,
    fixed: int,
    limit: int,
    max_batch: int,
    weight: float,
    member_N: Int64s,
    end_N: Int64s,
) -> int:
    """Write the samples batch by batch into `member_N`, the batches' ends into `end_N`; return their number.

    priority = (1 - weight) * (used + cost) / limit + weight * (1 - count of the task / largest count)

    Args:
        cost_N: int64 [N], ascending within each task; every one fits alone.
        position_N: int64 [N], what each is called, descending among equal costs. Ties between tasks go to the
            lowest; within a task the costlier one comes first, also where `weight` is 1.
        start_T: int64 [T + 1], where each task begins.
        fixed: What a batch costs whatever it holds.
        limit: What it may cost.
        max_batch: Samples of a batch at most.
        weight: Of diversity, 0 to 1.
        member_N: int64 [N], the output: places in `cost_N`.
        end_N: int64 [N], the output.
    """
    num_tasks, num = start_T.shape[0] - 1, cost_N.shape[0]
    below_N = np.arange(-1, num)
    count_T = np.zeros(num_tasks, np.int64)
    placed, batches = 0, 0
    while placed < num:
        used, size, most = fixed, 0, 0
        count_T[:] = 0
        while size < max_batch:
            chosen, best, of_task = -1, -1.0, -1
            for task in range(num_tasks):
                first = start_T[task]
                low, high = first, start_T[task + 1]
                room = limit - used
                while low < high:  # the first place that costs more than the room
                    middle = (low + high) // 2
                    if cost_N[middle] <= room:
                        low = middle + 1
                    else:
                        high = middle
                place = nearest_left(below_N, low - 1, first)
                if place < first:
                    continue
                diversity = 1.0 if most == 0 else 1.0 - count_T[task] / most
                fit = (used + cost_N[place]) / limit
                priority = (1.0 - weight) * fit + weight * diversity
                tie = priority == best and position_N[place] < position_N[chosen]
                if chosen < 0 or priority > best or tie:
                    chosen, best, of_task = place, priority, task
            if chosen < 0:
                break
            below_N[chosen + 1] = chosen - 1
            used += cost_N[chosen]
            count_T[of_task] += 1
            most = max(most, count_T[of_task])
            member_N[placed] = chosen
            placed += 1
            size += 1
        end_N[batches] = placed
        batches += 1
    return batches


@njit(nogil=True)
def lowest_fitting(least: Int64s, leaves: int, room: int) -> int:
    """Return the lowest leaf that costs at most `room`, or -1.

    Args:
        least: int64 [2 * leaves], a tree of minima; the leaves are its second half.
        leaves: A power of two.
        room: What it may cost.
    """
    if least[1] > room:
        return -1
    node = 1
    while node < leaves:
        node *= 2
        if least[node] > room:
            node += 1
    return node - leaves


@njit(nogil=True)
def first_position_tasks(
    cost_N: Int64s,
    position_N: Int64s,
    start_T: Int64s,
    fixed: int,
    limit: int,
    max_batch: int,
    weight: float,
    member_N: Int64s,
    end_N: Int64s,
) -> int:
    """The reference document's rule; arguments and result as in `best_fit_tasks`.

    priority = (1 - weight) * (limit - used) / limit + weight * (1 - count of the task / largest count)

    The first term is the same for every candidate. An empty batch has no largest count: diversity is 1.

    Args:
        cost_N: int64 [N], by position within each task; every one fits alone.
        position_N: int64 [N], ascending within each task; ties go to the lowest.
        start_T: int64 [T + 1], where each task begins.
        fixed: What a batch costs whatever it holds.
        limit: What it may cost.
        max_batch: Samples of a batch at most.
        weight: Of diversity, 0 to 1.
        member_N: int64 [N], the output: places in `cost_N`.
        end_N: int64 [N], the output.
    """
    num_tasks, num = start_T.shape[0] - 1, cost_N.shape[0]
    taken = np.int64(1) << 62
    leaves_T = np.ones(num_tasks, np.int64)
    root_T = np.zeros(num_tasks + 1, np.int64)
    for task in range(num_tasks):
        while leaves_T[task] < start_T[task + 1] - start_T[task]:
            leaves_T[task] *= 2
        root_T[task + 1] = root_T[task] + 2 * leaves_T[task]
    least = np.full(root_T[num_tasks], taken, np.int64)
    for task in range(num_tasks):
        tree = least[root_T[task] : root_T[task + 1]]
        for place in range(start_T[task], start_T[task + 1]):
            tree[leaves_T[task] + place - start_T[task]] = cost_N[place]
        for node in range(leaves_T[task] - 1, 0, -1):
            tree[node] = min(tree[2 * node], tree[2 * node + 1])
    count_T = np.zeros(num_tasks, np.int64)
    placed, batches = 0, 0
    while placed < num:
        used, size, most = fixed, 0, 0
        count_T[:] = 0
        while size < max_batch:
            chosen, best, of_task = -1, -1.0, -1
            for task in range(num_tasks):
                tree = least[root_T[task] : root_T[task + 1]]
                leaf = lowest_fitting(tree, leaves_T[task], limit - used)
                if leaf < 0:
                    continue
                place = start_T[task] + leaf
                diversity = 1.0 if most == 0 else 1.0 - count_T[task] / most
                fit = (limit - used) / limit
                priority = (1.0 - weight) * fit + weight * diversity
                tie = priority == best and position_N[place] < position_N[chosen]
                if chosen < 0 or priority > best or tie:
                    chosen, best, of_task = place, priority, task
            if chosen < 0:
                break
            tree = least[root_T[of_task] : root_T[of_task + 1]]
            node = leaves_T[of_task] + chosen - start_T[of_task]
            tree[node] = taken
            while node > 1:
                node //= 2
                tree[node] = min(tree[2 * node], tree[2 * node + 1])
            used += cost_N[chosen]
            count_T[of_task] += 1
            most = max(most, count_T[of_task])
            member_N[placed] = chosen
            placed += 1
            size += 1
        end_N[batches] = placed
        batches += 1
    return batches
