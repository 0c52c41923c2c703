"""Admit: what may enter the look-ahead buffer. Every refusal says by how much, and what would help."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from vlmpack.errors import ConfigError, OversizeError, SampleError
from vlmpack.samples import Refusal, Sample
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmpack.budget import PackBudget, SampleCost
    from vlmpack.geometry import ImageRule

OversizePolicy: TypeAlias = Literal["drop", "raise", "fewer_tiles", "truncate_text"]
"""What to do with a sample that alone is over a limit:

* drop: refuse and count it;
* raise: stop with an error;
* fewer_tiles: cut its images into fewer tiles, at a lower resolution, until it fits;
* truncate_text: cut its end off, if no image token and not every target goes with it.

A sample that cannot be made to fit is refused and counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """The limits that each sample must keep alone.

    Raises:
        ConfigError: If a limit is not positive, or the policy cannot work.
    """

    budget: PackBudget
    """What a pack may hold."""
    max_sample_length: int | None = None
    """Samples with this many tokens or more are refused; None leaves it to the budget."""
    max_images_per_example: int | None = None
    """Samples with more images are refused."""
    extra_tokens: int = 0
    """Padding tokens that the packer appends to each sample."""
    oversize: OversizePolicy = "drop"
    """What to do with a sample that is too large."""
    tiling: ImageRule | None = None
    """The rule of the samples; needed by "fewer_tiles"."""
    retile: Callable[[Sample, ImageRule], Sample] | None = None
    """Cuts a sample's images by another tiling; needed by "fewer_tiles"."""

    def __post_init__(self) -> None:
        for name in ("max_sample_length", "max_images_per_example"):
            value, least = getattr(self, name), 1 if name == "max_sample_length" else 0
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.oversize not in get_args(OversizePolicy):
            raise ConfigError(f"oversize must be one of {get_args(OversizePolicy)}, got {self.oversize!r}")
        if self.oversize == "fewer_tiles" and (self.tiling is None or self.retile is None):
            raise ConfigError(
                "oversize='fewer_tiles' needs samples that can be tiled again, from a VQADataset"
            )

    def __call__(self, sample: Sample) -> Sample | Refusal:
        """Return the sample, smaller if the policy says so, or its refusal. O(1) unless it is re-tiled.

        Args:
            sample: Any sample.

        Raises:
            OversizeError: If the sample is too large and the policy is "raise".
        """
        fault = self._fault(sample)
        if fault is None:
            return sample
        smaller = self._smaller(sample) if fault.reason != "too_many_images" else None
        if smaller is not None:
            return smaller
        if self.oversize == "raise":
            raise OversizeError(f"sample {sample.key}: {fault.message}")
        return Refusal.of(sample.key, fault)

    def packed_cost(self, sample: Sample) -> SampleCost:
        """Return the sample's cost in a pack, appended padding included."""
        if not self.extra_tokens:
            return sample.cost
        return replace(sample.cost, num_tokens=sample.cost.num_tokens + self.extra_tokens)

    def _fault(self, sample: Sample) -> SampleError | None:
        cost = sample.cost
        if self.max_sample_length is not None and cost.num_tokens >= self.max_sample_length:
            return SampleError(
                "sample_too_long",
                f"{cost.num_tokens} tokens{_image_share(sample)}; the limit is under "
                f"{self.max_sample_length} (max_sample_length). {self._remedy(sample)}",
                num_tokens=cost.num_tokens,
                limit=self.max_sample_length,
            )
        if self.max_images_per_example is not None and cost.num_images > self.max_images_per_example:
            return SampleError(
                "too_many_images",
                f"{cost.num_images} images; the limit is {self.max_images_per_example} "
                "(max_images_per_example)",
                num_images=cost.num_images,
                limit=self.max_images_per_example,
            )
        excess = self.budget.exceeded_by(self.packed_cost(sample))
        if not excess:
            return None
        figures = ", ".join(
            f"{used} {axis} where a pack holds {limit}" for axis, (used, limit) in excess.items()
        )
        return SampleError(
            "over_budget",
            f"{figures}{_image_share(sample)}. {self._remedy(sample)}",
            **{f"num_{axis}": used for axis, (used, _) in excess.items()},
            **{f"max_{axis}": limit for axis, (_, limit) in excess.items()},
        )

    def _remedy(self, sample: Sample) -> str:
        """Return what would help this sample under this policy."""
        ways = ["Raise the limit"]
        ways += ["lower max_side"] if sample.geometries else []
        for policy, helps in (("fewer_tiles", sample.geometries), ("truncate_text", not sample.geometries)):
            if helps and self.oversize != policy:
                ways.append(f"use oversize={policy!r}")
        tried = self.oversize in {"fewer_tiles", "truncate_text"}
        failed = f" oversize={self.oversize!r} could not make it fit." if tried else ""
        return f"{' or '.join(ways)}.{failed}"

    def _smaller(self, sample: Sample) -> Sample | None:
        """Return the sample as the policy makes it fit, None if it does not or cannot."""
        if self.oversize == "fewer_tiles":
            return self._with_fewer_tiles(sample)
        if self.oversize == "truncate_text":
            return self._truncated(sample)
        return None

    def _truncated(self, sample: Sample) -> Sample | None:
        length = self.budget.max_tokens - self.extra_tokens
        if self.max_sample_length is not None:
            length = min(length, self.max_sample_length - 1)
        pairs = zip(sample.image_starts, sample.geometries, strict=True)
        cuts_an_image = any(start + geometry.num_tokens > length for start, geometry in pairs)
        if cuts_an_image or not (sample.labels[1:length] != IGNORE_INDEX).any():
            return None
        shorter = replace(
            sample,
            input_ids=sample.input_ids[:length],
            labels=sample.labels[:length],
            cost=replace(sample.cost, num_tokens=length),
        )
        return shorter if self._fault(shorter) is None else None

    def _with_fewer_tiles(self, sample: Sample) -> Sample | None:
        assert self.tiling is not None
        assert self.retile is not None
        tiling = self.tiling.smaller()
        while tiling is not None:
            smaller = self.retile(sample, tiling)
            if self._fault(smaller) is None:
                return smaller
            tiling = tiling.smaller()
        return None


def _image_share(sample: Sample) -> str:
    if not sample.geometries:
        return ""
    tiles = sum(geometry.num_tiles for geometry in sample.geometries)
    tokens = sum(geometry.num_tokens for geometry in sample.geometries)
    return f" ({tokens} tokens are for {tiles} tiles of {sample.cost.num_images} images)"
