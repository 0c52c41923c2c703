"""Slow, obvious versions of the balancing kernels: lists, exact fractions, all counted anew."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST_GAIN = Fraction(1, 10**9)


def rank_loads(loads: Sequence[Sequence[int]], order: Sequence[int], num_ranks: int, batch_size: int) -> list:
    """Return steps of ranks of summed loads: packs are dealt to the ranks one by one, step by step."""
    size = num_ranks * batch_size
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    return [
        [
            [sum(loads[pack][load] for pack in step[rank::num_ranks]) for load in range(len(loads[0]))]
            for rank in range(num_ranks)
        ]
        for step in steps
    ]


def max_over_mean(
    loads: Sequence[Sequence[int]], order: Sequence[int], num_ranks: int, batch_size: int
) -> list:
    """Return steps of max / mean for each load, 1 where there is no load."""
    return [
        [
            Fraction(max(column) * num_ranks, sum(column)) if sum(column) else Fraction(1)
            for column in zip(*ranks, strict=True)
        ]
        for ranks in rank_loads(loads, order, num_ranks, batch_size)
    ]


def objective(
    loads: Sequence[Sequence[int]], order: Sequence[int], num_ranks: int, batch_size: int
) -> Fraction:
    """Return the sum of max / mean over steps and loads."""
    return sum(map(sum, max_over_mean(loads, order, num_ranks, batch_size)), Fraction(0))


def swap_to_balance(
    loads: Sequence[Sequence[int]], order: Sequence[int], num_ranks: int, batch_size: int, reach: int
) -> list[int]:
    """Return the order after swaps: for each pack of a largest rank, the best partner within reach."""
    order, size = list(order), num_ranks * batch_size

    def swapped(slot: int, other: int) -> list[int]:
        changed = list(order)
        changed[slot], changed[other] = order[other], order[slot]
        return changed

    while True:
        has_swapped = False
        for slot in range(len(order)):
            ranks = rank_loads(loads, order, num_ranks, batch_size)[slot // size]
            largest = {column.index(max(column)) for column in (list(c) for c in zip(*ranks, strict=True))}
            if slot % num_ranks not in largest:
                continue
            now = objective(loads, order, num_ranks, batch_size)
            chosen, most = None, Fraction(0)
            for other in range(max(slot - reach, 0), min(slot + reach + 1, len(order))):
                gain = now - objective(loads, swapped(slot, other), num_ranks, batch_size)
                if gain > most + LEAST_GAIN:
                    chosen, most = other, gain
            if chosen is not None:
                order, has_swapped = swapped(slot, chosen), True
        if not has_swapped:
            return order


def split_pairs(
    loads: Sequence[Sequence[int]],
    shares: Sequence[Sequence[int]],
    order: Sequence[int],
    num_ranks: int,
    directions: Sequence[Sequence[int]],
    reach: int,
) -> list[int]:
    """Return the order after pairs of steps, a pack a rank, were split along the best of some directions."""
    steps = [list(order[start : start + num_ranks]) for start in range(0, len(order), num_ranks)]

    def cost(pair: list[list[int]]) -> Fraction:
        return sum((objective(loads, step, num_ranks, 1) for step in pair), Fraction(0))

    while True:
        has_split = False
        for first in range(len(steps)):
            for second in range(first + 1, min(first + reach + 1, len(steps))):
                best = [steps[first], steps[second]]
                packs = best[0] + best[1]
                for direction in directions:
                    along = sorted(
                        packs,
                        key=lambda pack: sum(
                            unit * share for unit, share in zip(direction, shares[pack], strict=True)
                        ),
                    )
                    pair = [along[:num_ranks], along[num_ranks:]]
                    if cost(pair) < cost(best) - LEAST_GAIN:
                        best, has_split = pair, True
                steps[first], steps[second] = best
        if not has_split:
            return [pack for step in steps for pack in step]
