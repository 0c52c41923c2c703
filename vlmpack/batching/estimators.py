"""Where a search begins: batch sizes estimated from crops, experts or depth, as documented and corrected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

ScaleTable: TypeAlias = "Sequence[tuple[float, float]]"
"""(up to this much, share of the base batch size), ascending; the last row is for everything above."""

MAX_CROPS_SCALES: Final[ScaleTable] = (
    (2, 1.0),
    (4, 0.8),
    (6, 0.6),
    (8, 0.5),
    (10, 0.4),
    (12, 0.3),
    (float("inf"), 0.25),
)
TOP_K_SCALES: Final[ScaleTable] = ((2, 1.0), (4, 0.9), (8, 0.8), (float("inf"), 0.7))


def estimate_batch_size_for_max_crops(
    max_crops: int, base_batch_size: int, scales: ScaleTable = MAX_CROPS_SCALES
) -> int:
    """Return the documented estimate for images of up to so many crops; it can be 0, see `starting_size`.

    Args:
        max_crops: Crops of an image.
        base_batch_size: The batch size for few crops; also the upper limit.
        scales: Other shares than the documented ones.

    Raises:
        ConfigError: If a number is out of its range.
    """
    return _by_table(max_crops, base_batch_size, scales, "max_crops")


def estimate_batch_size_for_top_k(top_k: int, base_batch_size: int, scales: ScaleTable = TOP_K_SCALES) -> int:
    """Return the documented estimate for a mixture of experts with so many active ones.

    Args:
        top_k: Experts a token.
        base_batch_size: The batch size for few experts; also the upper limit.
        scales: Other shares than the documented ones.

    Raises:
        ConfigError: If a number is out of its range.
    """
    return _by_table(top_k, base_batch_size, scales, "top_k")


def estimate_batch_size_for_blocks(num_active: int, total_blocks: int, base_batch_size: int) -> int:
    """Return the documented estimate for a part of the blocks: base * active / total.

    It is kept as documented and points the wrong way: fewer blocks need less memory, so that more samples
    fit. `estimate_for_depth` is the corrected one.

    Args:
        num_active: Blocks that run.
        total_blocks: Blocks of the whole model.
        base_batch_size: The batch size for the whole model.

    Raises:
        ConfigError: If a number is out of its range.
    """
    _check_depth(num_active, total_blocks, base_batch_size)
    return min(int(base_batch_size * (num_active / total_blocks)), base_batch_size)


estimate_batch_size_for_num_blocks = estimate_batch_size_for_blocks
"""The same under the other name that the reference document uses."""


def estimate_for_depth(
    num_active: int, total_blocks: int, base_batch_size: int, *, cap: int | None = None
) -> int:
    """Return the batch size that takes the memory which `base_batch_size` takes with all blocks.

    Args:
        num_active: Blocks that run.
        total_blocks: Blocks of the whole model.
        base_batch_size: The batch size that fits with all blocks.
        cap: Never more than this; None: than the base, which then is an upper limit, as documented.

    Raises:
        ConfigError: If a number is out of its range.
    """
    _check_depth(num_active, total_blocks, base_batch_size)
    limit = base_batch_size if cap is None else cap
    return min(base_batch_size * total_blocks // num_active, limit)


def starting_size(estimate: int, cap: int) -> int:
    """Return where a search begins: the estimate, at least 1, at most the upper limit.

    Args:
        estimate: From one of the estimators.
        cap: The largest size that may be used.
    """
    return max(1, min(estimate, cap))


def _by_table(value: int, base: int, scales: ScaleTable, name: str) -> int:
    _check(**{name: value, "base_batch_size": base})
    share = next((share for limit, share in scales if value <= limit), None)
    if share is None:
        raise ConfigError(f"{name} {value} is beyond the last row of the table, {scales[-1][0]}")
    return min(int(base * share), base)


def _check_depth(num_active: int, total_blocks: int, base: int) -> None:
    _check(num_active=num_active, total_blocks=total_blocks, base_batch_size=base)
    if num_active > total_blocks:
        raise ConfigError(f"{num_active} active blocks are more than the {total_blocks} there are")


def _check(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
