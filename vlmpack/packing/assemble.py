"""Assemble: the samples of a pack -> one sequence. The only place where pixels exist.

    sample A (3 tokens)   sample B (2 tokens + 1 appended)
input_ids     a a a | b b P
labels        - a a | - b -      the first label of a segment is masked: its "previous" token
segment_ids   1 1 1 | 2 2 0      belongs to another sample
position_ids  0 1 2 | 0 1 0      restart, which is what isolates samples in transformers
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL.Image import Image, fromarray

from vlmpack.budget import NO_COST, SampleCost
from vlmpack.errors import BudgetError, SampleError
from vlmpack.images import empty_tiles, tile_image
from vlmpack.images.decode import check_size
from vlmpack.images.header import explain
from vlmpack.images.pixels import read_picture
from vlmpack.samples import Refusal, Sample
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    import numpy.typing as npt

    from vlmpack.budget import PackBudget
    from vlmpack.geometry import ImageGeometry
    from vlmpack.samples import ImageRef

Cut: TypeAlias = "Callable[[Image, ImageGeometry, npt.NDArray[np.uint8]], None]"
"""Writes what a vision encoder takes of an RGB picture, uint8 [N, P, P, 3]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSequence:
    """Samples that share one sequence, kept apart. L positions, N tiles, P pixels a side."""

    input_ids: torch.Tensor = field(repr=False)
    """int64 [L]."""
    labels: torch.Tensor = field(repr=False)
    """int64 [L], unshifted; -100 outside assistant turns and at the first position of each segment."""
    segment_ids: torch.Tensor = field(repr=False)
    """int64 [L], from 1; 0 on appended padding."""
    position_ids: torch.Tensor = field(repr=False)
    """int64 [L], from 0 in each segment."""
    tiles: torch.Tensor = field(repr=False)
    """uint8 [N, 3, P, P] in the order of their tokens; of a family without tiles, its patches."""
    tiles_per_image: tuple[int, ...]
    """Tiles of each image, in order; they sum to N."""
    keys: tuple[str, ...]
    """The samples' keys, in order."""
    costs: tuple[SampleCost, ...] = field(repr=False)
    """What each sample uses, appended padding included."""
    images: tuple[ImageRef, ...] = field(default=(), repr=False)
    """The images as the data set has them, in order, where the assembler was told to keep them."""
    geometries: tuple[ImageGeometry, ...] = field(default=(), repr=False)
    """How each image is cut, in order."""
    image_sizes: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    """Upright (height, width) of each image before it was resized, in order."""

    @property
    def cost(self) -> SampleCost:
        """What the pack uses of each budget."""
        return sum(self.costs, NO_COST)

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembler:
    """Turns the samples of a pack into a `PackedSequence`.

    Raises:
        BudgetError: When called, if the samples are over the budget together.
    """

    budget: PackBudget | None
    """Checked once more for every pack; None where a single sample is put into this form."""
    tile_size: int
    """Side of a tile in pixels."""
    pad_token_id: int
    """The token that is appended to a sample."""
    append_pad: bool
    """Append one padding token to each sample, as the reference pipeline does."""
    max_pixels: int
    """Images with more pixels are refused."""
    decode: bool = True
    """Decode images; without, the pack has an empty tile tensor, for planning runs."""
    cut: Cut | None = None
    """How a model family cuts a picture; None for the tiles of a `Tiling`."""

    def __call__(
        self,
        samples: Sequence[Sample],
        *,
        keep_images: bool = False,
        loading: AbstractContextManager[object] | None = None,
    ) -> tuple[PackedSequence | None, list[Refusal]]:
        """Return the pack, and a refusal for each sample whose image turned out to be broken.

        A broken image was not visible in its header; its sample leaves the pack, the others stay. The
        pack is None if none is left. O(tokens + pixels).

        Args:
            samples: At least one; together within the budget.
            keep_images: Let the pack carry the undecoded images too, for somebody who stores it.
            loading: Held while an opened Pillow image is loaded; a lock where packs are assembled in
                threads, as rows may share such an image.

        Raises:
            BudgetError: If they are not, which a correct packer makes impossible.
        """
        costs = tuple(self._cost(sample) for sample in samples)
        excess = self.budget.exceeded_by(sum(costs, NO_COST)) if self.budget else {}
        if excess:
            figures = ", ".join(f"{used} {axis} > {limit}" for axis, (used, limit) in excess.items())
            raise BudgetError(
                f"packed length is over the budget: {figures} (samples {', '.join(s.key for s in samples)}). "
                "This is a fault of the packer, please report it."
            )
        tiles, good, refusals = self._decode(samples, loading or nullcontext())
        if not good:
            return None, refusals
        kept = [samples[i] for i in good]
        images = tuple(image for sample in kept for image in sample.images) if keep_images else ()
        return self._join(kept, tuple(costs[i] for i in good), tiles, images), refusals

    def empty(self) -> PackedSequence:
        """Return a pack of no sample: what is left when every image of a pack is broken."""
        side = self.tile_size
        return self._join([], (), torch.empty((0, 3, side, side), dtype=torch.uint8), ())

    def _cost(self, sample: Sample) -> SampleCost:
        cost = sample.cost
        return SampleCost(
            num_tokens=cost.num_tokens + self.append_pad,
            num_images=cost.num_images,
            num_patches=cost.num_patches,
        )

    def _decode(
        self, samples: Sequence[Sample], loading: AbstractContextManager[object]
    ) -> tuple[torch.Tensor, list[int], list[Refusal]]:
        """Return the tiles of the samples whose images decode, their indices, and the others' refusals."""
        num_tiles = sum(geometry.num_tiles for sample in samples for geometry in sample.geometries)
        side = self.tile_size
        tiles = empty_tiles(num_tiles if self.decode else 0, side)
        good: list[int] = []
        refusals: list[Refusal] = []
        filled = 0
        for index, sample in enumerate(samples):
            end = filled
            try:
                for image, geometry in zip(sample.images, sample.geometries, strict=True):
                    if self.decode:
                        self._tile(image, geometry, tiles[end : end + geometry.num_tiles], loading)
                        end += geometry.num_tiles
            except SampleError as error:
                refusals.append(Refusal.of(sample.key, error))
            else:
                good.append(index)
                filled = end
        return tiles[:filled], good, refusals

    def _tile(
        self,
        image: ImageRef,
        geometry: ImageGeometry,
        out: torch.Tensor,
        loading: AbstractContextManager[object],
    ) -> None:
        if isinstance(image.source, Image):
            with loading:  # Pillow decodes an opened image in place, and two threads would garble it
                _load(image.source)
        if self.cut is not None:
            picture = read_picture(image.source, max_pixels=self.max_pixels)
            check_size("the plan was made with", (image.height, image.width), (picture.height, picture.width))
            self.cut(fromarray(picture.pixels), geometry, out.permute(0, 2, 3, 1).numpy())
            return
        tile_image(
            image.source,
            geometry,
            tile_size=self.tile_size,
            out=out,
            max_pixels=self.max_pixels,
            expected_size=(image.height, image.width),
        )

    def _join(
        self,
        samples: Sequence[Sample],
        costs: tuple[SampleCost, ...],
        tiles: torch.Tensor,
        images: tuple[ImageRef, ...],
    ) -> PackedSequence:
        length = sum(cost.num_tokens for cost in costs)
        input_ids = np.full(length, self.pad_token_id, np.int64)
        labels = np.full(length, IGNORE_INDEX, np.int64)
        segment_ids = np.zeros(length, np.int64)
        position_ids = np.zeros(length, np.int64)
        start = 0
        for segment, (sample, cost) in enumerate(zip(samples, costs, strict=True), start=1):
            stop = start + len(sample.input_ids)
            input_ids[start:stop] = sample.input_ids
            labels[start + 1 : stop] = sample.labels[1:]
            segment_ids[start:stop] = segment
            position_ids[start:stop] = np.arange(stop - start)
            start += cost.num_tokens
        return PackedSequence(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            segment_ids=torch.from_numpy(segment_ids),
            position_ids=torch.from_numpy(position_ids),
            tiles=tiles,
            tiles_per_image=tuple(geometry.num_tiles for sample in samples for geometry in sample.geometries),
            keys=tuple(sample.key for sample in samples),
            costs=costs,
            images=images,
            geometries=tuple(geometry for sample in samples for geometry in sample.geometries),
            image_sizes=tuple((image.height, image.width) for sample in samples for image in sample.images),
        )


def _load(image: Image) -> None:
    try:
        image.load()
    except Exception as error:
        # Pillow's decoders raise a dozen kinds of exception on damaged files, none documented.
        raise explain(error, None) from error
