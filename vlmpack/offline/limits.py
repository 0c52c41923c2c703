"""What a pack may hold, what a sample must keep alone, and what is told of one that does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vlmpack.budget import AXES, PackBudget
from vlmpack.packing.methods import Method

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]


class PlanSettings(BaseModel):
    """What a pack may hold, and how packs are made."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    seq_length: int = Field(4096, gt=0, description="tokens a pack may hold")
    max_images: int | None = Field(None, ge=0, description="images a pack may hold")
    max_patches: int | None = Field(None, ge=0, description="ViT patches a pack may hold")
    max_sample_length: int | None = Field(None, gt=0, description="refuse samples with as many tokens")
    max_images_per_example: int | None = Field(None, ge=0, description="refuse samples with more images")
    append_pad: bool = Field(True, description="append a padding token to each sample")
    method: Method = Field("auto", description="packing algorithm")
    balance: Literal["patches", "attention", "both"] | None = Field(None, description="even packs")
    seed: int = Field(0, ge=0, description="decides the packs and their order")
    group_bytes: int = Field(512 << 20, ge=0, description="files planned together; 0 plans all at once")

    @property
    def budget(self) -> PackBudget:
        """What a pack may hold."""
        return PackBudget(
            max_tokens=self.seq_length, max_images=self.max_images, max_patches=self.max_patches
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a sample must keep alone."""

    settings: PlanSettings
    """The limits, as the user gave them."""
    budget: Int64s
    """int64 [3]: what a sample may use of a pack, its appended padding left out."""

    @classmethod
    def of(cls, settings: PlanSettings) -> Limits:
        """Return the limits of some settings."""
        return cls(settings, settings.budget.as_array() - np.array([settings.append_pad, 0, 0]))

    def faults(self, cost: Int64s) -> list[tuple[str, npt.NDArray[np.bool_]]]:
        """Return each reason, and which of the samples have it."""
        found: list[tuple[str, npt.NDArray[np.bool_]]] = []
        if self.settings.max_sample_length is not None:
            found.append(("sample_too_long", cost[:, 0] >= self.settings.max_sample_length))
        if self.settings.max_images_per_example is not None:
            found.append(("too_many_images", cost[:, 1] > self.settings.max_images_per_example))
        over = np.asarray((cost > self.budget).any(axis=1))
        return [*found, ("over_budget", over)]

    def story(self, reason: str, cost: Int64s) -> str:
        """Return what a person is told."""
        tokens, images, _ = cost.tolist()
        if reason == "sample_too_long":
            limit = self.settings.max_sample_length
            return f"{tokens:,} tokens; the limit is under {limit:,} (max_sample_length)"
        if reason == "too_many_images":
            limit = self.settings.max_images_per_example
            return f"{images} images; the limit is {limit} (max_images_per_example)"
        over = [
            f"{used:,} {axis} where a pack holds {limit:,}"
            for axis, used, limit in zip(AXES, cost.tolist(), self.budget.tolist(), strict=True)
            if used > limit
        ]
        return "; ".join(over)
