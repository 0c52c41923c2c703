"""Worlds in which a predictor has to earn its keep: memory behaves by a function that it cannot see.

Each world has its own coefficients, 30 % off the formula in either direction, one per cent of noise, and in
two of a hundred batches a bump of up to five per cent, as fragmentation makes them. A batch is filled with
random samples until the predictor's upper bound is reached; over the budget it fails and runs in two halves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vlmpack.memory.calibrate import CalibratedCost
from vlmpack.memory.linear_cost import LinearCost

if TYPE_CHECKING:
    import numpy.typing as npt

BUDGET = 40e9
FORMULA = LinearCost(
    name="formula",
    features=("batch", "small", "middle", "large"),
    theta=(6e9, 0.105e9, 0.27e9, 0.51e9),
)


@dataclass
class World:
    """One hidden memory function; `needs` is all that a predictor may learn of it."""

    seed: int
    rng: np.random.Generator = field(init=False)
    _theta: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        off = 1 + self.rng.choice([-0.3, 0.3], len(FORMULA.theta))
        self._theta = np.array(FORMULA.theta) * off

    def needs(self, counts: dict[str, float]) -> float:
        """Return what a batch takes this time."""
        size = float(self._theta @ np.array(FORMULA.vector(counts)))
        size *= 1 + 0.01 * self.rng.standard_normal()
        if self.rng.random() < 0.02:
            size *= 1 + 0.05 * self.rng.random()
        return size

    def sample(self) -> str:
        """Return the kind of the next sample."""
        return FORMULA.features[1 + int(self.rng.integers(3))]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a predictor did in one world, after its warm-up."""

    failure_rate: float
    """Share of batches over the budget."""
    utilisation: float
    """Mean share of the budget that batches took."""
    error_from_30: float
    """Mean relative error of predictions from the 30th batch on."""
    error_from_100: float
    """Mean relative error of predictions from the 100th batch on."""


def filled_batch(world: World, predictor: CalibratedCost) -> dict[str, float]:
    """Return the largest batch of random samples whose upper bound keeps to the budget."""
    counts: dict[str, float] = {"batch": 1.0}
    while True:
        kind = world.sample()
        more = {**counts, kind: counts.get(kind, 0.0) + 1}
        if predictor.upper(more) > BUDGET:
            return counts
        counts = more


def halves(counts: dict[str, float]) -> list[dict[str, float]]:
    """Return the two parts in which a failed batch is run."""
    kinds = {kind: number for kind, number in counts.items() if kind != "batch"}
    first = {kind: float(number // 2) for kind, number in kinds.items()}
    second = {kind: number - first[kind] for kind, number in kinds.items()}
    return [{"batch": 1.0, **part} for part in (first, second)]


def live(seed: int, alpha: float, *, batches: int = 1100, warm_up: int = 100) -> Outcome:
    """Run a calibrated cost in one world."""
    world, predictor = World(seed), CalibratedCost(cost=FORMULA, alpha=alpha)
    failures, used = 0, []
    errors: list[float] = []
    for number in range(batches):
        counts = filled_batch(world, predictor)
        predicted, actual = predictor.predict(counts), world.needs(counts)
        errors.append(abs(predicted / actual - 1))
        failed = actual > BUDGET
        if failed:
            predictor.observe_failure(counts, BUDGET)
            for part in halves(counts):
                predictor.observe(part, world.needs(part), part=True)
        else:
            predictor.observe(counts, actual)
        if number >= warm_up:
            failures += failed
            if not failed:
                used.append(actual / BUDGET)
    return Outcome(
        failure_rate=failures / (batches - warm_up),
        utilisation=float(np.mean(used)),
        error_from_30=float(np.mean(errors[30:])),
        error_from_100=float(np.mean(errors[100:])),
    )


def table(alphas: tuple[float, ...] = (0.05, 0.01, 0.002), worlds: int = 30) -> list[str]:
    """Return the outcomes of many worlds as a Markdown table."""
    lines = [
        "| alpha | failures, mean | worst world | utilisation | error from batch 30 | from batch 100 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for alpha in alphas:
        outcomes = [live(seed, alpha) for seed in range(worlds)]
        rates = [outcome.failure_rate for outcome in outcomes]
        lines.append(
            f"| {100 * alpha:g} % | {100 * np.mean(rates):.2f} % | {100 * max(rates):.2f} % "
            f"| {100 * np.mean([o.utilisation for o in outcomes]):.1f} % "
            f"| {100 * np.mean([o.error_from_30 for o in outcomes]):.2f} % "
            f"| {100 * np.mean([o.error_from_100 for o in outcomes]):.2f} % |"
        )
    return lines
