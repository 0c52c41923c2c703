"""Gradient surgery: what each task's gradient counts, from the angles between them.

Both methods need the products of the tasks' gradients only, g_i . g_j, not the gradients: T x T numbers, the
Gramian. They are taken over the *whole step*, so that no split of the step changes the outcome; projecting
within each micro-batch, as is usual, depends on the split. The order in which a task meets the others is
drawn from the seed and the number of the step, not from a global state, so that a resumed run draws the same.

`PCGrad` is torchjd's, on the Gramian and with the order drawn as above. `GradVac` is our own: torchjd's takes
a zero gradient for a gradient at right angles, so that the targets of a task that is absent from a step
decay, it forgets all targets when the number of tasks changes, and its targets are no part of a saved state.
Where every task is present both agree, which a test checks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class GradientSurgery(Protocol):
    """Turns a Gramian into what each task's gradient counts."""

    def coefficients(self, gramian: torch.Tensor, tasks: Sequence[str], step: int) -> torch.Tensor:
        """Return c, so that the update is sum_t c_t g_t.

        Args:
            gramian: float64 [T, T] of the tasks that are present.
            tasks: Their names, in the order of the Gramian.
            step: The number of the step; decides the order.
        """
        ...


class PCGrad:
    """Takes out of each task's gradient what points against another task's (Yu et al., NeurIPS 2020).

    Args:
        seed: Decides, with the step, in which order a task meets the others.

    Raises:
        ConfigError: If torchjd is not installed.
    """

    def __init__(self, *, seed: int = 0) -> None:
        try:
            from torchjd.aggregation import PCGradWeighting
        except ModuleNotFoundError as error:
            raise ConfigError("PCGrad needs torchjd: pip install 'vlmpack[balance]'") from error
        self.seed = seed
        self._weighting = PCGradWeighting()

    def coefficients(self, gramian: torch.Tensor, tasks: Sequence[str], step: int) -> torch.Tensor:
        """Return what each task's gradient counts.

        Args:
            gramian: float64 [T, T].
            tasks: T names.
            step: The number of the step.

        Raises:
            ConfigError: If the Gramian does not fit the tasks.
        """
        _check(gramian, tasks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_order_seed(self.seed, step))
            weights: torch.Tensor = self._weighting(gramian)
        return weights


class GradVac:
    """Turns each task's gradient towards the others' until their cosine is what it has been on average.

    Where gradients of two tasks are less similar than their running target, the first one gets a part of the
    second one (Wang et al., "Gradient Vaccine", ICLR 2021, eq. 6). A target of 0, as at the first step,
    makes it PCGrad.

    Args:
        beta: Share of the latest cosine in the running target.
        seed: Decides, with the step, in which order a task meets the others.

    Raises:
        ConfigError: If beta is no fraction.
    """

    def __init__(self, *, beta: float = 1e-2, seed: int = 0) -> None:
        if not 0 <= beta <= 1:
            raise ConfigError(f"beta must be a fraction, 0 <= beta <= 1, got {beta}")
        self.beta = beta
        self.seed = seed
        self._targets: dict[tuple[str, str], float] = {}

    def coefficients(self, gramian: torch.Tensor, tasks: Sequence[str], step: int) -> torch.Tensor:
        """Return what each task's gradient counts, and move the targets of the tasks that are present.

        Args:
            gramian: float64 [T, T].
            tasks: T names.
            step: The number of the step.

        Raises:
            ConfigError: If the Gramian does not fit the tasks.
        """
        _check(gramian, tasks)
        products_TT = gramian.detach().cpu().double().numpy()
        norms_T = np.sqrt(np.diag(products_TT).clip(min=0.0))
        parts_TT = np.eye(len(tasks))  # row i: what task i's gradient is made of
        rng = np.random.default_rng([self.seed, step])
        for i in range(len(tasks)):
            with_all_T = products_TT[i].copy()
            for j in rng.permutation([k for k in range(len(tasks)) if k != i]):
                length = math.sqrt(max(0.0, float(parts_TT[i] @ with_all_T)))
                scale = length * norms_T[j]
                if scale <= 0.0:
                    continue  # a zero gradient has no direction, and teaches the target nothing
                cosine = min(1.0, max(-1.0, float(with_all_T[j]) / scale))
                pair = (tasks[i], tasks[j])
                target = self._targets.get(pair, 0.0)
                if cosine < target:
                    share = _vaccine(cosine, target) * length / norms_T[j]
                    parts_TT[i, j] += share
                    with_all_T = with_all_T + share * products_TT[j]
                self._targets[pair] = (1 - self.beta) * target + self.beta * cosine
        return torch.from_numpy(parts_TT.sum(axis=0)).to(gramian)

    def state_dict(self) -> dict[str, object]:
        """Return the targets as plain values."""
        return {"targets": [[first, second, value] for (first, second), value in self._targets.items()]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on with saved targets."""
        targets = state["targets"]
        assert isinstance(targets, list)
        self._targets = {(first, second): float(value) for first, second, value in targets}


def _vaccine(cosine: float, target: float) -> float:
    """Return a of g_i + a |g_i| / |g_j| g_j, whose cosine with g_j is the target."""
    if target >= 1.0:
        return 0.0  # no finite part of g_j makes them parallel; only rounding brings a target here
    sine, sine_of_target = math.sqrt(1 - cosine * cosine), math.sqrt(1 - target * target)
    return (target * sine - cosine * sine_of_target) / sine_of_target


def _order_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check(gramian: torch.Tensor, tasks: Sequence[str]) -> None:
    if gramian.shape != (len(tasks), len(tasks)):
        raise ConfigError(f"{len(tasks)} tasks but a Gramian of shape {tuple(gramian.shape)}")
    if not bool(torch.isfinite(gramian).all()):
        raise ConfigError(
            f"a gradient of the tasks {list(tasks)} is not finite: leave that task or the step out"
        )
