"""Batches from a worker to the main process through memory that both have, used again and again.

    worker   batch --copy--> a free slot of its ring --a few hundred bytes--> queue
    main     queue --> tensors that lie in the slot; when the last of them is gone, the slot is free

A DataLoader takes fresh shared memory for each tensor of each batch: the worker has it cleared page by page,
and the main process receives a file descriptor, maps it and takes the mapping apart again, each time.

What keeps this safe: a slot is claimed by its worker only, while it is free, and freed by the main process
only, when no tensor of the batch is left; where none is free or a batch is larger than a slot, the batch goes
the usual way. The memory has no name in any file system: it ends with the processes, however they end.
"""

from __future__ import annotations

import mmap
import os
import weakref
from math import prod
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils.data import get_worker_info

from vlmpack.errors import ConfigError, VlmpackError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    _Bytes: TypeAlias = npt.NDArray[np.uint8]
    _Content: TypeAlias = tuple[dict[str, "_Place"], list[str], dict[str, object]]

_HEAD_BYTES: Final = 4096
"""A page before the slots: one byte for each slot, 1 while it is in use."""
_ALIGN: Final = 64
"""Bytes; what vectors and devices like."""
_received: weakref.WeakValueDictionary[str, SharedBatches] = weakref.WeakValueDictionary()
"""Who receives in this process, by name."""


class _Place(NamedTuple):
    """Where a tensor lies in a slot."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


class _Ring:
    """Slots in memory without a name.

    Args:
        file: The memory's descriptor; it is owned by this from now on.
        num_slots: At least 1.
        slot_bytes: A multiple of the page.
    """

    def __init__(self, file: int, num_slots: int, slot_bytes: int) -> None:
        self.file, self.num_slots, self.slot_bytes = file, num_slots, slot_bytes
        self.memory = np.frombuffer(mmap.mmap(file, _HEAD_BYTES + num_slots * slot_bytes), np.uint8)
        self.in_use = self.memory[:num_slots]
        self.is_known = False
        """Whether the other process has it."""
        weakref.finalize(self, os.close, file)

    @classmethod
    def new(cls, num_slots: int, slot_bytes: int) -> _Ring:
        """Return a ring of which no page is used yet."""
        file = os.memfd_create("vlmpack-batches")
        os.ftruncate(file, _HEAD_BYTES + num_slots * slot_bytes)
        return cls(file, num_slots, slot_bytes)

    def slot(self, number: int, num_bytes: int) -> _Bytes:
        """Return the first bytes of a slot."""
        start = _HEAD_BYTES + number * self.slot_bytes
        return self.memory[start : start + num_bytes]


class SharedBatches:
    """A collate function whose batches leave a worker without being pickled.

    In the main process, and on systems other than Linux, it is the collate function itself. Tensors that are
    received may be written to, kept and viewed like any others. `pin_memory=True` copies them out, which
    frees the slot at once.

    Args:
        collate: Returns a batch as a dictionary; what is no tensor in it is pickled.
        num_slots: Batches of one worker that may be on their way or in use without going the usual way: as
            many as are prefetched, and those that the consumer holds.
        slot_bytes: Largest batch that a slot takes. Memory is used only as far as batches need it.

    Raises:
        ConfigError: If a number is less than 1.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Any]], Mapping[str, object]],
        *,
        num_slots: int = 4,
        slot_bytes: int = 1 << 29,
    ) -> None:
        for name, value in (("num_slots", num_slots), ("slot_bytes", slot_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if num_slots > _HEAD_BYTES:
            raise ConfigError(f"num_slots must be at most {_HEAD_BYTES}, got {num_slots}")
        self.collate = collate
        """The function that makes batches."""
        self._num_slots = num_slots
        self._slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._name = os.urandom(16).hex()
        self._own: tuple[int, _Ring] | None = None  # in a worker: its process and its ring
        self._rings: dict[int, _Ring] = {}  # in the main process: those of the workers, by process
        _received[self._name] = self

    def __call__(self, items: Sequence[Any]) -> Any:
        """Return the batch; in a worker something that becomes the batch where it arrives.

        Args:
            items: As the collate function takes them.
        """
        batch = self.collate(items)
        if get_worker_info() is None or type(batch) is not dict or not hasattr(os, "memfd_create"):
            return batch
        tensors = {name: value for name, value in batch.items() if _is_plain(value)}
        places, num_bytes = _places(tensors)
        ring = self._ring()
        slot = int(np.argmin(ring.in_use))
        if ring.in_use[slot] or not 0 < num_bytes <= self._slot_bytes:
            return batch
        memory = torch.from_numpy(ring.slot(slot, num_bytes))
        for name, place in places.items():
            _view(memory, place).copy_(tensors[name])
        ring.in_use[slot] = 1
        rest = {name: value for name, value in batch.items() if name not in tensors}
        return _Sent(self._name, ring, slot, num_bytes, (places, list(batch), rest))

    def _ring(self) -> _Ring:
        """Return this worker's ring; one that came along with a fork belongs to somebody else."""
        if self._own is None or self._own[0] != os.getpid():
            self._own = os.getpid(), _Ring.new(self._num_slots, self._slot_bytes)
        return self._own[1]

    def ring_of(self, process: int, file: Any, num_slots: int, slot_bytes: int) -> _Ring:
        """Return a worker's ring in the process that receives.

        Args:
            process: The worker.
            file: The descriptor as it was sent, with the ring's first batch; None later.
            num_slots: Slots of the ring.
            slot_bytes: Bytes of each.

        Raises:
            VlmpackError: If the worker ended before its first batch was read.
        """
        if file is not None:
            try:
                number = file.detach()
            except OSError as error:
                raise VlmpackError(
                    f"worker process {process} ended before its first batch was read; what ended it, such as "
                    "too little memory, stands in the system's log or in the DataLoader's error"
                ) from error
            for other in [other for other in self._rings if not _is_alive(other)]:
                self._rings.pop(other, None)
            self._rings[process] = _Ring(number, num_slots, slot_bytes)
        return self._rings[process]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_own": None, "_rings": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        _received.setdefault(self._name, self)


class _Sent:
    """A batch on its way: pickled here, it is unpickled as the batch itself."""

    def __init__(self, name: str, ring: _Ring, slot: int, num_bytes: int, content: _Content) -> None:
        self._name, self._ring, self._slot, self._num_bytes = name, ring, slot, num_bytes
        self._content = content

    def __reduce__(self) -> tuple[Any, ...]:
        ring = self._ring
        file = None if ring.is_known else DupFd(ring.file)
        ring.is_known = True
        ring_args = (os.getpid(), file, ring.num_slots, ring.slot_bytes)
        return _receive, (self._name, ring_args, self._slot, self._num_bytes, self._content)


def _receive(
    name: str, ring_args: tuple[int, Any, int, int], slot: int, num_bytes: int, content: _Content
) -> dict[str, object]:
    """Return the batch, its tensors in the slot.

    Raises:
        VlmpackError: If nobody here expects it.
    """
    receiver = _received.get(name)
    if receiver is None:
        raise VlmpackError(
            "a batch of SharedBatches arrived in a process that has no such collate function any more; keep "
            "the DataLoader while its batches are read, in the process that made it"
        )
    ring = receiver.ring_of(*ring_args)
    array = ring.slot(slot, num_bytes)
    # The tensors' common storage holds this array, and nothing else does.
    weakref.finalize(array, _free, ring.in_use, slot, os.getpid()).atexit = False
    memory = torch.from_numpy(array)
    places, order, rest = content
    return {key: _view(memory, places[key]) if key in places else rest[key] for key in order}


def _free(in_use: _Bytes, slot: int, process: int) -> None:
    if os.getpid() == process:  # a fork's copy of the tensors is not the last
        in_use[slot] = 0


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _is_plain(value: object) -> bool:
    """Return whether a value is a tensor whose elements can be copied as they are."""
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.requires_grad
        and not value.is_quantized
        and not value.is_complex()
    )


def _places(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, _Place], int]:
    """Return where each tensor goes, and the bytes in all."""
    places: dict[str, _Place] = {}
    end = 0
    for name, tensor in tensors.items():
        # Keeps the order of axes in memory, such as pixel by pixel; gaps and repetitions go.
        stride = torch.empty_like(tensor, device="meta").stride()
        places[name] = _Place(tensor.dtype, tuple(tensor.shape), stride, end)
        end += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
    return places, end


def _view(memory: torch.Tensor, place: _Place) -> torch.Tensor:
    num_bytes = place.dtype.itemsize * prod(place.shape)
    flat = memory[place.start : place.start + num_bytes].view(place.dtype)
    return flat.as_strided(place.shape, place.stride)
