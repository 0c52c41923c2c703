"""How unevenly ranks are loaded, step by step: what a run waits for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vlmpack.errors import ConfigError
from vlmpack.ranks.balance import max_over_mean, step_loads

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.packing.inputs import Int64s


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepLoads:
    """One load over all steps, as largest / mean over the ranks of a step; 1 is even."""

    per_step: npt.NDArray[np.float64] = field(repr=False)
    """float64 [steps]; 1 where no rank has any."""
    mean: float
    """Mean over steps; 1 without steps."""
    p95: float
    """What 95 % of the steps do not exceed."""
    worst: float
    """The largest of all steps."""
    total: float
    """Sum of the largest over sum of the means: the time of all steps over that of even ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadImbalance:
    """How unevenly the ranks of each step are loaded."""

    num_steps: int
    """Steps."""
    patches: StepLoads
    """ViT patches: the vision encoder's work."""
    attention: StepLoads
    """Sum of squared sample lengths: the work of the language model's attention."""

    def as_dict(self) -> dict[str, dict[str, float] | int]:
        """Return the figures as plain values that JSON takes, without those of each step."""
        plain: dict[str, dict[str, float] | int] = {"num_steps": self.num_steps}
        for name in ("patches", "attention"):
            figures = asdict(getattr(self, name))
            del figures["per_step"]
            plain[name] = figures
        return plain


def load_imbalance(loads: Int64s, *, world_size: int, batch_size: int = 1) -> LoadImbalance:
    """Return how unevenly ranks are loaded if packs go to them in this order. O(packs).

    Args:
        loads: int64 [packs, 2]: ViT patches and attention of each pack. Step s is the next
            `world_size * batch_size` packs, and rank r of it has each `world_size`-th from r on.
        world_size: Ranks.
        batch_size: Packs a rank and step.

    Raises:
        ConfigError: If the packs are not even over the ranks.
    """
    if len(loads) % world_size:
        raise ConfigError(f"{len(loads)} packs are not even over {world_size} ranks")
    ratio_SK = max_over_mean(loads, world_size, batch_size)
    largest_SK, total_SK = step_loads(loads, world_size, batch_size)
    patches, attention = (
        _figures(ratio_SK[:, load], largest_SK[:, load], total_SK[:, load] / world_size) for load in range(2)
    )
    return LoadImbalance(num_steps=len(ratio_SK), patches=patches, attention=attention)


def _figures(
    ratio_S: npt.NDArray[np.float64], largest_S: Int64s, mean_S: npt.NDArray[np.float64]
) -> StepLoads:
    if not mean_S.sum() > 0:
        return StepLoads(per_step=ratio_S, mean=1.0, p95=1.0, worst=1.0, total=1.0)
    return StepLoads(
        per_step=ratio_S,
        mean=float(ratio_S.mean()),
        p95=float(np.quantile(ratio_S, 0.95)),
        worst=float(ratio_S.max()),
        total=float(largest_S.sum() / mean_S.sum()),
    )
