"""Slow, obvious versions of the packing kernels: lists and loops over everything, written from the papers.

They share no code with the kernels. Each returns the bin of every sample, so that a property test can ask for
equality and not only for packs that are valid: the invariants alone let a wrong heuristic pass.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from math import gcd, inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Cost = Sequence[int]


def _fits(room: Cost, cost: Cost) -> bool:
    return all(need <= left for need, left in zip(cost, room, strict=True))


def _less(room: Cost, cost: Cost) -> list[int]:
    return [left - need for left, need in zip(room, cost, strict=True)]


def _place_all(
    costs: Sequence[Cost],
    order: Iterable[int],
    rooms: list[list[int]],
    budget: Cost,
    choose: Callable[[list[int], list[list[int]]], int],
) -> list[int]:
    bins = [-1] * len(costs)
    for sample in order:
        able = [bin_id for bin_id, room in enumerate(rooms) if _fits(room, costs[sample])]
        if not able:
            rooms.append(list(budget))
            able = [len(rooms) - 1]
        bins[sample] = choose(able, rooms)
        rooms[bins[sample]] = _less(rooms[bins[sample]], costs[sample])
    return bins


def next_fit(costs: Sequence[Cost], order: Iterable[int], budget: Cost) -> list[int]:
    bins, room, last = [-1] * len(costs), [-1] * len(budget), -1
    for sample in order:
        if last < 0 or not _fits(room, costs[sample]):
            last, room = last + 1, list(budget)
        room = _less(room, costs[sample])
        bins[sample] = last
    return bins


def first_fit(costs: Sequence[Cost], order: Iterable[int], budget: Cost) -> list[int]:
    return _place_all(costs, order, [], budget, lambda able, rooms: able[0])


def best_fit(costs: Sequence[Cost], order: Iterable[int], budget: Cost) -> list[int]:
    return _place_all(costs, order, [], budget, lambda able, rooms: min(able, key=lambda b: (rooms[b][0], b)))


def worst_fit(costs: Sequence[Cost], order: Iterable[int], budget: Cost, num_open: int) -> list[int]:
    rooms = [list(budget) for _ in range(num_open)]
    return _place_all(
        costs, order, rooms, budget, lambda able, rooms: max(able, key=lambda b: (rooms[b][0], -b))
    )


def best_fit_decreasing_one_axis(lengths: Sequence[int], limit: int) -> list[int]:
    """Of several fullest bins the one that got its room last is taken; equal samples in their own order."""
    bins, room, since = [-1] * len(lengths), [], []
    for step, sample in enumerate(sorted(range(len(lengths)), key=lambda s: -lengths[s])):
        able = [bin_id for bin_id, left in enumerate(room) if left >= lengths[sample]]
        if able:
            chosen = min(able, key=lambda b: (room[b], -since[b]))
        else:
            chosen = len(room)
            room.append(limit)
            since.append(-1)
        bins[sample] = chosen
        room[chosen], since[chosen] = room[chosen] - lengths[sample], step
    return bins


def martello_toth(sizes: Sequence[int], limit: int) -> int:
    best = 0
    for least in range(limit // 2 + 1):
        huge = [s for s in sizes if s > limit - least]
        large = [s for s in sizes if limit / 2 < s <= limit - least]
        small = [s for s in sizes if least <= s <= limit / 2]
        excess = sum(small) - (len(large) * limit - sum(large))
        best = max(best, len(huge) + len(large) + max(0, -(-excess // max(limit, 1))))
    return best


def fewest_packs(costs: Sequence[Cost], budget: Cost) -> int:
    """The optimum, by trying every subset of at most ten samples as the next pack."""
    whole = (1 << len(costs)) - 1
    valid = [
        subset
        for subset in range(1, whole + 1)
        if _fits(
            budget, [sum(c[a] for i, c in enumerate(costs) if subset >> i & 1) for a in range(len(budget))]
        )
    ]

    @cache
    def packs(left: int) -> int:
        first = left & -left
        return min((1 + packs(left & ~s) for s in valid if s & first and s & ~left == 0), default=0)

    return packs(whole)


def most_value(sizes: Sequence[Cost], values: Sequence[float], rows: int, columns: int) -> float:
    """The best multiset of kinds that fits into rows x columns, by recursion."""

    @cache
    def best(row: int, column: int) -> float:
        options = [
            value + best(row - height, column - width)
            for (height, width), value in zip(sizes, values, strict=True)
            if height <= row and width <= column and value > 0
        ]
        return max(options, default=0.0)

    return best(rows, columns)


class SlowWindow:
    """The window packer without arrays: every sample of every class is looked at.

    Args:
        budget: Limits; axes of `costs` beyond them are balanced.
        lookahead: Samples that may wait.
        tries: Packs that are tried for each one made.
        seed: Of the random picks.
        num_axes: Length of a cost.
    """

    MISSING, PICKS, FIRST_PICKS, MAX_SCANS, LARGE_FIRST, BALANCE = 2.0, 4, 16, 64, 0.05, 0.05
    GOOD_ENOUGH, REFRESH, BINDING, MAX_CLASSES, SLICES = 0.0004, 256, 0.5, 128, 48

    def __init__(
        self, budget: Cost, lookahead: int, tries: int, seed: int, num_axes: int | None = None
    ) -> None:
        self.budget, self.tries, self.seed, self.lookahead = budget, tries, seed, lookahead
        self.num_axes = num_axes or len(budget)
        self.order = list(range(lookahead))
        self.age: list[int] = []
        self.cost: dict[int, Cost] = {}
        self.arrival: dict[int, int] = {}
        self.rows: dict[int, list[int]] = defaultdict(list)
        self.row_of: dict[int, int] = {}
        self.seen = [0] * self.num_axes
        self.packs, self.fine, self.coarse, self.unit, self.blur = 0, 0, 0, 1 << 62, 0

    def insert(self, cost: Cost, arrival: int) -> None:
        slot = self.order[len(self.age)]
        self.age.append(slot)
        self.cost[slot], self.arrival[slot] = cost, arrival
        self.seen = [total + part for total, part in zip(self.seen, cost, strict=True)]
        self._enlist(slot)

    def next_pack(self) -> list[int]:
        """Take the next pack out; return its arrivals, the oldest first."""
        if self.packs % self.REFRESH == 0:
            self._refresh()
        self._price()
        oldest, best, pack, natural = self.age[0], 2.0 + 1e6 * self.BALANCE, None, 0
        self.random = self._first_random()
        for turn in range(self.tries):
            self.hidden = {oldest}
            goals = list(self.budget) + [int(target) for target in self.targets]
            self.room = _less(goals, self.cost[oldest])
            picked = self._pick(natural + (turn % 2 if natural else min(turn, 1)))
            natural = len(picked) if turn == 0 else natural
            waste, ends = self._complete(min(best, self._waste([])))
            if waste < best or pack is None:
                best, pack = waste, [oldest, *picked, *ends]
            if best <= self.GOOD_ENOUGH:
                break
        for slot in pack:
            self._remove(slot)
        self.packs += 1
        return [self.arrival[slot] for slot in pack]

    def _total(self, axis: int) -> int:
        return sum(self.cost[slot][axis] for slot in self.age)

    def _enlist(self, slot: int) -> None:
        self.row_of[slot] = self.cost[slot][self.coarse] // self.unit
        if self.cost[slot][self.coarse] % self.unit:
            self.blur = 2 * (self.unit - 1)
        self.rows[self.row_of[slot]].append(slot)

    def _remove(self, slot: int) -> None:
        row = self.rows[self.row_of[slot]]
        row[row.index(slot)] = row[-1]
        row.pop()
        place, last = self.order.index(slot), len(self.age) - 1
        self.order[place], self.order[last] = self.order[last], slot
        self.age.remove(slot)

    def _refresh(self) -> None:
        needs = [self._total(axis) / max(limit, 1) for axis, limit in enumerate(self.budget)]
        first, *others = sorted(range(len(needs)), key=lambda axis: -needs[axis])
        second = others[0] if others and needs[others[0]] >= self.BINDING * needs[first] else first
        step = {axis: max(gcd(*(self.cost[slot][axis] for slot in self.age)), 1) for axis in (first, second)}
        if self.budget[first] // step[first] < self.budget[second] // step[second]:
            first, second = second, first
        unit = step[second]
        if first == second or self.budget[second] // unit >= self.MAX_CLASSES:
            unit = max(self.budget[second] // self.SLICES + 1, unit)
        changed = (self.fine, self.coarse, self.unit) != (first, second, unit)
        self.fine, self.coarse, self.unit, self.blur = first, second, unit, 2 * (unit - step[second])
        if changed:
            self.rows.clear()
            for slot in self.order[: len(self.age)]:
                self._enlist(slot)

    def _price(self) -> None:
        inverse = [1.0 / max(limit, 1) for limit in self.budget]
        needs = [self._total(axis) * one for axis, one in enumerate(inverse)]
        needed = max(total * one for total, one in zip(self.seen, inverse, strict=False))
        scale = 1.0 / max(needs)
        powers = []
        for need in needs:
            power = need * scale
            for _ in range(4):
                power *= power
            powers.append(power)
        total = 0.0
        for power in powers:
            total += power
        scale = 1.0 / total
        self.targets = [self.seen[axis] / needed for axis in range(len(self.budget), self.num_axes)]
        self.weights = [power * one * scale for power, one in zip(powers, inverse, strict=True)]
        self.weights += [self.BALANCE / max(target, 1.0) for target in self.targets]

    def _first_random(self) -> int:
        mask = 2**31 - 1
        state = ((self.seed & mask) * 1103515245 + 12345) & mask
        state = ((state ^ (self.packs & mask)) * 1664525 + 1013904223) & mask
        state = ((state ^ (state >> 15)) * 48271) & mask
        return self._after(state | 1)

    @staticmethod
    def _after(state: int) -> int:
        state ^= (state << 13) % 2**31
        state ^= state >> 17
        return state ^ ((state << 5) % 2**31)

    def _pick(self, at_least: int) -> list[int]:
        count, picked = len(self.age), []
        shares = [count / max(self._total(axis), 1) for axis in (self.fine, self.coarse)]
        while len(picked) + 1 < count:
            left = [
                self.room[axis] * share for axis, share in zip((self.fine, self.coarse), shares, strict=True)
            ]
            if len(picked) >= at_least and min(left) <= self.MISSING:
                break
            many = not picked and self.fine == self.coarse
            chosen, least = None, inf
            for _ in range(self.FIRST_PICKS if many else self.PICKS):
                self.random = self._after(self.random)
                slot = self.order[self.random * count // 2**31]
                cost = self.cost[slot]
                if slot in self.hidden or not _fits(self.room[: len(self.budget)], cost[: len(self.budget)]):
                    continue
                rest = [
                    (self.room[axis] - cost[axis]) * share
                    for axis, share in zip((self.fine, self.coarse), shares, strict=True)
                ]
                skew = abs(rest[0] - rest[1]) - self.LARGE_FIRST * (cost[self.fine] * shares[0])
                if skew < least:
                    chosen, least = slot, skew
            if chosen is None:
                break
            picked.append(chosen)
            self.hidden.add(chosen)
            self.room = _less(self.room, self.cost[chosen])
        return picked

    def _waste(self, slots: list[int]) -> float:
        waste = 0.0
        for axis, weight in enumerate(self.weights):
            left = self.room[axis] - sum(self.cost[slot][axis] for slot in slots)
            if left < 0 and axis < len(self.budget):
                return inf
            waste += weight * abs(left)
        return waste

    def _largest(self, row: int, room: int, without: int = -1) -> int | None:
        able = [
            (self.cost[slot][self.fine], slot)
            for slot in self.rows.get(row, ())
            if slot not in self.hidden and slot != without and self.cost[slot][self.fine] <= room
        ]
        return max(able)[1] if able else None

    def _complete(self, best: float) -> tuple[float, list[int]]:
        """Look at class sums from the fullest down, as long as scans are left and the sum can still win."""
        room, space, self.scans, ends = self.room[self.fine], self.room[self.coarse], self.MAX_SCANS, []
        for total in range(space // self.unit, -1, -1):
            if self.weights[self.coarse] * max(0, space - total * self.unit - self.blur) >= best:
                break
            slot = self._largest(total, room)
            if slot is not None and self._waste([slot]) < best:
                best, ends = self._waste([slot]), [slot]
            if best > self.GOOD_ENOUGH:
                best, ends = self._best_pair(total, room, best, ends)
            if best <= self.GOOD_ENOUGH or self.scans <= 0:
                break
        return best, ends

    def _best_pair(self, total: int, room: int, best: float, ends: list[int]) -> tuple[float, list[int]]:
        """Look at pairs of classes, the most unequal first, and at each sample of the smaller class."""
        for low in range(total // 2 + 1):
            pair = (low, total - low)
            least = {row: self._smallest(row) for row in pair}
            if least[pair[0]] + least[pair[1]] > room:
                continue
            few, many = sorted(pair, key=lambda row: len(self.rows[row]))
            for first in self.rows[few]:
                rest = room - self.cost[first][self.fine]
                if first in self.hidden or rest < least[many]:
                    continue
                self.scans -= 1
                second = self._largest(many, rest, first)
                if second is not None and self._waste([first, second]) < best:
                    best, ends = self._waste([first, second]), [first, second]
                if best <= self.GOOD_ENOUGH or self.scans <= 0:
                    return best, ends
        return best, ends

    def _smallest(self, row: int) -> float:
        """Return the least fine cost in a row; a sample counts even while it is hidden."""
        return min((self.cost[slot][self.fine] for slot in self.rows.get(row, ())), default=inf)


def task_batches(
    costs: Sequence[int],
    tasks: Sequence[str],
    *,
    fixed: int,
    limit: int,
    max_batch: int,
    weight: float,
    legacy: bool,
) -> list[list[int]]:
    """The reference document's construct_batch, every candidate scored for every place of every batch.

    Where the corrected priority ties within a task (a weight of 1 leaves diversity alone), the costlier
    sample comes first; ties between tasks, and all of the documented one, go to the lowest position.
    """
    left = list(range(len(costs)))
    batches: list[list[int]] = []
    while left:
        batch: list[int] = []
        while len(batch) < max_batch:
            used = fixed + sum(costs[index] for index in batch)
            counts = [tasks[index] for index in batch]
            most = max((counts.count(task) for task in counts), default=0)
            scored = []
            able = left
            if not legacy:
                able = [
                    max(
                        (index for index in left if tasks[index] == task and used + costs[index] <= limit),
                        key=lambda index: (costs[index], -index),
                        default=-1,
                    )
                    for task in set(tasks)
                ]
            for index in able:
                if index >= 0 and used + costs[index] <= limit:
                    diversity = 1.0 - counts.count(tasks[index]) / most if most else 1.0
                    fit = ((limit - used) if legacy else (used + costs[index])) / limit
                    scored.append(((1.0 - weight) * fit + weight * diversity, -index))
            if not scored:
                break
            chosen = -max(scored)[1]
            batch.append(chosen)
            left.remove(chosen)
        batches.append(batch)
    return batches
