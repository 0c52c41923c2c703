"""The seeded sample costs of `vlmpack.packing.workloads`, under the name that the benchmarks use."""

from vlmpack.packing.workloads import (
    BUDGET,
    MAX_IMAGES,
    MAX_TILES,
    MAX_TOKENS,
    WORKLOADS,
    costs_of,
    tiles_of_images,
)

__all__ = ["BUDGET", "MAX_IMAGES", "MAX_TILES", "MAX_TOKENS", "WORKLOADS", "costs_of", "tiles_of_images"]
