"""Bytes of a training step that do not depend on the batch: weights, gradients, optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from vlmpack.memory.allocator import replayed_slack
from vlmpack.memory.chain import build_chain

if TYPE_CHECKING:
    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.regime import TrainingRegime


@dataclass(frozen=True, kw_only=True, slots=True)
class Static:
    """Bytes on one device."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Of the trainable parameters."""
    optimizer: int
    """States of the optimizer, and a float32 copy of the weights if there is one."""
    step: int
    """What the optimizer allocates for the duration of its step."""
    gather: int
    """Weights that a fully sharded step gathers, for the block that runs and for the next one."""
    weight_slack: int
    """What the allocator adds to the weights."""
    state_slack: int
    """What it adds to the optimizer's states."""
    gradient_slack: int
    """What it adds to the gradients; to the optimizer's temporary as well."""


@lru_cache(maxsize=128)
def static_bytes(model: ModelShape, regime: TrainingRegime, tokens: int) -> Static:
    """Return weights, gradients, optimizer state and what the step needs on top; cached.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        tokens: Positions of a row; the figures do not depend on it.
    """
    chain = build_chain(model, regime, tokens)
    weights = sum(w.elements * w.itemsize for _, w in chain.weights) + model.buffer_bytes
    trainable = [w for _, w in chain.weights if w.trainable]
    elements = sum(w.elements for w in trainable)
    own = sum(w.elements * w.itemsize for w in trainable)
    # adapters have a type of their own, and so have their gradients and states
    gradients = own if regime.lora_rank else elements * regime.gradient_bytes
    state_bytes = regime.state_bytes
    if regime.lora_rank and regime.optimizer_state is None and regime.optimizer != "adamw_8bit":
        states = own * state_bytes // regime.weight_bytes
    else:
        states = elements * state_bytes
    n, stage = regime.shards, regime.sharding
    gather = 0
    if stage == "zero3":
        parts = (*chain.vision, *chain.language)
        gather = (
            2 * max(sum(w.elements for w in part.memory.weights) for part in parts) * regime.compute_bytes
        )
    step = own if regime.optimizer == "adamw_foreach" else 0
    copy_slack = replayed_slack(w.elements * w.itemsize for w in trainable) // n
    return Static(
        weights=_share(weights, n if stage == "zero3" else 1),
        gradients=_share(gradients, n if stage in {"zero2", "zero3"} else 1),
        optimizer=_share(states, n),
        step=_share(step, n),
        gather=gather,
        weight_slack=replayed_slack(w.elements * w.itemsize for _, w in chain.weights),
        state_slack=copy_slack * (regime.state_bytes // max(regime.gradient_bytes, 1)),
        gradient_slack=copy_slack,
    )


def _share(size: int, ranks: int) -> int:
    return -(-size // ranks)
