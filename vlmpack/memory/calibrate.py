"""Learn at run time what batches really need: recursive least squares, and a margin with a stated risk.

    predicted = theta . features        theta starts at the formula's values and follows the measurements
    upper     = predicted * margin      margin: a high quantile of measured / predicted, steered so that
                                        the share of batches over `upper` becomes alpha

A batch that failed is an observation too, a censored one: it needed at least what it failed at.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from vlmpack.memory.linear_cost import LinearCost

PRIOR_SPREAD: Final = 0.6
"""Standard deviation of a coefficient at the start, relative to its value."""
FORGETTING: Final = 0.995
"""Weight of an observation relative to the next one: the last 200 count."""
NOISE: Final = 0.01
"""Standard deviation of a measurement, relative to its value."""


@dataclass(slots=True)
class RecursiveCalibrator:
    """Recursive least squares on a linear cost's coefficients, with the formula as prior.

    Each observation is scaled by its own size, so that errors are relative and large batches do not drown
    small ones. O(k^2) for k features.

    Args:
        cost: The formula; its static part stays as it is.
        spread: Standard deviation of each coefficient at the start, relative to its value.
        forgetting: Weight of an observation relative to the next one, in (0, 1].

    Raises:
        ConfigError: If a number is out of its range.
    """

    cost: LinearCost
    spread: float = PRIOR_SPREAD
    forgetting: float = FORGETTING
    theta: npt.NDArray[np.float64] = field(init=False)
    """float64 [k] bytes of each feature, as far as known."""
    covariance: npt.NDArray[np.float64] = field(init=False)
    """float64 [k, k] of theta."""
    num_observations: int = field(init=False, default=0)
    """Batches that were measured."""

    def __post_init__(self) -> None:
        if not 0 < self.forgetting <= 1 or self.spread <= 0:
            raise ConfigError(
                f"forgetting in (0, 1] and spread > 0 are needed, got {self.forgetting}, {self.spread}"
            )
        self.theta = np.array(self.cost.theta, np.float64)
        # a coefficient of 0 may be learned as well: it gets the smallest other one's spread
        scale = np.where(self.theta > 0, self.theta, self.theta[self.theta > 0].min(initial=1.0))
        self.covariance = np.diag((self.spread * scale) ** 2)

    def predict(self, counts: Mapping[str, float]) -> float:
        """Return the bytes that a batch is expected to need."""
        return self.cost.static_bytes + float(self.theta @ np.array(self.cost.vector(counts)))

    def observe(self, counts: Mapping[str, float], actual_bytes: float) -> None:
        """Learn from one measured batch.

        Args:
            counts: Its features.
            actual_bytes: What it needed, the static part included.

        Raises:
            ConfigError: If the measurement is no positive number.
        """
        if not math.isfinite(actual_bytes) or actual_bytes <= 0:
            raise ConfigError(f"a measurement must be a positive number of bytes, got {actual_bytes!r}")
        phi = np.array(self.cost.vector(counts))
        noise = (NOISE * actual_bytes) ** 2
        spread = self.covariance @ phi
        gain = spread / (self.forgetting * noise + phi @ spread)
        self.theta = self.theta + gain * (actual_bytes - self.predict(counts))
        updated = (self.covariance - np.outer(gain, spread)) / self.forgetting
        self.covariance = (updated + updated.T) / 2
        self.num_observations += 1

    def state_dict(self) -> dict[str, object]:
        """Return what resuming needs: plain lists and numbers."""
        return {
            "theta": self.theta.tolist(),
            "covariance": self.covariance.tolist(),
            "num_observations": self.num_observations,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict`.

        Raises:
            ConfigError: If it is of another cost.
        """
        theta = np.array(state["theta"], np.float64)
        if theta.shape != self.theta.shape:
            raise ConfigError(
                f"the state has {theta.size} coefficients, {self.cost.name} has {self.theta.size}"
            )
        self.theta = theta
        self.covariance = np.array(state["covariance"], np.float64)
        self.num_observations = int(str(state["num_observations"]))


@dataclass(slots=True)
class ConformalMargin:
    """The factor on a prediction that measured values exceed with probability alpha.

    The factor is the (1 - a) quantile of the last measured / predicted ratios, and a is steered: every
    failure lowers it by `rate * (1 - alpha)`, every success raises it by `rate * alpha`, so that the long-run
    share of failures is alpha whatever the distribution (adaptive conformal inference, Gibbs and Candes
    2021). Below the window's resolution the largest ratio is stretched.

    Args:
        alpha: Wanted share of batches above the margin, in (0, 0.5).
        window: Ratios that are remembered; at least 2 / alpha are.
        rate: How fast it is steered, as a multiple of alpha.
        initial: The factor before there are ratios.

    Raises:
        ConfigError: If alpha is out of its range.
    """

    alpha: float = 0.01
    window: int = 200
    rate: float = 0.5
    initial: float = 1.1
    level: float = field(init=False)
    """The quantile's complement as steered; may leave [0, 1]."""
    ratios: deque[float] = field(init=False)
    """The last measured / predicted ratios."""
    factor: float = field(init=False)
    """What a prediction is multiplied by."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"alpha is a share of failures in (0, 0.5), got {self.alpha}")
        self.level = self.alpha
        self.ratios = deque(maxlen=max(self.window, math.ceil(2 / self.alpha)))
        self.factor = self.initial

    def observe(self, ratio: float, *, failed: bool = False) -> None:
        """Learn from one batch: its measured / predicted ratio, and whether it was over its limit."""
        step = self.rate * self.alpha
        self.level += step * (self.alpha - 1 if failed else self.alpha)
        self.ratios.append(ratio)
        self.factor = quantile_factor(self.ratios, self.level)

    def state_dict(self) -> dict[str, object]:
        """Return what resuming needs."""
        return {"level": self.level, "ratios": list(self.ratios)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict`."""
        self.level = float(str(state["level"]))
        self.ratios.clear()
        ratios = state["ratios"]
        assert isinstance(ratios, list)
        self.ratios.extend(ratios)
        self.factor = quantile_factor(self.ratios, self.level) if self.ratios else self.initial


def quantile_factor(ratios: Sequence[float] | deque[float], level: float) -> float:
    """Return the (1 - level) quantile of the ratios; beyond the largest it grows with the gap to the median.

    Args:
        ratios: Measured / predicted, at least one.
        level: Complement of the quantile; below 1 / (n + 1) the largest ratio is not enough.
    """
    ordered = sorted(ratios)
    n = len(ordered)
    rank = (1 - level) * (n + 1)
    if rank <= 1:
        return ordered[0]
    if rank >= n:
        median, largest = ordered[n // 2], ordered[-1]
        return largest + (rank - n) * max(largest - median, 0.001)
    low = int(rank)
    return ordered[low - 1] + (rank - low) * (ordered[low] - ordered[low - 1])


KNOWN: Final = 0.02
"""Relative uncertainty of a prediction below which its ratio tells of the batches and not of the formula."""


@dataclass(slots=True)
class CalibratedCost:
    """A formula that learns: expected bytes, and an upper bound that fails with probability alpha.

    Until the coefficients are known well, twice their uncertainty is added; ratios from that time are not
    put into the margin's window, where they would stay for hundreds of batches.

    Args:
        cost: The formula to start from.
        alpha: Wanted share of batches over the upper bound.
        spread: Standard deviation of the formula's coefficients, relative to their values.
    """

    cost: LinearCost
    alpha: float = 0.01
    spread: float = PRIOR_SPREAD
    calibrator: RecursiveCalibrator = field(init=False)
    """Follows the coefficients."""
    margin: ConformalMargin = field(init=False)
    """Follows what is left."""
    num_failures: int = field(init=False, default=0)
    """Batches that did not fit."""

    def __post_init__(self) -> None:
        self.calibrator = RecursiveCalibrator(cost=self.cost, spread=self.spread)
        self.margin = ConformalMargin(alpha=self.alpha)

    def predict(self, counts: Mapping[str, float]) -> float:
        """Return the bytes that a batch is expected to need."""
        return self.calibrator.predict(counts)

    def uncertainty(self, counts: Mapping[str, float]) -> float:
        """Return the relative standard deviation of a prediction that comes from the coefficients."""
        phi = np.array(self.cost.vector(counts))
        deviation = math.sqrt(max(0.0, float(phi @ self.calibrator.covariance @ phi)))
        return deviation / max(self.predict(counts), 1.0)

    def upper(self, counts: Mapping[str, float]) -> float:
        """Return the bytes that a batch needs at most, but for a share of alpha of all batches."""
        return self.predict(counts) * max(self.margin.factor, 1 + 2 * self.uncertainty(counts))

    def observe(self, counts: Mapping[str, float], actual_bytes: float, *, part: bool = False) -> None:
        """Learn from a batch that ran.

        Args:
            counts: Its features.
            actual_bytes: What it needed.
            part: It is a part of a batch that failed, far from the limit: it teaches the coefficients, but
                is no success that would pay for the failure.
        """
        if not part and self.uncertainty(counts) < KNOWN:
            self.margin.observe(actual_bytes / self.predict(counts))
        self.calibrator.observe(counts, actual_bytes)

    def observe_failure(self, counts: Mapping[str, float], limit_bytes: float) -> None:
        """Learn from a batch that ran out of memory: it needed more than the limit, nobody knows how much.

        Its parts, when they have run, are observed with `part=True`.

        Args:
            counts: Its features.
            limit_bytes: What there was.
        """
        self.num_failures += 1
        predicted = self.predict(counts)
        ratio = max(limit_bytes / predicted, self.margin.factor)
        if self.uncertainty(counts) < KNOWN:
            self.margin.observe(ratio, failed=True)
        elif limit_bytes > predicted:
            self.calibrator.observe(counts, limit_bytes)

    def state_dict(self) -> dict[str, object]:
        """Return what resuming needs: plain lists and numbers."""
        return {
            "calibrator": self.calibrator.state_dict(),
            "margin": self.margin.state_dict(),
            "num_failures": self.num_failures,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict`.

        Raises:
            ConfigError: If it is of another cost.
        """
        calibrator, margin = state.get("calibrator"), state.get("margin")
        if not isinstance(calibrator, dict) or not isinstance(margin, dict):
            raise ConfigError("the state is not one of a CalibratedCost: calibrator and margin are needed")
        self.calibrator.load_state_dict(calibrator)
        self.margin.load_state_dict(margin)
        self.num_failures = int(str(state.get("num_failures", 0)))
