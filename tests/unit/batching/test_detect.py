"""Which errors mean that memory ran out: 12 forms of it, and texts that only sound like it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmpack.batching import is_oom_error


def _wrapped() -> Exception:
    """A user's error, raised from one of ours."""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        except torch.OutOfMemoryError as error:
            raise ValueError("the forward pass of my model failed") from error
    except ValueError as error:
        return error


def _in_context() -> Exception:
    """An error while another one was handled."""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except torch.OutOfMemoryError:
            raise KeyError("logging failed")  # noqa: B904 - without `from`, as it happens
    except KeyError as error:
        return error


def _accelerator() -> Exception:
    made = getattr(torch, "AcceleratorError", RuntimeError)
    return made("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


def _cpu() -> Exception:
    """What the CPU's allocator really raises."""
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has an exabyte")


FORMS = {
    "torch's type": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "before there was a type": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; ...)"),
    "the driver": _accelerator(),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN without an algorithm": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may"),
    "HIP": RuntimeError("HIP out of memory. Tried to allocate 256.00 MiB. GPU 0 has a total capacity of"),
    "XPU": RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 17.50 GB, max allowed: 18.13 GB)."),
    "CPU": _cpu(),
    "Python and numpy": np.exceptions.__dict__.get("_ArrayMemoryError", MemoryError)("Unable to allocate"),
    "XLA": RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."),
}
MORE = {
    "a cause": _wrapped(),
    "a context": _in_context(),
    "Gaudi": RuntimeError("FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::268435456"),
    "a replica": RuntimeError("Caught OutOfMemoryError in replica 1 on device 1.\nOriginal Traceback"),
}
DECOYS = {
    "a kernel's shared memory": RuntimeError("out of resource: shared memory, Required: 131072"),
    "a worker's shared memory": RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
        "are out of shared memory. Please try to raise your shared memory limit."
    ),
    "an illegal access": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "a user's text": ValueError("CUDA out of memory."),
    "wrong shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
}


@pytest.mark.parametrize("error", [*FORMS.values(), *MORE.values()], ids=[*FORMS, *MORE])
def test_memory_errors_are_recognised(error):
    assert is_oom_error(error)


@pytest.mark.parametrize("error", DECOYS.values(), ids=DECOYS)
def test_other_errors_are_not(error):
    assert not is_oom_error(error)


def test_twelve_forms_and_five_decoys_are_what_the_goal_asks_for():
    assert (len(FORMS), len(DECOYS)) == (12, 5)


def test_a_suppressed_context_and_a_cycle_are_no_reason():
    handled = KeyError("handled")
    handled.__context__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert is_oom_error(handled)
    handled.__suppress_context__ = True  # what `raise ... from None` does
    assert not is_oom_error(handled)
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_oom_error(first)
    assert not is_oom_error(None)
