"""GPU names and what they really offer: the bytes that CUDA reports, not the number on the box."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from vlmpack.errors import ConfigError

MIB: Final = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """As in the table below."""
    total_bytes: int
    """`torch.cuda.get_device_properties(0).total_memory`; the lowest figure seen where drivers differ."""
    workspace_bytes: int
    """Two cuBLAS workspaces: of 32 MiB from Hopper on, of 8.125 MiB before."""


_OLD: Final = 2 * 8_519_680
_NEW: Final = 2 * 32 * MIB

# MiB as PyTorch prints them in its out-of-memory errors ("GPU 0 has a total capacity of 79.18 GiB").
_TABLE: Final[dict[str, tuple[int, int]]] = {
    "3090": (24_268, _OLD),
    "4090": (24_217, _OLD),
    "A10": (22_589, _OLD),
    "L4": (22_558, _OLD),
    "L40S": (45_455, _OLD),
    "A100-40": (40_335, _OLD),
    "A100-80": (81_038, _OLD),
    "H100": (81_079, _NEW),
    "H200": (143_073, _NEW),
    "B200": (182_630, _NEW),
    "MI300X": (196_588, _NEW),
}

GPUS: Final[dict[str, Gpu]] = {
    name: Gpu(name=name, total_bytes=mib * MIB, workspace_bytes=workspace)
    for name, (mib, workspace) in _TABLE.items()
}
"""The GPUs that are known by name."""


def find_gpu(gpu: str | int) -> Gpu:
    """Return the GPU of this name ("H100", "NVIDIA A100-SXM4-80GB", "rtx 4090"), or one of that many bytes.

    Raises:
        ConfigError: If the name is unknown or ambiguous, or the bytes are not positive.
    """
    if isinstance(gpu, bool) or not isinstance(gpu, (str, int)):
        raise ConfigError(f"a GPU is a name or a number of bytes, got {gpu!r}")
    if isinstance(gpu, int):
        if gpu < 1:
            raise ConfigError(f"a GPU needs a positive number of bytes, got {gpu}")
        return Gpu(name=f"{gpu / 2**30:.1f} GiB", total_bytes=gpu, workspace_bytes=_NEW)
    words = re.sub(r"[^a-z0-9]+", " ", gpu.lower()).split()
    found = [name for name in GPUS if _matches(name, words)]
    if len(found) != 1:
        why = f"could be {' or '.join(found)}" if found else "is unknown"
        raise ConfigError(f"GPU {gpu!r} {why}. Known: {', '.join(GPUS)}; or give its bytes as a number.")
    return GPUS[found[0]]


def _matches(name: str, words: list[str]) -> bool:
    """Return whether the words name this GPU: its model, and its size where there are two of them."""
    model, _, size = name.lower().partition("-")
    if model not in words:
        return False
    sizes = {match[1] for word in words if (match := re.fullmatch(r"(\d+)(gb?)?", word)) and word != model}
    return not size or not sizes or size in sizes
