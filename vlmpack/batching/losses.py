"""What a step's loss is divided by, and losses of single samples where the model's own does not tell them.

model     the model's own loss, or `compute_loss_func`, divided by the supervised tokens of the whole step
token     the same for causal language models, computed from the logits: rows may have different weights
sample    the mean of the samples' mean losses: long answers do not outweigh short ones
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

from vlmpack.errors import ConfigError
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LossKind: TypeAlias = Literal["model", "token", "sample"]
"""How the loss of a step is formed."""


def count_items(inputs: Mapping[str, Any], *, shifts: bool, num_samples: int) -> int:
    """Return what a loss that is a mean over a batch was divided by.

    Args:
        inputs: The collated batch.
        shifts: The model predicts each label from the position before it, so the first one of a row is not
            predicted.
        num_samples: Samples of the batch, which counts where there are no labels or they are numbers.
    """
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if isinstance(labels, torch.Tensor) and labels.ndim > 1 and shifts:
            labels = labels[..., 1:]
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return num_samples
    return int(labels.ne(IGNORE_INDEX).sum())


def segments_of(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Return int64 [B, L], which sample of its row each position belongs to, or None where rows are samples.

    From `segment_ids`, or from `position_ids` that restart.

    Args:
        batch: The collated batch.
    """
    segments = batch.get("segment_ids")
    if isinstance(segments, torch.Tensor):
        return segments
    positions = batch.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2:
        return None
    restarts = torch.zeros_like(positions)
    restarts[:, 1:] = (positions[:, 1:] <= positions[:, :-1]).long()
    return restarts.cumsum(1) + 1


def check_document_starts(batch: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Refuse packed rows in which a sample's first token is to be predicted from the sample before it.

    Args:
        batch: The collated batch.
        keys: Its samples, for the message.

    Raises:
        ConfigError: If a segment's first label is not masked.
    """
    labels, segments = batch.get("labels"), segments_of(batch)
    if segments is None or not isinstance(labels, torch.Tensor) or labels.shape != segments.shape:
        return
    starts = (segments[:, 1:] != segments[:, :-1]) & (labels[:, 1:] != IGNORE_INDEX)
    if bool(starts.any()):
        row, at = starts.nonzero()[0].tolist()
        raise ConfigError(
            f"row {row} ({keys[row] if row < len(keys) else '?'}): position {at + 1} begins a sample and has "
            f"the label {int(labels[row, at + 1])}, which would be predicted from the sample before "
            "it; mask the first label of each sample with -100"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLosses:
    """Losses of a micro-batch, row by row. B rows."""

    sums: torch.Tensor
    """[B], each row's part of the step's loss, not yet divided."""
    items: list[int]
    """For each row, what it adds to the denominator: tokens or samples."""


def count_rows(batch: Mapping[str, Any], kind: LossKind) -> list[int]:
    """Return what each row adds to the denominator of a step.

    Args:
        batch: The collated batch, with `labels`.
        kind: "token" or "sample".

    Raises:
        ConfigError: If there are no labels [B, L].
    """
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2:
        raise ConfigError(f"loss={kind!r} needs labels [B, L] in the batch, which has {sorted(batch)}")
    supervised = labels[:, 1:].ne(IGNORE_INDEX)
    if kind == "token":
        return [int(count) for count in supervised.sum(1).tolist()]
    segments = segments_of(batch)
    if segments is None:
        return [int(row) for row in supervised.any(1).tolist()]
    return [len(torch.unique(row[mask])) for row, mask in zip(segments[:, 1:], supervised, strict=True)]


def row_losses(logits: torch.Tensor, batch: Mapping[str, Any], kind: LossKind) -> RowLosses:
    """Return the losses of a causal language model's rows.

    Args:
        logits: [B, L, V].
        batch: The collated batch, with `labels` on the logits' device.
        kind: "token" (sums over tokens) or "sample" (sums over samples of their means).
    """
    labels = batch["labels"][:, 1:]
    values = logits[:, :-1]
    if values.dtype in {torch.float16, torch.bfloat16}:
        values = values.float()
    losses = F.cross_entropy(
        values.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view_as(labels)
    if kind == "sample":
        losses = losses * _sample_weights(labels, segments_of(batch), losses.dtype)
    return RowLosses(sums=losses.sum(1), items=count_rows(batch, kind))


def _sample_weights(labels: torch.Tensor, segments: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return [B, L - 1], 1 / (supervised tokens of the sample) on each supervised token."""
    supervised = labels.ne(IGNORE_INDEX)
    if segments is None:
        counts = supervised.sum(1, keepdim=True).expand_as(labels)
    else:
        of = segments[:, 1:].to(labels.device)
        per = torch.zeros((len(labels), int(of.max()) + 1), dtype=torch.int64, device=labels.device)
        per.scatter_add_(1, of, supervised.long())
        counts = per.gather(1, of)
    return supervised.to(dtype) / counts.clamp(min=1)
