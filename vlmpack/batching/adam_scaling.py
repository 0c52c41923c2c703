"""Adam for another batch size: learning rate, both decays and epsilon move together.

Scaling the learning rate by the square root alone leaves Adam averaging over as many *steps* as before, which
are more samples. To second order in the noise (a stochastic differential equation with the same drift and
fluctuation) all four settings change, with k = size / base:

    rate * sqrt(k)     1 - k (1 - beta1)     1 - k (1 - beta2)     epsilon / sqrt(k)

Source: S. Malladi, K. Lyu, A. Panigrahi and S. Arora, "On the SDEs and scaling rules for adaptive gradient
algorithms" (NeurIPS 2022), definition 4.3.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.optim import Optimizer


class AdamSettings(NamedTuple):
    """What the rule changes."""

    lr: float
    beta1: float
    beta2: float
    eps: float


def scale_adam(settings: AdamSettings, ratio: float) -> AdamSettings:
    """Return Adam's settings for a step `ratio` times as large.

    Args:
        settings: For the base size.
        ratio: Size of the step over the base size.

    Raises:
        ConfigError: If the ratio is not positive, or so large that a decay would be negative.
    """
    largest = 1 / (1 - min(settings.beta1, settings.beta2))
    if not 0 < ratio <= largest:
        raise ConfigError(
            f"a step {ratio:g} times the base size is out of the rule's range, 0 to {largest:g} with decays "
            f"of {settings.beta1:g} and {settings.beta2:g}: choose the settings for a larger base"
        )
    root = math.sqrt(ratio)
    return AdamSettings(
        lr=settings.lr * root,
        beta1=1 - ratio * (1 - settings.beta1),
        beta2=1 - ratio * (1 - settings.beta2),
        eps=settings.eps / root,
    )


@contextmanager
def scaled_adam(optimizer: Optimizer, ratio: float) -> Iterator[None]:
    """Give Adam the settings of a step `ratio` times as large while the block runs; then the old ones again.

    Args:
        optimizer: Its `step` is called inside the block.
        ratio: Size of the step over the base size.

    Raises:
        ConfigError: If the optimizer is not of Adam's kind, or see `scale_adam`.
    """
    kept: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        if not {"lr", "betas", "eps"} <= group.keys():
            raise ConfigError(f"{type(optimizer).__name__} has no betas and eps, so it is not of Adam's kind")
        kept.append({name: group[name] for name in ("lr", "betas", "eps")})
    try:
        for group in optimizer.param_groups:
            beta1, beta2 = group["betas"]
            new = scale_adam(AdamSettings(float(group["lr"]), beta1, beta2, group["eps"]), ratio)
            group.update(lr=new.lr, betas=(new.beta1, new.beta2), eps=new.eps)
        yield
    finally:
        for group, settings in zip(optimizer.param_groups, kept, strict=True):
            group.update(settings)
