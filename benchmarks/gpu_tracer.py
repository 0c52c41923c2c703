"""Trace a training step's GPU memory without a GPU: fake tensors, and a model of the caching allocator.

Every operation of the step runs on tensors that have a shape, a type and the device "cuda", but no memory.
A dispatch mode sees each new storage, and a finaliser each end of one, so that bytes in use are known after
every operation, to the byte. What kernels allocate inside is added by hand for flash attention's backward.
Needs a C++ compiler once; import `load_fake_cuda` and call it before torch is imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import weakref
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 1 << 20


def load_fake_cuda() -> None:
    """Build and load the fake device; has to come before the first import of torch."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: load the fake device first")
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise RuntimeError("torch is not installed")
    root = Path(found.origin).parent
    source = Path(__file__).with_name("fake_cuda.cpp")
    library = Path(tempfile.mkdtemp()) / "fake_cuda.so"
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    flags = ["-std=c++20", "-shared", "-fPIC", "-O1"]
    compiler = shutil.which("g++") or "g++"
    subprocess.run([compiler, *flags, *include, str(source), "-o", str(library), *link], check=True)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda *_args, **_kwargs: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_rng_state = lambda *_args, **_kwargs: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_args, **_kwargs: None
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.nn.functional.scaled_dot_product_attention = fused_attention


# ---- allocator ---------------------------------------------------------------------------------
@dataclass(eq=False)
class Block:
    """A piece of a segment."""

    address: int
    size: int
    small: bool
    before: Block | None = None
    after: Block | None = None
    used: bool = True


class OutOfMemoryError(Exception):
    """The capacity is reached and nothing can be given back."""


@dataclass
class CachingAllocator:
    """PyTorch's native CUDA allocator on sizes: best fit, splitting, merging, giving back whole segments."""

    capacity: int | None = None
    in_use: int = 0
    peak: int = 0
    reserved: int = 0
    peak_reserved: int = 0
    _free: dict[bool, list[tuple[int, int]]] = field(default_factory=lambda: {True: [], False: []})
    _blocks: dict[int, Block] = field(default_factory=dict)
    _next: int = 0

    def allocate(self, size: int) -> Block:
        """Return a block for this many bytes."""
        need = max(512, -(-size // 512) * 512)
        small = need <= MIB
        block = self._fitting(need, small) or self._segment(need, small)
        rest = block.size - need
        if rest >= 512 if small else rest > MIB:
            tail = Block(block.address + need, rest, small, block, block.after, used=False)
            if block.after is not None:
                block.after.before = tail
            block.after, block.size = tail, need
            self._put(tail)
        block.used = True
        self.in_use += block.size
        self.peak = max(self.peak, self.in_use)
        return block

    def release(self, block: Block) -> None:
        """Take a block back and merge it with free neighbours."""
        self.in_use -= block.size
        block.used = False
        before = block.before
        if before is not None and not before.used:
            self._take(before)
            self._join(before, block)
            block = before
        after = block.after
        if after is not None and not after.used:
            self._take(after)
            self._join(block, after)
        self._put(block)

    @staticmethod
    def _join(first: Block, second: Block) -> None:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first

    def _take(self, block: Block) -> None:
        free = self._free[block.small]
        del free[bisect_left(free, (block.size, block.address))]
        del self._blocks[block.address]

    def _put(self, block: Block) -> None:
        insort(self._free[block.small], (block.size, block.address))
        self._blocks[block.address] = block

    def _fitting(self, need: int, small: bool) -> Block | None:
        free = self._free[small]
        index = bisect_left(free, (need, -1))
        if index == len(free):
            return None
        return self._blocks.pop(free.pop(index)[1])

    def _segment(self, need: int, small: bool) -> Block:
        size = 2 * MIB if small else 20 * MIB if need < 10 * MIB else -(-need // (2 * MIB)) * 2 * MIB
        if self.capacity is not None and self.reserved + size > self.capacity:
            self._give_back()
            if self.reserved + size > self.capacity:
                raise OutOfMemoryError(f"{self.reserved} + {size} of {self.capacity} bytes")
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._next += size + 2 * MIB
        return Block(self._next - size, size, small)

    def _give_back(self) -> None:
        for small, free in self._free.items():
            whole = [pair for pair in free if self._is_segment(self._blocks[pair[1]])]
            for pair in whole:
                del self._blocks[pair[1]]
                self.reserved -= pair[0]
            self._free[small] = [pair for pair in free if pair not in set(whole)]

    @staticmethod
    def _is_segment(block: Block) -> bool:
        return block.before is None and block.after is None


# ---- tracing -----------------------------------------------------------------------------------
class Tracer:
    """Knows the bytes in use after every operation inside `tracing()`."""

    def __init__(self, capacity: int | None = None) -> None:
        self.allocator = CachingAllocator(capacity)
        self.requested = 0
        self.peak_requested = 0
        self.phase = ""
        self.peak_at = ("", "")
        self._live: dict[int, tuple[weakref.ref[Any], Block, int]] = {}

    def add(self, tensor: Any, operation: str) -> None:
        """Count a tensor's storage unless it is known."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or not size:
            return

        def gone(_: object) -> None:
            _, block, size = self._live.pop(key)
            self.requested -= size
            self.allocator.release(block)

        block = self.allocator.allocate(size)
        self._live[key] = (weakref.ref(storage, gone), block, size)
        self.requested += size
        self._note(operation)

    def scratch(self, size: int, operation: str) -> None:
        """Count what a kernel takes and gives back."""
        block = self.allocator.allocate(size)
        self.requested += size
        self._note(operation)
        self.requested -= size
        self.allocator.release(block)

    def keep(self, size: int) -> None:
        """Count something that stays, such as a workspace."""
        self.allocator.allocate(size)
        self.requested += size

    def _note(self, operation: str) -> None:
        if self.requested > self.peak_requested:
            self.peak_requested, self.peak_at = self.requested, (self.phase, operation)

    def tracing(self) -> Any:
        """Return the mode under which operations are seen; goes inside a FakeTensorMode."""
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        tracer = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                for leaf in tree_leaves(out):
                    if getattr(leaf, "device", None) is not None and leaf.device.type == "cuda":
                        tracer.add(leaf, str(func))
                if "flash_attention_backward" in str(func):  # float32 sums of the queries' gradients
                    tracer.scratch(4 * args[1].numel(), str(func))
                return out

        return Mode()


def fused_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Choose SDPA's kernel as PyTorch does on a GPU.

    Flash takes 16 bits without a mask; efficient takes the rest, but no keys of fewer heads, which leaves
    the reference kernel for those.
    """
    import torch

    aten = torch.ops.aten
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(dtype)
    with torch.autocast("cuda", enabled=False):
        if attn_mask is None and query.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if enable_gqa and query.shape[1] != key.shape[1]:
            return aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
            )[0]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            wide = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = wide.masked_fill_(attn_mask.logical_not(), float("-inf"))
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]
