"""Collate: packs -> the batch of one step, refused with names and numbers if it is over its budget."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, get_args

import torch

from vlmpack.budget import BatchBudget
from vlmpack.errors import BudgetError, ConfigError
from vlmpack.families import Family, Rows, family_for
from vlmpack.families.batch import ModelBatch, check_images, dummy_sample, model_batch, with_dummy
from vlmpack.images import empty_tiles
from vlmpack.packing.pad_token import pad_token_id
from vlmpack.stages.placeholders import IGNORE_INDEX
from vlmpack.weighting import LossWeighting, check_weighting, loss_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from vlmpack.memory.guard import BatchGuard
    from vlmpack.packing.assemble import PackedSequence

logger = logging.getLogger(__name__)

OverLength: TypeAlias = Literal["raise", "discard"]
"""What to do with a pack longer than the batch's rows."""


class Batch(TypedDict):
    """One training step. B packs, L positions, N tiles over all packs, P pixels a side."""

    input_ids: torch.Tensor
    """int64 [B, L], padded on the right."""
    labels: torch.Tensor
    """int64 [B, L], unshifted, -100 where nothing is learnt."""
    position_ids: torch.Tensor
    """int64 [B, L], from 0 in each segment: what isolates samples in transformers, as long as no
    attention_mask is passed and use_cache is off."""
    segment_ids: torch.Tensor
    """int64 [B, L], from 1 in each row; 0 on padding."""
    tiles: torch.Tensor
    """uint8 [N, 3, P, P], row by row, in the order of their tokens."""
    tiles_per_pack: torch.Tensor
    """int64 [B]."""
    keys: list[tuple[str, ...]]
    """The samples of each row."""


class VQACollator:
    """Stacks packs into a `Batch` and checks it against what the device can hold.

    With a family, the batch is what the model's forward takes, `model(**batch)`, isolated by whatever the
    family needs for it, and nothing that would break it: see docs/families.md.

    Args:
        tokenizer: Gives the padding token.
        max_length: Length of a row; every pack is padded to it.
        budget: What one step may hold; checked before the batch is built.
        memory: Knows what the GPU takes; a batch that will not fit is refused before tiles are stacked, with
            its bytes by component.
        over_length: "raise" on a pack longer than `max_length`, or "discard" it, counted in
            `num_discarded` and logged.
        family: A family of `vlmpack.families` or its name; the one that `VQADataset` was given.
        pixel_dtype: With a family: what pixels are normalised to. torch.uint8 leaves them as they are, a
            quarter of the bytes, for a model that `prepare_model_for_packing` has made ready.
        mask_dtype: With a family that needs masks (Gemma 3): a float type is added to the scores, which
            eager attention needs; torch.bool is for scaled dot products alone, of any model type.
        dummy_image: With a family: give a batch without images a small one, in a segment without labels, so
            that each rank has a gradient for the vision encoder.
        loss_weighting: Give the batch what a weighted loss needs too, see `vlmpack.weighting`:
            `loss_weights` [B, L], their sum `loss_weight_sum`, `segment_ids` and `keys`. They are for the
            training loop, which takes them out before `model(**batch)`; `PackedTrainer` does.

    Raises:
        ConfigError: If a setting is invalid, the family unknown, or the tokenizer lacks its tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        budget: BatchBudget | None = None,
        memory: BatchGuard | None = None,
        over_length: OverLength = "raise",
        family: Family | str | None = None,
        pixel_dtype: torch.dtype = torch.float32,
        mask_dtype: torch.dtype = torch.float32,
        dummy_image: bool = False,
        loss_weighting: LossWeighting | None = None,
    ) -> None:
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ConfigError(f"max_length must be a positive integer, got {max_length!r}")
        if over_length not in get_args(OverLength):
            raise ConfigError(f"over_length must be one of {get_args(OverLength)}, got {over_length!r}")
        self._pad_token_id = pad_token_id(tokenizer)
        self._max_length = max_length
        self._budget = budget or BatchBudget()
        self._memory = memory
        self._over_length = over_length
        self.family: Family | None = None
        """Whose batches these are, None for a `Batch`."""
        if family is not None:
            self.family, self._tokens = _resolve(family).for_tokenizer(tokenizer)
        self._dtypes = {"pixel_dtype": pixel_dtype, "mask_dtype": mask_dtype}
        self._dummy = None
        if dummy_image:
            if self.family is None:
                raise ConfigError("dummy_image needs a family: which tokens stand for an image is its to say")
            self._dummy = dummy_sample(self.family, self._tokens)
        if loss_weighting is not None:
            check_weighting(loss_weighting)
        self.loss_weighting = loss_weighting
        """What a supervised token counts; None where batches do not say."""
        self.num_discarded = 0
        """Packs discarded for their length, in this process."""

    def __call__(self, packs: Sequence[PackedSequence]) -> Batch | ModelBatch:
        """Return the batch: a `Batch`, or with a family what forward takes. O(B x L + bytes of the tiles).

        Args:
            packs: Rows of the batch.

        Raises:
            BudgetError: If a pack is too long and the policy is to raise, if the batch is over its budget
                or does not fit the GPU, or if no pack is left.
            ConfigError: If the packs were not cut for the family, or a sample has more or fewer image tokens
                than its images make.
        """
        packs = [pack for pack in packs if self._fits(pack)]
        if not packs:
            raise BudgetError(
                f"no pack is left for the batch: none came, or all were over {self._max_length} positions"
            )
        if self.family is not None:
            check_images(packs, self.family, self._tokens.image)
        if self._dummy is not None and not any(pack.geometries for pack in packs):
            packs = with_dummy(packs, self._dummy, self._max_length)
        check_budget(packs, self._budget, self._max_length)
        if self._memory is not None:
            check_memory(packs, self._memory, self._max_length)
        batch = self._stack(packs)
        if self.family is None:
            return {**batch, **self._weights(batch)}
        rows = Rows(
            input_ids=batch["input_ids"],
            labels=batch["labels"],
            position_ids=batch["position_ids"],
            segment_ids=batch["segment_ids"],
            tiles=batch["tiles"],
            geometries=tuple(geometry for pack in packs for geometry in pack.geometries),
            image_sizes=tuple(size for pack in packs for size in pack.image_sizes),
            images_per_sample=tuple(cost.num_images for pack in packs for cost in pack.costs),
            image_token_id=self._tokens.image,
        )
        return model_batch(rows, self.family, **self._dtypes) | self._weights(batch)

    def weighing(self, loss_weighting: LossWeighting) -> VQACollator:
        """Return this collator with another `loss_weighting`.

        Args:
            loss_weighting: What a supervised token counts.
        """
        check_weighting(loss_weighting)
        other = copy.copy(self)
        other.loss_weighting = loss_weighting
        return other

    def _weights(self, batch: Batch) -> ModelBatch:
        if self.loss_weighting is None:
            return {}
        weights = loss_weights(batch["labels"], batch["segment_ids"], self.loss_weighting)
        return {
            "loss_weights": weights,
            "loss_weight_sum": weights.double().sum(),
            "segment_ids": batch["segment_ids"],
            "keys": batch["keys"],
        }

    def _stack(self, packs: Sequence[PackedSequence]) -> Batch:
        shape = (len(packs), self._max_length)
        input_ids = torch.full(shape, self._pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        segment_ids = torch.zeros(shape, dtype=torch.int64)
        for row, pack in enumerate(packs):
            length = len(pack)
            input_ids[row, :length] = pack.input_ids
            labels[row, :length] = pack.labels
            position_ids[row, :length] = pack.position_ids
            segment_ids[row, :length] = pack.segment_ids
        return Batch(
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            segment_ids=segment_ids,
            tiles=_joined_tiles([pack.tiles for pack in packs]),
            tiles_per_pack=torch.tensor([len(pack.tiles) for pack in packs]),
            keys=[pack.keys for pack in packs],
        )

    def _fits(self, pack: PackedSequence) -> bool:
        if len(pack) <= self._max_length:
            return True
        message = (
            f"a pack has {len(pack)} positions, over max_length {self._max_length} "
            f"(samples {', '.join(pack.keys)}); give the collator at least the seq_length of the packer"
        )
        if self._over_length == "raise":
            raise BudgetError(message)
        self.num_discarded += 1
        logger.warning("discarded: %s", message)
        return False


def _joined_tiles(tiles: list[torch.Tensor]) -> torch.Tensor:
    """Return the tiles one after the other; those of a single pack as they are, others in reused memory."""
    if len(tiles) == 1:
        return tiles[0]
    num_tiles, side = sum(map(len, tiles)), tiles[0].shape[-1]
    if any(part.dtype != torch.uint8 or part.shape[1:] != (3, side, side) for part in tiles):
        return torch.cat(tiles)
    return torch.cat(tiles, out=empty_tiles(num_tiles, side))


def _resolve(family: Family | str) -> Family:
    if isinstance(family, str):
        return family_for(family)
    if not isinstance(family, Family):
        raise ConfigError(
            f"family must be one of vlmpack.families or its name, got {type(family).__name__}; pass "
            "family_for(model.config, image_processor)"
        )
    return family


def check_budget(packs: Sequence[PackedSequence], budget: BatchBudget, row_length: int) -> None:
    """Check what a batch costs before it is built. O(samples).

    Args:
        packs: Rows of the batch.
        budget: What it may hold.
        row_length: Positions of a row, padding included.

    Raises:
        BudgetError: If it is over the budget; names the packs and samples that cost most.
    """
    patches = sum(pack.cost.num_patches for pack in packs)
    patch_remedy = (
        f", or give the packer max_patches of at most {(budget.max_patches or 0) // max(len(packs), 1)} so "
        "that such a batch cannot arise"
    )
    for name, used, limit, remedy in (
        ("packs", len(packs), budget.max_packs, ""),
        ("tokens", len(packs) * row_length, budget.max_tokens, ""),
        ("patches", patches, budget.max_patches, patch_remedy),
    ):
        if limit is not None and used > limit:
            raise BudgetError(
                f"the batch holds {used} {name}, over its budget of {limit} by {used - limit}. "
                f"{_most_expensive(packs)} Lower the batch size{remedy}."
            )


def check_memory(packs: Sequence[PackedSequence], memory: BatchGuard, row_length: int) -> None:
    """Ask the memory model whether a batch fits; refused there if it does not. O(samples).

    Args:
        packs: Rows of the batch.
        memory: Knows what the GPU takes.
        row_length: Positions of a row, padding included.
    """
    memory.admit(
        rows=len(packs),
        tokens_per_row=row_length,
        patches=sum(pack.cost.num_patches for pack in packs),
        samples={key: cost for pack in packs for key, cost in zip(pack.keys, pack.costs, strict=True)},
    )


def _most_expensive(packs: Sequence[PackedSequence]) -> str:
    rows = sorted(enumerate(packs), key=lambda row: -row[1].cost.num_patches)[:3]
    samples = sorted(
        ((cost.num_patches, key) for pack in packs for key, cost in zip(pack.keys, pack.costs, strict=True)),
        key=lambda pair: (-pair[0], pair[1]),
    )[:3]
    return (
        "Most expensive packs: "
        + ", ".join(
            f"row {row} ({pack.cost.num_patches} patches, {pack.cost.num_images} images)"
            for row, pack in rows
        )
        + "; samples: "
        + ", ".join(f"{key} ({num_patches} patches)" for num_patches, key in samples)
        + "."
    )
