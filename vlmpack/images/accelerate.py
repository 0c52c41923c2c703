"""Optional packages that decode faster than Pillow, found at first use. Pillow alone always works.

| package | what for | how much faster than Pillow |
|---|---|---|
| simplejpeg | JPEG | 1.3 to 2.3 times, bit-equal |
| deflate, numba | plain 8-bit RGB and RGBA PNG | 3 to 8 times, bit-equal |
| numba | resizing | 8 to 14 times, bit-equal |
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Final

import numba
from PIL import features

if TYPE_CHECKING:
    from types import ModuleType

_PACKAGES: Final = ("simplejpeg", "deflate", "numba")


@cache
def module(name: str) -> ModuleType | None:
    """Return an optional package, None if it cannot be used here.

    Args:
        name: One of those that `accelerators` names.
    """
    try:
        found = importlib.import_module(name)
    except ImportError:  # not installed, or built for another system
        return None
    if name == "simplejpeg" and not features.check_feature("libjpeg_turbo"):
        return None  # this Pillow decodes with another library, whose pixels are others
    if name == "numba" and numba.config.DISABLE_JIT:
        return None  # interpreted, the kernels would take a thousand times as long
    return found


def accelerators() -> dict[str, str | None]:
    """Return the optional packages and their versions as used here, None for what Pillow does instead.

    For reports: what a machine decodes with explains its speed. No pixel depends on it.
    """
    return {name: metadata.version(name) if module(name) else None for name in _PACKAGES}
