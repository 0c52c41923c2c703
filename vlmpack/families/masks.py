"""Dense masks, for the families that restarting positions alone do not isolate.

S x S booleans a row: 16 MiB at 4,096 positions, 256 MiB at 16,384.
"""

from __future__ import annotations

import torch


def causal_or_block(segment_ids: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
    """Return bool [B, L, L]: a position sees its segment's past, and all of the image it is a token of.

    Padding sees its own past alone, so that no row of the mask is empty.

    Args:
        segment_ids: int64 [B, L], from 1 in each row; 0 on padding.
        is_image: bool [B, L].
    """
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    past = torch.ones(length, length, dtype=torch.bool).tril()
    before = torch.nn.functional.pad(is_image[:, :-1], (1, 0))
    block = (is_image & ~before).cumsum(1) * is_image  # 1, 2, ... for each run of image tokens, 0 for text
    together = (block[:, :, None] == block[:, None, :]) & is_image[:, None, :]
    return same & (past | together)


def within(seen: torch.Tensor, window: int) -> torch.Tensor:
    """Return the mask without what lies `window` positions back or more.

    Args:
        seen: bool [B, L, L].
        window: Positions, the own one included.
    """
    positions = torch.arange(seen.shape[1])
    return seen & (positions[:, None] - positions[None, :] < window)


def dense(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask [B, 1, L, L] in the form that attention kernels take.

    Args:
        seen: bool [B, L, L].
        dtype: torch.bool, or a float type: 0 where a position is seen, its least number elsewhere.
    """
    if dtype == torch.bool:
        return seen[:, None]
    least = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, least)[:, None]
