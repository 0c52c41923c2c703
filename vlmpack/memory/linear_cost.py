"""One linear class for every memory formula: bytes = theta . features, with the known formulas by name.

    TASKS_3D   0.27 GB a batch + 0.63 GB a sample, times 1.85 or 1.87 for two-image tasks
    LLAVA_7B   0.8 GB a sample + 0.56 GB for each further image; 14 GB of weights beside it
    analytic   constant + bytes a row + bytes a tile, from the memory model itself

GB are decimal (1 GB = 10^9 bytes), as in `torch.cuda.memory_allocated() / 1e9`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vlmpack.errors import ConfigError
from vlmpack.memory.estimate import estimate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.regime import TrainingRegime

GB: Final = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearCost:
    """Bytes of a batch as a weighted sum of its features.

    Raises:
        ConfigError: If names and coefficients differ in number, or a coefficient is negative.
    """

    name: str
    """For reports."""
    features: tuple[str, ...]
    """Names of the features; "batch" is 1 for every batch."""
    theta: tuple[float, ...]
    """Bytes that each feature costs."""
    static_bytes: float = 0.0
    """What the device holds before the first batch: weights, optimizer."""

    def __post_init__(self) -> None:
        if len(self.features) != len(self.theta):
            raise ConfigError(
                f"{self.name}: {len(self.features)} features but {len(self.theta)} coefficients"
            )
        if any(value < 0 for value in (*self.theta, self.static_bytes)):
            raise ConfigError(f"{self.name}: a feature cannot cost less than nothing: {self.theta}")

    def vector(self, counts: Mapping[str, float]) -> tuple[float, ...]:
        """Return a batch's features in order; the constant is 1 unless it is given.

        Args:
            counts: How much of each feature the batch has; absent ones count 0.

        Raises:
            ConfigError: If there is a feature that the cost does not know.
        """
        unknown = sorted(set(counts) - set(self.features))
        if unknown:
            raise ConfigError(f"{self.name} does not know {unknown}; its features are {list(self.features)}")
        return tuple(counts.get(name, 1.0 if name == "batch" else 0.0) for name in self.features)

    def predict(self, counts: Mapping[str, float]) -> float:
        """Return the bytes of a batch, what the device holds already included."""
        pairs = zip(self.theta, self.vector(counts), strict=True)
        return self.static_bytes + sum(each * count for each, count in pairs)


# ---- tasks of one, two and three-dimensional pictures ------------------------------------------
BASE_GB: Final = 0.15
"""Model and tokenizer."""
FORWARD_GB: Final = 0.28
"""Forward pass of one image."""
BACKWARD_GB: Final = 0.35
"""Backward pass of one image."""
BATCH_GB: Final = 0.12
"""Each batch."""
TASK_MULTIPLIERS: Final = {"T1": 1.0, "T2": 1.85, "T3": 1.87}
"""What a sample costs in images: T1 one image, T2 two images, T3 two subjects. The multiplier stands for
the whole sample; it does not multiply its two images once more."""


def task_cost(multipliers: Mapping[str, float] = TASK_MULTIPLIERS, *, name: str = "TASKS_3D") -> LinearCost:
    """Return the cost of batches of tasks: 0.27 GB + 0.63 GB * multiplier a sample.

    Args:
        multipliers: Cost of a sample of each task, in images; any number of tasks.
        name: For reports.
    """
    image = (FORWARD_GB + BACKWARD_GB) * GB
    return LinearCost(
        name=name,
        features=("batch", *multipliers),
        theta=((BASE_GB + BATCH_GB) * GB, *(image * times for times in multipliers.values())),
    )


TASKS_3D: Final = task_cost()
"""Volumes of 96 to 128 voxels a side, small language model: 18.9 GB for 16 samples of T2 or so."""

SAMPLE_GB: Final = 0.8
"""A sample of one image."""
EXTRA_IMAGE_SHARE: Final = 0.7
"""What each further image adds, as a share of the first."""

LLAVA_7B: Final = LinearCost(
    name="LLAVA_7B",
    features=("samples", "extra_images"),
    theta=(SAMPLE_GB * GB, SAMPLE_GB * EXTRA_IMAGE_SHARE * GB),
    static_bytes=14 * GB,
)
"""A frozen 7B model in 16 bits with adapters: 0.8 GB a sample, 0.56 GB a further image, 14 GB of weights.
Full AdamW training of 7B would hold 56 GB and more."""


def analytic_cost(
    model: ModelShape, regime: TrainingRegime, *, tokens_per_row: int, rows: int = 2, tiles: int = 32
) -> LinearCost:
    """Return the memory model near a batch as constant + bytes a row + bytes a tile.

    The peak is linear where its phase does not change, which is everywhere but at very small batches.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        tokens_per_row: Positions of each row.
        rows: Rows about which the slopes are taken.
        tiles: Tiles about which they are taken; ignored without a vision encoder.

    Raises:
        ConfigError: If a number is not positive.
    """
    if rows < 1 or tiles < 1:
        raise ConfigError(f"the slopes are taken about a real batch, got {rows} rows and {tiles} tiles")
    tiles = tiles if model.vision is not None else 0

    def peak(more_rows: int, more_tiles: int) -> int:
        return estimate(
            model,
            regime,
            rows=rows + more_rows,
            tokens_per_row=tokens_per_row,
            tiles=tiles + more_tiles,
        ).peak_requested

    here = peak(0, 0)
    row = float(peak(1, 0) - here)
    tile = float(peak(0, 1) - here) if tiles else 0.0
    constant = max(0.0, here - row * rows - tile * tiles)
    names = ("batch", "rows", "tiles") if tiles else ("batch", "rows")
    return LinearCost(name=model.name, features=names, theta=(constant, row, tile)[: len(names)])
