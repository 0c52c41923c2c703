"""Make an optimizer's state before training, so that its memory is taken while there is still room.

An OOM in `optimizer.step` cannot be retried: AdamW is left with a step counter and no moments, and the next
call dies with a KeyError. So the state is made first, by a step with gradients of zero and a learning rate
of zero, and set back to what a fresh state is.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import torch

from vlmpack.batching.detect import is_oom_error
from vlmpack.errors import VlmpackError

if TYPE_CHECKING:
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

_FRESH: Final = {"step": 0.0, "mu_product": 1.0}
"""State that a step changes whatever the gradient, and its value before the first one."""
_STILL: Final = {"lr": 0.0, "weight_decay": 0.0}
"""Settings with which a step of zero gradients changes no parameter."""


def prime_optimizer(optimizer: Optimizer) -> bool:
    """Allocate the optimizer's state, bit-identical to a fresh one.

    Args:
        optimizer: Before its first step.

    Returns:
        Whether the state is now allocated. False where an optimizer's fresh state is not zeros, or where it
        already has some: then it is as it was.

    Raises:
        VlmpackError: If the memory does not even suffice for the state.
    """
    if any(state for state in optimizer.state.values()):
        return False
    parameters = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
    if any(parameter.grad is not None for parameter in parameters):
        return False
    if any(group.get("dampening") for group in optimizer.param_groups):
        return False  # the first step of such a momentum is not damped; a zero one before it would be
    kept = [{name: group[name] for name in _STILL if name in group} for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group.update({name: _like(group[name], 0.0) for name in _STILL if name in group})
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        type(optimizer).step(optimizer)  # not the instance's: a scheduler counts calls of that one
    except Exception as error:
        optimizer.state.clear()
        if not is_oom_error(error):
            logger.warning("the optimizer's state is not allocated beforehand: %s", error)
            return False
        raise VlmpackError(
            "memory does not suffice for the optimizer's state, before the first batch: use an 8-bit or "
            "another optimizer with less state, adapters, or a smaller model"
        ) from error
    finally:
        for group, settings in zip(optimizer.param_groups, kept, strict=True):
            group.update(settings)
        for parameter in parameters:
            parameter.grad = None
    return _made_fresh(optimizer)


def _like(value: Any, number: float) -> Any:
    return torch.full_like(value, number) if isinstance(value, torch.Tensor) else number


def _made_fresh(optimizer: Optimizer) -> bool:
    """Set counters back; where anything else is not zero the state is dropped again."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if name in _FRESH:
                if isinstance(value, torch.Tensor):
                    value.fill_(_FRESH[name])
                else:
                    state[name] = type(value)(_FRESH[name])
            elif isinstance(value, torch.Tensor) and bool(value.count_nonzero()):
                optimizer.state.clear()
                logger.warning("%s starts its %s other than with zeros", type(optimizer).__name__, name)
                return False
    return True
