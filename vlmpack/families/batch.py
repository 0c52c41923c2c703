"""Rows -> what a model's forward takes, and nothing that would break isolation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from vlmpack.budget import SampleCost
from vlmpack.errors import ConfigError
from vlmpack.packing.assemble import PackedSequence
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmpack.families.family import Family
    from vlmpack.families.rows import Rows
    from vlmpack.families.tokens import FamilyTokens

ModelBatch: TypeAlias = dict[str, Any]
"""Arguments of a model's forward: `model(**batch)`."""

DUMMY_KEY = "vlmpack dummy image"
"""Stands for a sample's key in a pack that was given an image to look at."""


def model_batch(
    rows: Rows, family: Family, *, pixel_dtype: torch.dtype, mask_dtype: torch.dtype
) -> ModelBatch:
    """Return the arguments of forward.

    Args:
        rows: The batch.
        family: Of the model.
        pixel_dtype: Of the pixels; torch.uint8 leaves normalising to the device.
        mask_dtype: Of masks, where the family needs them.
    """
    batch: ModelBatch = {**family.arguments(rows), **family.masks(rows, mask_dtype)}
    if rows.geometries:
        batch |= family.pixels(rows, pixel_dtype)
    return batch


def check_images(packs: Sequence[PackedSequence], family: Family, image_token_id: int) -> None:
    """Check, sample by sample, that image tokens and images agree: a model checks their sum alone.

    Args:
        packs: Rows of the batch.
        family: Of the model.
        image_token_id: The token that the model replaces by image features.

    Raises:
        ConfigError: If the packs were not cut for this family, or a sample has more or fewer image tokens
            than its images make.
    """
    for pack in packs:
        num_images = sum(cost.num_images for cost in pack.costs)
        num_tiles = sum(geometry.num_tiles for geometry in pack.geometries)
        if len(pack.geometries) != num_images or (num_images and pack.tiles.shape[-1] != family.tile_size):
            raise ConfigError(
                f"the packs were not cut for {family.name}: {num_images} images, {len(pack.geometries)} "
                f"geometries, tiles of {pack.tiles.shape[-1]} pixels where {family.name} takes "
                f"{family.tile_size}. Give VQADataset the same family= as the collator"
            )
        if len(pack.tiles) != num_tiles:
            raise ConfigError(
                f"a pack has {len(pack.tiles)} of {num_tiles} tiles (samples {', '.join(pack.keys)}): "
                "a packer with decode=False plans and counts, but its packs cannot be trained on"
            )
        _check_samples(pack, image_token_id)


def _check_samples(pack: PackedSequence, image_token_id: int) -> None:
    of_images = pack.segment_ids[pack.input_ids == image_token_id]
    counted = torch.bincount(of_images, minlength=len(pack.keys) + 1).tolist()
    first = 0
    for segment, (key, cost) in enumerate(zip(pack.keys, pack.costs, strict=True), start=1):
        own = pack.geometries[first : first + cost.num_images]
        first += cost.num_images
        needed = sum(geometry.num_image_tokens for geometry in own)
        if counted[segment] != needed:
            raise ConfigError(
                f"sample {key} has {counted[segment]} image tokens (id {image_token_id}), but its "
                f"{cost.num_images} images make {needed}: every image after it would be put in the wrong "
                "place. Were the tokens changed after VQADataset, or made by another tokenizer?"
            )


def dummy_sample(family: Family, tokens: FamilyTokens) -> PackedSequence:
    """Return a pack of one small picture and no label, for a batch that has no image.

    A rank without images has no gradient for the vision encoder, and the others would wait for it. The
    picture is black and white: classes of the Idefics family take one that is all zero for padding.

    Args:
        family: Of the model.
        tokens: Of the tokenizer.
    """
    small, smaller = family, family.smaller()
    while smaller is not None:
        small, smaller = smaller, smaller.smaller()
    side = family.tile_size
    (geometry,) = small.sample([(side, side)])
    board = np.indices((side, side)).sum(0) % 2 * 255
    picture = Image.fromarray(np.repeat(board[..., None], 3, axis=2).astype(np.uint8))
    cells = np.empty((geometry.num_tiles, side, side, 3), np.uint8)
    family.cut(picture, geometry, cells)
    input_ids = torch.from_numpy(tokens.alone(geometry))
    length = len(input_ids)
    return PackedSequence(
        input_ids=input_ids,
        labels=torch.full((length,), IGNORE_INDEX),
        segment_ids=torch.ones(length, dtype=torch.int64),
        position_ids=torch.arange(length),
        tiles=torch.from_numpy(cells).permute(0, 3, 1, 2),
        tiles_per_image=(geometry.num_tiles,),
        keys=(DUMMY_KEY,),
        costs=(SampleCost(num_tokens=length, num_images=1, num_patches=geometry.num_patches),),
        geometries=(geometry,),
        image_sizes=((side, side),),
    )


def with_dummy(
    packs: Sequence[PackedSequence], dummy: PackedSequence, max_length: int
) -> list[PackedSequence]:
    """Return the packs with the dummy as the last segment of the emptiest, or as a row of its own.

    Args:
        packs: Without any image.
        dummy: From `dummy_sample`.
        max_length: Of a row.

    Raises:
        ConfigError: If the dummy is longer than a row.
    """
    if len(dummy) > max_length:
        raise ConfigError(
            f"a dummy image takes {len(dummy)} tokens, but a row of the batch has {max_length}; raise "
            "max_length"
        )
    emptiest = min(range(len(packs)), key=lambda row: len(packs[row]))
    if len(packs[emptiest]) + len(dummy) > max_length:
        return [*packs, dummy]
    pack = packs[emptiest]
    number = int(pack.segment_ids.max()) + 1 if len(pack) else 1
    joined = replace(
        dummy,
        input_ids=torch.cat([pack.input_ids, dummy.input_ids]),
        labels=torch.cat([pack.labels, dummy.labels]),
        segment_ids=torch.cat([pack.segment_ids, dummy.segment_ids * number]),
        position_ids=torch.cat([pack.position_ids, dummy.position_ids]),
        keys=(*pack.keys, *dummy.keys),
        costs=(*pack.costs, *dummy.costs),
    )
    return [*packs[:emptiest], joined, *packs[emptiest + 1 :]]
