"""Measure a real step: the allocator's peak on a GPU, the bytes that autograd keeps on any device.

The second figure needs no GPU and is exact, so it is what the memory model's closed forms are tested with.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What one real step needed."""

    device: str
    """Where it ran."""
    saved_bytes: int
    """Kept for backward, each storage once, parameters and ignored tensors left out."""
    peak_bytes: int | None
    """`torch.cuda.max_memory_allocated` over the step; None without a GPU."""
    reserved_bytes: int | None
    """`torch.cuda.max_memory_reserved` over the step; None without a GPU."""


class _Kept:
    """Stands for a tensor in the graph; its end is the end of one use of the storage."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@dataclass(slots=True)
class SavedBytes:
    """Counts what autograd keeps: use `counting` around a forward pass.

    Args:
        ignore: Tensors whose memory is counted elsewhere: parameters, buffers, the batch.
    """

    ignore: Iterable[torch.Tensor] = ()
    _uses: dict[int, int] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes that a graph holds now, each storage once."""
        return sum(self._sizes.values())

    def _let_go(self, address: int) -> None:
        self._uses[address] -= 1
        if not self._uses[address]:
            del self._uses[address], self._sizes[address]

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Return the context under which a forward pass is counted."""
        import torch

        ignored = {tensor.untyped_storage().data_ptr() for tensor in self.ignore}

        def keep(tensor: torch.Tensor) -> _Kept:
            # detached: an operation that keeps its own output would keep itself alive otherwise
            kept = _Kept(tensor.detach())
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if storage.nbytes() and address not in ignored:
                self._sizes[address] = storage.nbytes()
                self._uses[address] = self._uses.get(address, 0) + 1
                weakref.finalize(kept, self._let_go, address)
            return kept

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor)


def measure(
    step: Callable[[], torch.Tensor],
    *,
    ignore: Iterable[torch.Tensor] = (),
    optimizer: Callable[[], None] | None = None,
) -> Measurement:
    """Run one training step and return what it needed.

    Args:
        step: Runs the forward pass and returns the loss; the backward pass is run here.
        ignore: Tensors that are counted elsewhere, as a rule `model.parameters()`, its buffers, the batch.
        optimizer: Runs the optimizer's step; left out, the peak is that of forward and backward.

    Raises:
        ConfigError: If the loss has no gradient to go back through.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    counter = SavedBytes(ignore=tuple(ignore))
    with counter.counting():
        loss = step()
    if not loss.requires_grad:
        raise ConfigError("the step's loss has no gradient: is everything frozen, or under no_grad?")
    saved = counter.total
    loss.backward()  # type: ignore[no-untyped-call]
    if optimizer is not None:
        optimizer()
    if not on_gpu:
        return Measurement(device="cpu", saved_bytes=saved, peak_bytes=None, reserved_bytes=None)
    torch.cuda.synchronize()
    return Measurement(
        device=torch.cuda.get_device_name(),
        saved_bytes=saved,
        peak_bytes=torch.cuda.max_memory_allocated(),
        reserved_bytes=torch.cuda.max_memory_reserved(),
    )
