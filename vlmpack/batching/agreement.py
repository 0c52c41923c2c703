"""Let ranks agree before they exchange gradients: one vote, then one reduction, whatever each rank ran.

Micro-batches run without any communication, so ranks may split and retry as their own memory demands. A rank
that fails for good says so in the vote, and every rank raises: none waits for one that is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

BUCKET_BYTES: Final = 25 * 2**20
"""Gradients that are reduced at once, as DDP does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What all ranks know after a vote."""

    num_failed: int
    """Ranks that cannot go on."""
    num_not_finite: int
    """Ranks with a loss that is not finite."""
    num_items: float
    """What the step's loss is divided by, over all ranks: tokens or samples that were really trained on."""
    has_gradient: tuple[bool, ...]
    """For each parameter, whether any rank has a gradient."""


class Ranks:
    """All ranks of a run, or this process alone.

    Args:
        device: Where the collectives' tensors live.
        group: The ranks; None: all.
    """

    def __init__(self, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None) -> None:
        self.device = torch.device(device)
        self.group = group
        self.world_size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1

    def total(self, values: Sequence[float]) -> list[float]:
        """Return sums over ranks.

        Args:
            values: As many on every rank.
        """
        if self.world_size == 1:
            return list(values)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        summed = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(summed, group=self.group)
        return [float(value) for value in summed.tolist()]

    def vote(
        self,
        parameters: Sequence[torch.nn.Parameter],
        *,
        failed: bool,
        not_finite: bool,
        num_items: float,
    ) -> Verdict:
        """Exchange how the step went, in one collective.

        Args:
            parameters: The trained ones, in the same order on every rank.
            failed: This rank cannot go on.
            not_finite: Its loss is not finite.
            num_items: Tokens or samples that it trained on.
        """
        flags = [float(parameter.grad is not None) for parameter in parameters]
        failures, infinite, items, *has = self.total([float(failed), float(not_finite), num_items, *flags])
        return Verdict(
            num_failed=int(failures),
            num_not_finite=int(infinite),
            num_items=items,
            has_gradient=tuple(value > 0 for value in has),
        )

    def average_gradients(
        self, parameters: Sequence[torch.nn.Parameter], has_gradient: Sequence[bool], scale: float = 1.0
    ) -> None:
        """Replace each gradient by the mean over ranks, times `scale`.

        A parameter that only other ranks reached counts as zero here; one that nobody reached stays without a
        gradient, so that no optimizer decays it.

        Args:
            parameters: In the same order on every rank.
            has_gradient: From the vote.
            scale: Correction of the step's denominator.
        """
        reached = [parameter for parameter, has in zip(parameters, has_gradient, strict=True) if has]
        factor = scale / self.world_size
        if self.world_size == 1:
            if factor != 1.0:
                for parameter in reached:
                    assert parameter.grad is not None
                    parameter.grad.mul_(factor)
            return
        bucket: list[torch.Tensor] = []
        size = 0
        for parameter in reached:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad
            own = gradient.numel() * gradient.element_size()
            if own >= BUCKET_BYTES and gradient.is_contiguous():  # no copy of what is large
                self._sum([gradient], factor)
                continue
            if bucket and (size + own > BUCKET_BYTES or bucket[0].dtype != gradient.dtype):
                self._sum(bucket, factor)
                bucket, size = [], 0
            bucket.append(gradient)
            size += own
        if bucket:
            self._sum(bucket, factor)

    def _sum(self, gradients: Sequence[torch.Tensor], factor: float) -> None:
        """Replace gradients of one type by their sums over ranks, times a factor."""
        if len(gradients) == 1 and gradients[0].is_contiguous():
            dist.all_reduce(gradients[0], group=self.group)
            gradients[0].mul_(factor)
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        flat.mul_(factor)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank the first rank's buffers, as DDP does before a forward pass.

        Args:
            model: The same on every rank.
        """
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0, group=self.group)
