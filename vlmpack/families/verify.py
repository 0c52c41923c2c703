"""Run a packed batch against its samples one by one, and say by how much they differ and why."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch

from vlmpack.errors import ConfigError
from vlmpack.families.prepare import Fault, check_kernel, faults_of, kernel_of, unguarded, unwrapped
from vlmpack.families.rows import Rows, varlen
from vlmpack.families.table import family_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlmpack.families.family import Family
    from vlmpack.packing.assemble import PackedSequence

_OF_THE_LOSS: Final = (
    "labels",
    "targets",
    "num_items_in_batch",
    "loss_weights",
    "loss_weight_sum",
    "keys",
)
"""What a batch may carry for its loss alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentDifference:
    """How one sample of a packed batch differs from itself alone."""

    row: int
    """Of the batch."""
    start: int
    """Its first position in the row."""
    length: int
    """Its tokens."""
    num_image_tokens: int
    """Of them, those that stand for images."""
    largest: float
    """The largest absolute difference of a logit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IsolationReport:
    """What `verify_isolation` found; prints as a table."""

    segments: tuple[SegmentDifference, ...]
    """Every sample of the batch."""
    faults: tuple[Fault, ...]
    """Settings that end the isolation."""
    tolerance: float
    """Differences up to this are rounding."""

    @property
    def largest(self) -> float:
        """The largest difference of all samples."""
        return max((segment.largest for segment in self.segments), default=0.0)

    @property
    def is_isolated(self) -> bool:
        """Whether every sample is what it is alone."""
        return self.largest <= self.tolerance

    def __str__(self) -> str:
        lines = ["row  tokens              of images  largest difference"]
        for segment in self.segments:
            span = f"{segment.start}..{segment.start + segment.length - 1}"
            verdict = "" if segment.largest <= self.tolerance else "  leaks"
            lines.append(
                f"{segment.row:>3}  {span:<18} {segment.num_image_tokens:>10}  {segment.largest:.1e}{verdict}"
            )
        lines += [f"{fault.setting}: {fault.reason}" for fault in self.faults]
        if not self.is_isolated and not self.faults:
            lines.append(self._guess())
        lines.append("isolated" if self.is_isolated else "NOT isolated")
        return "\n".join(lines)

    def _guess(self) -> str:
        leaking = [segment for segment in self.segments if segment.largest > self.tolerance]
        if all(segment.num_image_tokens for segment in leaking) and len(leaking) < len(self.segments):
            return "images: only samples with images differ; are the images in the order of their tokens?"
        return "no setting of the batch explains it: does the model itself mix the rows of a batch?"


@torch.no_grad()
def verify_isolation(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    packs: Sequence[PackedSequence] | None = None,
    family: Family | None = None,
    tolerance: float = 1e-4,
) -> IsolationReport:
    """Compare the logits of a packed batch with those of its samples one by one.

    Alone, a sample gets no positions, masks or lengths: the model makes its own. In float32 differences of
    1e-6 are rounding, and a sample that sees another is off by about the size of a logit; in bfloat16 give a
    `tolerance` of about 0.1. Costs two forwards of the batch.

    Args:
        model: Of a known family; left as it was.
        batch: From `VQACollator(family=...)`, or a batch of your own with `cu_seq_lens_q`, or positions that
            restart, to say where samples lie.
        packs: What the batch was made of. Only then is it seen that images are not in the order of their
            tokens, which the batch alone cannot tell.
        family: Found by the model's config where None.
        tolerance: Largest difference of a logit that counts as rounding.

    Raises:
        ConfigError: If the family is unknown, the attention implementation cannot isolate it, or the images
            do not come to the image tokens.
    """
    inner = unwrapped(model)
    family = family or family_for(inner)
    kernel = kernel_of(inner)
    if family.is_transformers:
        check_kernel(family, kernel)
    inputs = {name: value for name, value in batch.items() if name not in _OF_THE_LOSS}
    pixels = inputs.get(family.pixel_name)
    if isinstance(pixels, torch.Tensor):
        inputs[family.pixel_name] = family.normalise(pixels, next(inner.parameters()).dtype)
    faults = tuple(faults_of(inputs, family, kernel))
    image_token = image_token_of(inner, family)
    if family.is_transformers and "position_ids" not in inputs:  # a model that makes its own, then
        inputs |= family.own_inputs(inputs["input_ids"] == image_token)
    alone = _samples(inputs, family, image_token, packs)
    was_training = inner.training
    inner.eval()
    try:
        with unguarded(inner):
            segments = _compare(inner, family, inputs, alone, image_token)
    finally:
        inner.train(was_training)
    return IsolationReport(segments=segments, faults=faults, tolerance=tolerance)


def _compare(
    model: torch.nn.Module,
    family: Family,
    batch: Mapping[str, Any],
    alone: Sequence[tuple[tuple[int, int, int], dict[str, Any]]],
    image_token: int,
) -> tuple[SegmentDifference, ...]:
    arguments = {name: value for name, value in batch.items() if name != "segment_ids"}
    packed = family.output_of(model(**arguments if family.is_transformers else batch))
    segments = []
    for (row, start, stop), sample in alone:
        logits = family.output_of(model(**sample))[0]
        segments.append(
            SegmentDifference(
                row=row,
                start=start,
                length=stop - start,
                num_image_tokens=int((sample["input_ids"] == image_token).sum()),
                largest=float((packed[row, start:stop] - logits).abs().max()),
            )
        )
    return tuple(segments)


def image_token_of(model: torch.nn.Module, family: Family) -> int:
    """Return the id of the token that a model replaces by image features.

    Args:
        model: Not wrapped.
        family: Of the model.

    Raises:
        ConfigError: If its config does not say.
    """
    holder = getattr(model, "config" if family.is_transformers else "tokenizer", None)
    for name in ("image_token_id", "image_token_index"):
        found = getattr(holder, name, None)
        if found is not None:
            return int(found)
    raise ConfigError(f"{type(model).__name__} does not say its image_token_id")


def _samples(
    batch: Mapping[str, Any],
    family: Family,
    image_token: int,
    packs: Sequence[PackedSequence] | None,
) -> list[tuple[tuple[int, int, int], dict[str, Any]]]:
    """Return where each sample lies, and what forward takes of it alone.

    Raises:
        ConfigError: If the images do not come to the image tokens.
    """
    ids = batch["input_ids"]
    units = family.unit_tokens(batch) if family.pixel_name in batch else []
    own_images = iter(_images_of(packs, family, batch)) if packs is not None else None
    found = []
    first = 0
    for row, start, stop in _segments(batch):
        own = ids[row : row + 1, start:stop]
        is_image = own == image_token
        left = int(is_image.sum())
        unit = first
        while left > 0 and unit < len(units):
            left -= units[unit]
            unit += 1
        if left:
            raise ConfigError(
                f"the images of the batch do not come to the image tokens of row {row}, positions {start} to "
                f"{stop - 1}: they are in another order, or of another batch"
            )
        sample: dict[str, Any] = {"input_ids": own, **family.own_inputs(is_image)}
        if family.is_transformers:
            sample["use_cache"] = False
        else:
            sample[family.pixel_name] = []
        if unit > first:
            taken = family.take_units(batch, first, unit)
            sample |= next(own_images) if own_images is not None else taken
        found.append(((row, start, stop), sample))
        first = unit
    return found


def _images_of(
    packs: Sequence[PackedSequence], family: Family, batch: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the pixels of each sample that has images, as the packs have them."""
    pixels = batch[family.pixel_name]
    found = []
    for pack in packs:
        first_image = first_tile = 0
        for cost in pack.costs:
            if not cost.num_images:
                continue
            images = slice(first_image, first_image + cost.num_images)
            num_tiles = sum(geometry.num_tiles for geometry in pack.geometries[images])
            empty = torch.empty((1, 0), dtype=torch.int64)
            rows = Rows(
                input_ids=empty,
                labels=empty,
                position_ids=empty,
                segment_ids=empty,
                tiles=pack.tiles[first_tile : first_tile + num_tiles],
                geometries=pack.geometries[images],
                image_sizes=pack.image_sizes[images],
                images_per_sample=(cost.num_images,),
                image_token_id=0,
            )
            made = family.pixels(rows, pixels.dtype)
            found.append({
                name: value.to(pixels.device) if isinstance(value, torch.Tensor) else value
                for name, value in made.items()
            })
            first_image, first_tile = images.stop, first_tile + num_tiles
    return found


def _segments(batch: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Return (row, start, stop) of each sample; padding is left out.

    Raises:
        ConfigError: If the batch does not say where samples lie.
    """
    rows, length = batch["input_ids"].shape
    positions = batch.get("position_ids")
    plain = positions[0] if positions is not None and positions.ndim == 3 else positions
    if "segment_ids" in batch:
        edges = [int(edge) for edge in varlen(batch["segment_ids"].cpu())["cu_seq_lens_q"]]
    elif "cu_seq_lens_q" in batch:
        edges = [int(edge) for edge in batch["cu_seq_lens_q"]]
    elif plain is not None:
        flat = plain.expand(rows, length).flatten()
        starts = torch.ones(len(flat), dtype=torch.bool)
        starts[1:] = (flat[1:] != flat[:-1] + 1).cpu()
        starts[::length] = True
        edges = [*torch.nonzero(starts).flatten().tolist(), len(flat)]
    else:
        raise ConfigError(
            "the batch does not say where samples lie: it has neither cu_seq_lens_q nor position_ids"
        )
    found = []
    for start, stop in pairwise(edges):
        row, first = divmod(start, length)
        if "segment_ids" in batch and not batch["segment_ids"][row, first]:
            continue
        # Padding has position 0 throughout, or is one token that no sample sees.
        own = plain[row, first : first + stop - start] if plain is not None else None
        if stop - start > 1 and (own is None or bool(own.any())):
            found.append((row, first, first + stop - start))
    return found
