"""What a sample costs, and what a pack or a batch may hold. Needs neither torch nor numba."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import numpy as np

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from os import PathLike

    import numpy.typing as npt

    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.regime import TrainingRegime

AXES: Final[tuple[str, ...]] = ("tokens", "images", "patches")
"""The axes of a cost or budget array, in order."""

UNLIMITED: Final[int] = 1 << 62
"""Stands for "no limit" in int64 arrays; loads stay far below it, so sums cannot overflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleCost:
    """What a sample, a pack or a batch uses of each budget; costs add up.

    Raises:
        ConfigError: If a count is negative.
    """

    num_tokens: int
    """Positions in the language model's sequence, image tokens included."""
    num_images: int
    """Images, not tiles."""
    num_patches: int
    """What the vision encoder attends over: 1,024 a tile in the reference model."""

    def __post_init__(self) -> None:
        if min(self.num_tokens, self.num_images, self.num_patches) < 0:
            raise ConfigError(f"a cost cannot be negative: {self}")

    def __add__(self, other: SampleCost) -> SampleCost:
        return SampleCost(
            num_tokens=self.num_tokens + other.num_tokens,
            num_images=self.num_images + other.num_images,
            num_patches=self.num_patches + other.num_patches,
        )

    def as_tuple(self) -> tuple[int, int, int]:
        """Return the cost in the order of `AXES`."""
        return (self.num_tokens, self.num_images, self.num_patches)


NO_COST: Final = SampleCost(num_tokens=0, num_images=0, num_patches=0)
"""The neutral element of addition."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackBudget:
    """What one pack may hold; None means no limit on that axis.

    Raises:
        ConfigError: If a limit is not a positive integer (images and patches may be 0: text only).
    """

    max_tokens: int
    """Length of a packed sequence."""
    max_images: int | None = None
    """Images, not tiles."""
    max_patches: int | None = None
    """ViT patches, 1,024 a tile in the reference model. The token budget alone does not bound them
    usefully: 4,096 tokens can hide 63 tiles, which is 64,512 patches."""

    def __post_init__(self) -> None:
        _check_limits(self, positive=("max_tokens",))

    @classmethod
    def for_gpu(
        cls,
        gpu: str | int,
        model: ModelShape | str | PathLike[str],
        regime: TrainingRegime | None = None,
        *,
        max_tokens: int,
        rows: int = 1,
        max_images: int | None = None,
        margin: float = 0.03,
        replay: bool = False,
    ) -> PackBudget:
        """Return what a pack may hold so that no batch of `rows` packs runs out of memory on this GPU.

        A batch that does not fit even without a picture raises ConfigError, which says what is missing.

        Args:
            gpu: A name out of `vlmpack.memory.GPUS`, or the device's bytes.
            model: The model's sizes, a preset's name, or a local transformers config.
            regime: How it is trained; None: with packed rows, and otherwise as the reference pipeline does.
            max_tokens: Length of a packed sequence.
            rows: Packs of a batch on one device.
            max_images: Images of a pack, for the caller's own reasons.
            margin: Share of the peak that is left free.
            replay: Ask a replay of the allocator too, which often takes more and a second of time.
        """
        # made by a layer above: the memory model knows what a budget is, a budget need not know it
        from vlmpack.memory.guard import BatchGuard

        guard = BatchGuard(model, regime, gpu, margin=margin, replay=replay)
        return guard.pack_budget(rows=rows, tokens_per_row=max_tokens, max_images=max_images)

    def as_array(self) -> npt.NDArray[np.int64]:
        """Return int64 [3] in the order of `AXES`, `UNLIMITED` where there is no limit."""
        return np.array([UNLIMITED if limit is None else limit for limit in self.as_tuple()], np.int64)

    def as_tuple(self) -> tuple[int, int | None, int | None]:
        """Return the limits in the order of `AXES`."""
        return (self.max_tokens, self.max_images, self.max_patches)

    def exceeded_by(self, cost: SampleCost) -> dict[str, tuple[int, int]]:
        """Return {axis: (cost, limit)} for each axis on which `cost` is over this budget."""
        pairs = zip(AXES, cost.as_tuple(), self.as_tuple(), strict=True)
        return {axis: (used, limit) for axis, used, limit in pairs if limit is not None and used > limit}


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchBudget:
    """What one training step may hold on one device; None means no limit.

    Raises:
        ConfigError: If a limit is not a positive integer (patches may be 0: text only).
    """

    max_packs: int | None = None
    """Rows of the batch."""
    max_patches: int | None = None
    """ViT patches of the batch: what decides the vision encoder's memory."""
    max_tokens: int | None = None
    """Positions of the batch, padding included."""

    def __post_init__(self) -> None:
        _check_limits(self, positive=("max_packs", "max_tokens"))

    @classmethod
    def for_gpu(
        cls,
        gpu: str | int,
        model: ModelShape | str | PathLike[str],
        regime: TrainingRegime | None = None,
        *,
        tokens_per_row: int,
        rows: int | None = None,
        margin: float = 0.03,
        replay: bool = False,
    ) -> BatchBudget:
        """Return the largest batch that fits this GPU: packs, patches and tokens of one step.

        Without `rows` it has as many packs as may all be full of tiles; where not even one may, one pack with
        as many tiles as fit. A batch that does not fit even without a picture raises ConfigError.

        Args:
            gpu: A name out of `vlmpack.memory.GPUS`, or the device's bytes.
            model: The model's sizes, a preset's name, or a local transformers config.
            regime: How it is trained; None: with packed rows, and otherwise as the reference pipeline does.
            tokens_per_row: Positions of each pack, padding included.
            rows: Packs of the batch.
            margin: Share of the peak that is left free.
            replay: Ask a replay of the allocator too, which often takes more and a second of time.
        """
        from vlmpack.memory.guard import BatchGuard

        guard = BatchGuard(model, regime, gpu, margin=margin, replay=replay)
        return guard.batch_budget(tokens_per_row=tokens_per_row, rows=rows)


def _check_limits(budget: PackBudget | BatchBudget, positive: tuple[str, ...]) -> None:
    for field in fields(budget):
        value, least = getattr(budget, field.name), 1 if field.name in positive else 0
        if value is None and field.name != "max_tokens":
            continue
        if value is None and isinstance(budget, BatchBudget):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < UNLIMITED:
            raise ConfigError(f"{field.name} must be an integer of at least {least}, got {value!r}")
