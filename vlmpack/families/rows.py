"""Rows: the packs of a batch, stacked, as the families take them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vlmpack.geometry import ImageGeometry


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """B packs of L positions with N tiles of P pixels a side. Samples and images are row-major."""

    input_ids: torch.Tensor = field(repr=False)
    """int64 [B, L], padded on the right."""
    labels: torch.Tensor = field(repr=False)
    """int64 [B, L], unshifted, -100 where nothing is learnt."""
    position_ids: torch.Tensor = field(repr=False)
    """int64 [B, L], from 0 in each segment."""
    segment_ids: torch.Tensor = field(repr=False)
    """int64 [B, L], from 1 in each row; 0 on padding."""
    tiles: torch.Tensor = field(repr=False)
    """uint8 [N, 3, P, P]."""
    geometries: tuple[ImageGeometry, ...] = field(repr=False)
    """How each image is cut."""
    image_sizes: tuple[tuple[int, int], ...] = field(repr=False)
    """Upright (height, width) of each image before it was resized."""
    images_per_sample: tuple[int, ...]
    """Of every sample, text-only ones too."""
    image_token_id: int
    """The token that the model replaces by image features."""


def varlen(segment_ids: torch.Tensor) -> dict[str, Any]:
    """Return the lengths that flash attention takes, over the flattened rows, padding as segments of its own.

    Args:
        segment_ids: int64 [B, L], from 1 in each row; 0 on padding.
    """
    before = torch.nn.functional.pad(segment_ids[:, :-1], (1, 0), value=-1)  # -1: a row begins a segment
    starts = torch.nonzero((segment_ids != before).flatten()).flatten()
    edges = torch.cat([starts, torch.tensor([segment_ids.numel()])]).to(torch.int32)
    longest = int(edges.diff().max())
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges.clone(),
        "max_length_q": longest,
        "max_length_k": longest,
    }
