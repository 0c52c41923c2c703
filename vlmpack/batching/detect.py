"""Tell whether an error means that memory ran out: by its type first, then by a short table of messages.

Wrapped errors count too: whoever catches an OOM and raises something of his own leaves it as the cause or
the context. Messages are matched on the runtime's own errors alone, so that a text about memory in a user's
exception, or about *shared* memory in a kernel's or a worker's, is no reason to split a batch.
"""

from __future__ import annotations

from typing import Final

import torch

OOM_MESSAGES: Final = (
    "CUDA out of memory.",  # the caching allocator, before torch had a type for it
    "CUDA error: out of memory",  # the driver, outside the allocator
    "HIP out of memory.",
    "HIP error: out of memory",
    "XPU out of memory.",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",  # a library's workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",  # no algorithm whose workspace fits
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # the same on Windows
    "RESOURCE_EXHAUSTED: Out of memory",  # XLA
    "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed",  # Gaudi
)
"""What the runtimes say when an allocation fails."""

_FROM_A_REPLICA: Final = ("Caught OutOfMemoryError in", "Caught MemoryError in")
"""How torch hands on an error of a replica or a worker: as text."""


def is_oom_error(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from or because of, means that memory ran out.

    Args:
        error: Any exception; None is none.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if _is_oom_itself(error):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _is_oom_itself(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):  # torch's AcceleratorError is one
        return False
    text = str(error)
    return text.startswith(_FROM_A_REPLICA) or any(message in text for message in OOM_MESSAGES)
