"""A model of a few thousand weights, and GPUs that take a given batch of it and nothing more."""

from __future__ import annotations

from vlmpack.memory import ConnectorShape, LanguageShape, ModelShape, VisionShape, check
from vlmpack.memory.regime import PACKED_REGIME

SMALL_MODEL = ModelShape(
    name="small",
    vision=VisionShape(layers=2, hidden=64, intermediate=128, heads=2, patch_size=16, tile_size=32),
    connector=ConnectorShape(factor=1),
    language=LanguageShape(layers=2, hidden=64, intermediate=128, heads=2, kv_heads=2, vocab=512),
)
"""Takes tiles of 32 pixels: 4 patches and 4 image tokens each."""


def gpu_for(*, rows: int, tokens_per_row: int, tiles: int) -> int:
    """Return the bytes of a GPU that takes this batch of packed rows, and not one byte more."""
    load = {"rows": rows, "tokens_per_row": tokens_per_row, "tiles": tiles}
    return check(SMALL_MODEL, PACKED_REGIME, 1 << 40, **load).required_bytes
