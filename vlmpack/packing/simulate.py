"""Simulate: pack costs alone and count what comes of it. No text, no image, no tokenizer.

    costs [n, 3]  ->  plan, or StreamPacker with a look-ahead  ->  PackingReport, lower bound, speed

What a setting is worth can so be known before a data set is read for its pixels: a million samples take
seconds. The packs are those that `ConstantLengthDataset` and `PackIndex` would make of the same costs.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import numpy as np

from vlmpack.budget import AXES, PackBudget, SampleCost
from vlmpack.errors import ConfigError, SourceError
from vlmpack.geometry import Tiling
from vlmpack.packing.bounds import lower_bounds
from vlmpack.packing.plan import plan
from vlmpack.packing.report import MAX_EXAMPLES, PackingReport
from vlmpack.packing.stream import StreamPacker
from vlmpack.samples import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from vlmpack.packing.engine import Balance
    from vlmpack.packing.inputs import Int64s
    from vlmpack.packing.methods import Method
    from vlmpack.packing.plan import PackPlan

    Floats: TypeAlias = npt.NDArray[np.float64]

T = TypeVar("T")

PATCHES_PER_TILE: Final[int] = Tiling().patches_per_tile
"""1,024: tiles of 512 pixels, patches of 16."""

MAX_COST: Final = 1 << 40
"""A larger cost is an error; sums of so many that memory holds stay in 64 bits."""

_STEP: Final = 1024
"""Samples that are handed to a `StreamPacker` at once while the clock runs."""

_LONG_S: Final = 20.0
"""A plan that took longer is not made a second time to leave out what compiling took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """One packing of a set of costs, by one method with one look-ahead."""

    method: Method
    """What was asked for."""
    chosen: str
    """The algorithm; differs from `method` where that is "auto"."""
    lookahead: int | None
    """Samples that could wait for a pack; None where the whole data set was planned at once."""
    balance: Balance | None
    """What was spread evenly over packs."""
    seconds: float
    """What packing took, without compiling; one thread, a stream in blocks of 1,024 samples."""
    lower_bound: int
    """Packs that any packing of these samples needs: the best bound of `bounds.lower_bounds`."""
    attention_per_pack: tuple[float, int, int]
    """Mean, p95 and maximum over packs of the sum of squared sample lengths, in pairs of tokens."""
    report: PackingReport
    """The counts. Costs know no labels, so `num_supervised` is 0."""

    @property
    def over_bound(self) -> float:
        """Packs over the lower bound, as a share of it; the optimum is over it too, or equal to it."""
        return self.report.num_packs / self.lower_bound - 1

    @property
    def samples_per_second(self) -> float:
        """Samples packed a second."""
        return self.report.num_packed / max(self.seconds, 1e-9)

    @property
    def samples_per_pack(self) -> float:
        """Samples a pack on average."""
        return self.report.num_packed / self.report.num_packs

    @property
    def attention_factor(self) -> float:
        """Attention over whole packs, in multiples of what the samples cost alone.

        Sum of squared pack lengths / sum of squared sample lengths. Isolation is what saves this: where
        each sample attends to itself only, packing costs no attention at all.
        """
        whole = sum(tokens**2 * packs for tokens, packs in self.report.tokens_per_pack.items())
        return whole / self.report.attention

    @property
    def mean_delay(self) -> float | None:
        """Samples that arrived between a sample and its pack, on average; None without a look-ahead."""
        return None if self.lookahead is None else self.report.total_delay / self.report.num_packed

    @property
    def max_delay(self) -> int | None:
        """The longest such wait; None without a look-ahead."""
        return None if self.lookahead is None else self.report.max_delay

    def as_dict(self) -> dict[str, Any]:
        """Return the simulation as plain values that JSON takes, with the derived figures."""
        return {
            "method": self.method,
            "chosen": self.chosen,
            "lookahead": self.lookahead,
            "balance": self.balance,
            "seconds": self.seconds,
            "samples_per_second": self.samples_per_second,
            "lower_bound": self.lower_bound,
            "over_bound": self.over_bound,
            "samples_per_pack": self.samples_per_pack,
            "attention_factor": self.attention_factor,
            "attention_per_pack": dict(zip(("mean", "p95", "max"), self.attention_per_pack, strict=True)),
            "mean_delay": self.mean_delay,
            "max_delay": self.max_delay,
            "report": self.report.as_dict(),
        }


def simulate(
    costs: npt.ArrayLike,
    budget: PackBudget,
    *,
    method: Method = "auto",
    lookahead: int | None = None,
    seed: int = 0,
    balance: Balance | None = None,
    patches_per_tile: int = PATCHES_PER_TILE,
    on_progress: Callable[[float], object] | None = None,
) -> Simulation:
    """Pack costs and count what comes of it. Samples that are over the budget alone are refused, counted.

    The costs are packed twice, and the second time is measured: the first compiles. Counting is O(n log n).

    Args:
        costs: Integers [n, 3]: tokens (at least 1), images and ViT patches of each sample, in the order in
            which they arrive.
        budget: What a pack may hold.
        method: An algorithm of `methods.METHODS`, or "auto".
        lookahead: Samples that may wait for a pack, as in a stream; None plans the whole data set at once.
        seed: Decides the packers' random picks and the order of packs.
        balance: Spread "patches", "attention" or "both" evenly over packs.
        patches_per_tile: For the report's count of tiles.
        on_progress: Called now and then with the share of the work that is done, 0 to 1.

    Raises:
        ConfigError: If a setting or a cost is invalid.
        SourceError: If there is no sample, or none that fits a pack.
    """
    cost_NA = _checked(costs)
    report = PackingReport(budget=budget, num_read=cost_NA.shape[0])
    cost_NA = _refuse_oversized(report, cost_NA)
    if not cost_NA.shape[0]:
        raise SourceError(report.why_nothing())
    say = on_progress or (lambda _: None)
    if lookahead is None:
        made, seconds = _planned(
            partial(plan, cost_NA, budget, method=method, seed=seed, balance=balance), say
        )
        pack_N, chosen = made.pack_ids, made.method
    else:
        packer = partial(StreamPacker, budget, lookahead=lookahead, method=method, seed=seed, balance=balance)
        pack_N, delay_N, seconds = _streamed(packer, cost_NA, say)
        report.total_delay, report.max_delay = int(delay_N.sum()), int(delay_N.max())
        chosen = packer().method
    say(1.0)
    attention_P = _count(report, cost_NA, pack_N)
    report.num_tiles = report.load.num_patches // patches_per_tile
    return Simulation(
        method=method,
        chosen=chosen,
        lookahead=lookahead,
        balance=balance,
        seconds=seconds,
        lower_bound=lower_bounds(cost_NA, budget).best,
        attention_per_pack=_spread(attention_P),
        report=report,
    )


def _checked(costs: npt.ArrayLike) -> Int64s:
    """Return the costs as int64 [n, 3].

    Raises:
        ConfigError: If they are not costs of samples.
    """
    table = np.asarray(costs)
    if not table.size:
        return np.empty((0, len(AXES)), np.int64)
    if table.ndim != 2 or table.shape[1] != len(AXES) or table.dtype.kind not in "iu":
        raise ConfigError(
            f"costs are integers [n, {len(AXES)}] ({', '.join(AXES)}), got {table.dtype} {list(table.shape)}"
        )
    bad = np.flatnonzero((table[:, 0] < 1) | (table < 0).any(axis=1) | (table > MAX_COST).any(axis=1))
    if bad.size:
        raise ConfigError(
            f"sample {bad[0]}: needs at least one token and no cost that is negative or above {MAX_COST:,}, "
            f"got {table[bad[0]].tolist()}"
        )
    return np.ascontiguousarray(table, np.int64)


def _planned(make: Callable[[], PackPlan], say: Callable[[float], object]) -> tuple[PackPlan, float]:
    """Return the plan, and the seconds that it takes without compiling."""
    say(0.0)
    made, seconds = _timed(make)
    if seconds < _LONG_S:
        say(0.5)
        made, seconds = _timed(make)
    return made, seconds


def _streamed(
    packer: Callable[[], StreamPacker], cost_NA: Int64s, say: Callable[[float], object]
) -> tuple[Int64s, Int64s, float]:
    """Pack a stream sample by sample, to see when each pack comes, and once more in blocks, for the time.

    Returns:
        int64 [n], each sample's pack; int64 [n], its delay; the seconds of the second pass.
    """
    packs, emitted = _push(packer(), cost_NA.tolist(), lambda share: say(0.8 * share))
    _push_blocks(packer(), cost_NA[:_STEP])  # compiles what is left to compile
    again, seconds = _timed(lambda: _push_blocks(packer(), cost_NA))
    assert again == packs, "blocks of samples made other packs than samples one by one"
    return (*_arrays(packs, emitted, cost_NA.shape[0]), seconds)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start_s = time.perf_counter()
    made = work()
    return made, time.perf_counter() - start_s


def _refuse_oversized(report: PackingReport, cost_NA: Int64s) -> Int64s:
    """Count the samples that fit no pack, keep the first of them with their numbers, return the others."""
    is_over_N = (cost_NA > report.budget.as_array()).any(axis=1)
    rows = np.flatnonzero(is_over_N)
    for row in rows[:MAX_EXAMPLES].tolist():
        tokens, images, patches = cost_NA[row].tolist()
        excess = report.budget.exceeded_by(
            SampleCost(num_tokens=tokens, num_images=images, num_patches=patches)
        )
        figures = ", ".join(
            f"{used} {axis} where a pack holds {limit}" for axis, (used, limit) in excess.items()
        )
        numbers = {f"num_{axis}": used for axis, (used, _) in excess.items()}
        numbers |= {f"max_{axis}": limit for axis, (_, limit) in excess.items()}
        message = f"{figures}. Raise the limit"
        report.refuse(Refusal(key=str(row), reason="over_budget", message=message, numbers=numbers))
    if rows.size > MAX_EXAMPLES:
        report.num_refused["over_budget"] = int(rows.size)
    return cost_NA[~is_over_N] if rows.size else cost_NA


def _push(
    packer: StreamPacker, costs: list[list[int]], say: Callable[[float], object]
) -> tuple[list[list[int]], list[int]]:
    """Return all packs of a stream, and for each the last sample that had arrived when it was emitted."""
    packs: list[list[int]] = []
    emitted: list[int] = []
    for arrival, cost in enumerate(costs):
        for pack in packer.push(cost):
            packs.append(pack)
            emitted.append(arrival)
        if not arrival % _STEP:
            say(arrival / len(costs))
    rest = packer.flush()
    return packs + rest, emitted + [len(costs) - 1] * len(rest)


def _push_blocks(packer: StreamPacker, cost_NA: Int64s) -> list[list[int]]:
    packs: list[list[int]] = []
    for start in range(0, cost_NA.shape[0], _STEP):
        packs += packer.push_many(cost_NA[start : start + _STEP])
    return packs + packer.flush()


def _arrays(packs: list[list[int]], emitted: list[int], num_samples: int) -> tuple[Int64s, Int64s]:
    """Return int64 [n]: each sample's pack, and how many samples arrived after it until that was emitted."""
    size_P = np.fromiter(map(len, packs), np.int64, len(packs))
    member_N = np.fromiter(chain.from_iterable(packs), np.int64)
    assert np.array_equal(np.sort(member_N), np.arange(num_samples)), "a sample was lost or packed twice"
    pack_N, delay_N = np.empty(num_samples, np.int64), np.empty(num_samples, np.int64)
    pack_N[member_N] = np.repeat(np.arange(len(packs)), size_P)
    delay_N[member_N] = np.repeat(np.array(emitted, np.int64), size_P) - member_N
    return pack_N, delay_N


def _count(report: PackingReport, cost_NA: Int64s, pack_N: Int64s) -> Floats:
    """Count packs as `PackingReport.add_pack` does, all at once; return float64 [P], each one's attention."""
    order = np.argsort(pack_N, kind="stable")
    size_P = np.bincount(pack_N)
    starts = np.cumsum(size_P) - size_P
    load_PA = np.add.reduceat(cost_NA[order], starts, axis=0)
    assert size_P.min() > 0, "a pack is empty"
    assert (load_PA <= report.budget.as_array()).all(), "a pack is over the budget"
    report.num_packed, report.num_packs = cost_NA.shape[0], load_PA.shape[0]
    report.samples_per_pack = _histogram(size_P)
    report.tokens_per_pack, report.patches_per_pack = _histogram(load_PA[:, 0]), _histogram(load_PA[:, 2])
    report.attention = sum(tokens**2 * count for tokens, count in _histogram(cost_NA[:, 0]).items())
    tokens, images, patches = load_PA.sum(axis=0).tolist()
    report.load = SampleCost(num_tokens=tokens, num_images=images, num_patches=patches)
    tokens, images, patches = load_PA.max(axis=0).tolist()
    report.max_load = (tokens, images, patches)
    attention_P: Floats = np.add.reduceat(cost_NA[order, 0].astype(np.float64) ** 2, starts)
    return attention_P


def _spread(number_P: Floats) -> tuple[float, int, int]:
    """Return mean, p95 (the least that at least 95 % do not exceed) and maximum."""
    p95 = np.sort(number_P)[-(-95 * number_P.size // 100) - 1]
    return float(number_P.mean()), int(p95), int(number_P.max())


def _histogram(values: Int64s) -> Counter[int]:
    numbers, counts = np.unique(values, return_counts=True)
    return Counter(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
