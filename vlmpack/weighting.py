"""Weighting: what each supervised token of a pack counts in the loss, whatever it shares a batch with.

Sample s has n_s supervised tokens with losses l_st. Each rule is one weighted mean over all tokens of an
optimizer step, sum(w_st l_st) / sum(w_st):

    rule      w_st          the loss                                    sum of weights
    token     1             mean over tokens                            tokens
    sample    1 / n_s       mean over samples of their token means      samples
    sqrt      n_s ** -0.5   in between: samples count by sqrt(n_s)      sum of sqrt(n_s)

A weight depends on its own sample only, and a pack holds whole samples. So numerator and denominator
simply add up, over micro-batches and over ranks, and the split of a step changes no gradient, as long as
everything is divided by the sum of weights of the whole step. That sum travels with each batch.

"sqrt" is the square averaging of InternVL 2.5 (Chen et al., 2024, section 3.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F

from vlmpack.errors import ConfigError
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterable

LossWeighting: TypeAlias = Literal["token", "sample", "sqrt"]
"""How the tokens of long and short samples are weighed."""

_EXPONENT: Final[dict[LossWeighting, float]] = {"token": 0.0, "sample": -1.0, "sqrt": -0.5}


def check_weighting(weighting: object) -> None:
    """Check the name of a rule.

    Args:
        weighting: From a user.

    Raises:
        ConfigError: If there is no such rule.
    """
    if weighting not in get_args(LossWeighting):
        raise ConfigError(f"loss_weighting must be one of {get_args(LossWeighting)}, got {weighting!r}")


def supervised(labels: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Return bool [B, L]: the labels that are learnt, each from the position before it. O(B x L).

    The first label of a segment never is, masked or not: the position before it belongs to another sample.

    Args:
        labels: int64 [B, L], unshifted, -100 where nothing is learnt.
        segment_ids: int64 [B, L], 0 on padding.
    """
    continues = torch.zeros_like(segment_ids, dtype=torch.bool)
    continues[:, 1:] = segment_ids[:, 1:] == segment_ids[:, :-1]
    return (labels != IGNORE_INDEX) & (segment_ids > 0) & continues


def loss_weights(
    labels: torch.Tensor,
    segment_ids: torch.Tensor,
    weighting: LossWeighting = "token",
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return [B, L]: the weight of each label, 0 where nothing is learnt. O(B x L).

    Args:
        labels: int64 [B, L], unshifted, -100 where nothing is learnt.
        segment_ids: int64 [B, L]: samples numbered within a row, 0 on padding.
        weighting: The rule.
        dtype: Of the result.

    Raises:
        ConfigError: If there is no such rule, or the shapes differ.
    """
    check_weighting(weighting)
    if labels.ndim != 2 or labels.shape != segment_ids.shape:
        raise ConfigError(
            f"labels {list(labels.shape)} and segment_ids {list(segment_ids.shape)} must both be "
            "[packs, positions]"
        )
    learnt = supervised(labels, segment_ids)
    if weighting == "token" or not labels.numel():
        return learnt.to(dtype)
    stride = int(segment_ids.max()) + 1
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    samples = rows * stride + segment_ids
    counts = torch.bincount(samples[learnt], minlength=len(labels) * stride)
    each = counts.clamp(min=1).to(dtype) ** _EXPONENT[weighting]
    return torch.where(learnt, each[samples], 0)


def weighted_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    weight_sum: torch.Tensor | float,
    *,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return sum(weight x cross-entropy) / weight_sum: this batch's part of the loss of its step.

    In float32, or float64 where the logits are; only supervised positions are converted, so the logits
    are not held a second time. 0, with a gradient of 0, where nothing is learnt. O(B x L x vocabulary).

    Args:
        logits: [B, L, V], position i predicts label i + 1.
        labels: int64 [B, L], unshifted.
        weights: [B, L], from `loss_weights`.
        weight_sum: Of the whole optimizer step: all micro-batches, all ranks.
        label_smoothing: Share of each target that is spread evenly over the vocabulary.
    """
    learnt = weights[:, 1:] != 0
    chosen = logits[:, :-1][learnt]
    if chosen.dtype != torch.float64:
        chosen = chosen.float()
    each = F.cross_entropy(chosen, labels[:, 1:][learnt], reduction="none", label_smoothing=label_smoothing)
    total = (each * weights[:, 1:][learnt].to(each.dtype)).sum()
    divisor = torch.as_tensor(weight_sum, dtype=each.dtype, device=each.device)
    return total / torch.where(divisor > 0, divisor, 1)


def step_weight_sum(
    weight_sums: Iterable[torch.Tensor | float],
    *,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the sum of weights of an optimizer step, over its micro-batches and over ranks.

    One all-reduce of one number where a process group is initialised: every rank has to call it.

    Args:
        weight_sums: One a micro-batch of this rank, for example each batch's `loss_weight_sum`.
        device: Where the process group communicates.
        group: The data-parallel ranks; all where None.
    """
    # Added in float64 and in a fixed order, so that it does not depend on the split.
    total = torch.tensor([float(part) for part in weight_sums], dtype=torch.float64).sum().to(device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, group=group)
    return total
