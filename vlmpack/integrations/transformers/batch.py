"""A batch in two parts: what the model's forward takes, and what the loss and the books need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from vlmpack.errors import ConfigError
from vlmpack.stages.placeholders import IGNORE_INDEX
from vlmpack.weighting import loss_weights

if TYPE_CHECKING:
    from vlmpack.weighting import LossWeighting

NOT_FOR_THE_MODEL: Final = frozenset({
    "labels",  # the loss is computed outside, so that it can be weighed
    "keys",
    "segment_ids",
    "tiles_per_pack",
    "loss_weights",
    "loss_weight_sum",
})
"""Names that the forward does not take. Models accept unknown names in silence, so only this tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is learnt from a batch."""

    labels: torch.Tensor = field(repr=False)
    """int64 [B, L], unshifted."""
    weights: torch.Tensor = field(repr=False)
    """[B, L], 0 where nothing is learnt."""

    @property
    def weight_sum(self) -> torch.Tensor:
        """float64, on the weights' device where that has float64."""
        wide = self.weights if self.weights.device.type == "mps" else self.weights.double()
        return wide.sum()


@dataclass(kw_only=True, slots=True)
class Counts:
    """What went through training, over all ranks."""

    samples: int = 0
    """Segments of packs in which something is learnt."""
    tokens: int = 0
    """Positions that belong to such a sample; a dummy image does not."""
    positions: int = 0
    """All positions, padding included."""
    supervised: int = 0
    """Labels that were learnt."""

    def as_list(self) -> list[int]:
        """Return the four numbers in the order of the fields."""
        return [self.samples, self.tokens, self.positions, self.supervised]

    def add(self, numbers: list[int]) -> None:
        """Add four numbers in the order of the fields.

        Args:
            numbers: From `as_list`.
        """
        self.samples += numbers[0]
        self.tokens += numbers[1]
        self.positions += numbers[2]
        self.supervised += numbers[3]

    def log_since(self, before: Counts) -> dict[str, float]:
        """Return what a log says: all so far, and the padding of what came after `before`.

        Args:
            before: What the last log said.
        """
        positions = self.positions - before.positions
        return {
            "samples_seen": self.samples,
            "useful_tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "padding": 1 - (self.tokens - before.tokens) / positions if positions else 0.0,
        }


def split_batch(batch: Mapping[str, Any], weighting: LossWeighting) -> tuple[dict[str, Any], Target]:
    """Return the forward's keyword arguments, and the target. O(B x L).

    Python objects (keys, lists, names) are left out; tensors, numbers and dicts of tensors stay.
    `use_cache=False` is always among the arguments: with a cache, transformers does not isolate samples.

    Args:
        batch: From a collator.
        weighting: The rule, where the batch does not bring its weights.

    Raises:
        ConfigError: If the batch would not be isolated, or lacks something.
    """
    check_batch(batch)
    forward = {
        name: value
        for name, value in batch.items()
        if name not in NOT_FOR_THE_MODEL and isinstance(value, (torch.Tensor, bool, int, float, Mapping))
    }
    forward["use_cache"] = False
    labels = batch["labels"]
    weights = batch.get("loss_weights")
    if weights is None:
        weights = loss_weights(labels, batch["segment_ids"], weighting)
    weights = torch.where(labels == IGNORE_INDEX, 0, weights)  # somebody may have emptied the batch since
    return forward, Target(labels=labels, weights=weights)


def check_batch(batch: object) -> None:
    """Check that a batch is one of packs whose samples stay apart.

    Args:
        batch: From a collator.

    Raises:
        ConfigError: If it is not; says why.
    """
    if not isinstance(batch, Mapping):
        raise ConfigError(f"a batch must be a mapping of names to tensors, got {type(batch).__name__}")
    missing = {"input_ids", "labels", "position_ids", "segment_ids"} - batch.keys()
    if missing:
        raise ConfigError(
            f"the batch has no {', '.join(sorted(missing))}: packs need a collator such as "
            "VQACollator(family=..., loss_weighting=...)"
        )
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        raise ConfigError(
            "the batch has an attention_mask with two dimensions: with it, transformers does not look for "
            "restarting positions, and every sample attends to those before it in its pack. Leave it out, or "
            "give a mask with four dimensions"
        )


def count(batch: Mapping[str, Any], target: Target) -> Counts:
    """Return what a batch holds. O(B x L).

    Args:
        batch: From a collator.
        target: Its other part.
    """
    segment_ids = batch["segment_ids"]
    stride = int(segment_ids.max()) + 1
    samples = torch.arange(len(segment_ids), device=segment_ids.device)[:, None] * stride + segment_ids
    learnt = target.weights != 0
    teaches = torch.bincount(samples[learnt], minlength=len(segment_ids) * stride) > 0
    return Counts(
        samples=int(teaches.sum()),
        tokens=int(teaches[samples].sum()),
        positions=segment_ids.numel(),
        supervised=int(learnt.sum()),
    )
