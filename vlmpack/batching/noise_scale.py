"""Estimate the gradient noise scale from micro-batches of unequal sizes.

The noise scale tr(Sigma) / |mu|^2 is the step size, in samples, at which noise and signal are equal: steps
far below it can grow for free, steps far above it waste samples (McCandlish et al., "An Empirical Model of
Large-Batch Training", 2018). Their estimator needs two batch sizes; a step that is split by memory has
micro-batches of many. The between-group sum of squares of a one-way layout uses all of them:

    E[ sum_i n_i |g_i|^2  -  N |G|^2 ] = (k - 1) tr(Sigma),        G = sum_i n_i g_i / N
    E[ |G|^2 ]                         = |mu|^2 + tr(Sigma) / N

for micro-batches of n_1 ... n_k samples, N together, with mean gradients g_i. For two equal halves it is
McCandlish's own. Both terms are averaged over steps before they are divided: the quotient of one step has
no expectation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def noise_and_signal(
    sizes: Sequence[float], micro_square_norms: Sequence[float], step_square_norm: float
) -> tuple[float, float]:
    """Return unbiased estimates of tr(Sigma) and |mu|^2 from one step.

    Either can be negative, as an unbiased estimate of a small positive number must.

    Args:
        sizes: Samples of each micro-batch; two or more.
        micro_square_norms: Squared norm of each micro-batch's *mean* gradient.
        step_square_norm: Squared norm of the step's mean gradient.

    Raises:
        ConfigError: If there are fewer than two micro-batches, or the numbers do not fit together.
    """
    if len(sizes) != len(micro_square_norms):
        raise ConfigError(f"{len(sizes)} sizes but {len(micro_square_norms)} norms")
    if len(sizes) < 2:
        raise ConfigError("the noise shows in the difference of micro-batches: a step needs at least two")
    if any(size <= 0 for size in sizes):
        raise ConfigError(f"micro-batches have samples, got {list(sizes)}")
    total = math.fsum(sizes)
    between = math.fsum(size * norm for size, norm in zip(sizes, micro_square_norms, strict=True))
    noise = (between - total * step_square_norm) / (len(sizes) - 1)
    return noise, step_square_norm - noise / total


@dataclass(slots=True, kw_only=True)
class GradientNoiseScale:
    """Averages `noise_and_signal` over steps and gives their quotient.

    Args:
        decay: Of the moving averages; 0.99 remembers about a hundred steps.

    Raises:
        ConfigError: If it is no fraction.
    """

    decay: float = 0.99
    num_steps: int = field(init=False, default=0)
    """Steps that were measured."""
    num_skipped: int = field(init=False, default=0)
    """Steps with one micro-batch, or with a number that is not finite."""
    _noise: float = field(init=False, default=0.0)
    _signal: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay must be a fraction, 0 <= decay < 1, got {self.decay}")

    def update(
        self, sizes: Sequence[float], micro_square_norms: Sequence[float], step_square_norm: float
    ) -> None:
        """Learn from one step; a step that shows no difference is skipped and counted.

        Args:
            sizes: Samples of each micro-batch.
            micro_square_norms: Squared norm of each micro-batch's mean gradient.
            step_square_norm: Squared norm of the step's mean gradient.
        """
        if len(sizes) < 2 or not all(map(math.isfinite, (*micro_square_norms, step_square_norm))):
            self.num_skipped += 1
            return
        noise, signal = noise_and_signal(sizes, micro_square_norms, step_square_norm)
        self._noise = self.decay * self._noise + (1 - self.decay) * noise
        self._signal = self.decay * self._signal + (1 - self.decay) * signal
        self.num_steps += 1

    @property
    def noise_scale(self) -> float | None:
        """The step size in samples at which noise equals signal; infinite where there is only noise.

        None before the first measurement.
        """
        if not self.num_steps:
            return None
        if self._noise <= 0:
            return 0.0
        return self._noise / self._signal if self._signal > 0 else math.inf

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` takes."""
        return {
            "noise": self._noise,
            "signal": self._signal,
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state."""
        self._noise, self._signal = state["noise"], state["signal"]
        self.num_steps, self.num_skipped = int(state["num_steps"]), int(state["num_skipped"])
