"""Each family against its own processor: the same tokens, the same tiles, from every size."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fakes import picture
from tests.family_models import CASES, model_of, tokenizer_of
from tests.family_processors import DEFAULTS, processor_of, processor_tokenizer
from vlmpack.collate import VQACollator
from vlmpack.errors import SampleError
from vlmpack.families import family_for
from vlmpack.packing.assemble import Assembler
from vlmpack.stages import VQADataset

LEVELS = {"llava": 1}
"""Largest difference of a pixel in levels of 255, 0 where not named. LLaVA: a weight of a box may round
otherwise than that of the whole picture."""

SIDES = st.one_of(st.integers(1, 400), st.integers(1, 4), st.sampled_from([27, 28, 29, 56, 84, 399]))
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3)
LARGE = st.one_of(
    st.integers(1, 5000), st.integers(1, 8), st.sampled_from([336, 364, 384, 448, 512, 896, 4096])
)

TEMPLATE = (
    "{% for message in messages %}{% generation %}{{ message['content'] }}{% endgeneration %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the videos that nobody has
        yield


def sample_of(family, sizes):
    """Return our sample of a text with these images, and the images."""
    images = [picture(width, height, seed=7 * i + width) for i, (height, width) in enumerate(sizes)]
    text = "".join(f"\n{i} <image>" for i in range(len(sizes))) + "\n."
    row = {"images": images, "messages": [{"role": "assistant", "content": text}]}
    dataset = VQADataset(
        [row], processor_tokenizer(family), family=family, chat_template=TEMPLATE, max_pixels=1 << 40
    )
    return dataset[0], images, text.replace("<image>", family.in_message)


def check_against_the_processor(family, sizes):
    sample, images, text = sample_of(family, sizes)
    processor = processor_of(family)
    too_long = family.name.startswith("qwen") and any(max(size) > 200 * min(size) for size in sizes)
    if too_long:
        assert sample.reason == "image_shape"
        with pytest.raises(ValueError, match="aspect ratio"):
            processor(text=[text], images=[images], add_special_tokens=False)
        return
    theirs = processor(text=[text], images=[images], add_special_tokens=False)
    assert sample.input_ids.tolist() == list(theirs["input_ids"][0])
    num_tiles = sum(geometry.num_tiles for geometry in sample.geometries)
    pixels = torch.from_numpy(np.asarray(theirs["pixel_values"], np.float32))
    pixels = pixels.reshape(num_tiles, *pixels.shape[-1:] if pixels.ndim == 2 else pixels.shape[-3:])
    tiles = np.empty((num_tiles, family.tile_size, family.tile_size, 3), np.uint8)
    start = 0
    for image, geometry in zip(images, sample.geometries, strict=True):
        family.cut(image, geometry, tiles[start : start + geometry.num_tiles])
        start += geometry.num_tiles
    ours = torch.from_numpy(tiles).permute(0, 3, 1, 2)
    if "image_grid_thw" in theirs:
        grids = [[1, geometry.grid.rows, geometry.grid.columns] for geometry in sample.geometries]
        assert np.asarray(theirs["image_grid_thw"]).tolist() == grids
        ours = ours.unsqueeze(2).expand(-1, -1, family.temporal_patch_size, -1, -1).flatten(1)
    normalised = family.normalise(ours, torch.float32)
    level = 1 / 255 / min(family.image_std)
    assert float((normalised - pixels).abs().max()) <= LEVELS.get(family.name, 0) * level + 1e-6


@pytest.mark.parametrize("name", CASES)
@given(sizes=SIZES)
@example(sizes=[(1, 1)])
@example(sizes=[(1, 400)])
@example(sizes=[(400, 1), (3, 3)])
@settings(max_examples=25)
def test_tokens_and_tiles_are_the_processors(name, sizes):
    check_against_the_processor(CASES[name].family, sizes)


@pytest.mark.parametrize("name", CASES)
def test_a_family_is_read_off_its_models_config_and_its_processor(name):
    family = CASES[name].family
    processor = processor_of(family)
    for given_as in (processor, processor.image_processor, processor.image_processor.to_dict()):
        assert family_for(model_of(name).config, given_as) == family
    assert family_for(model_of(name), processor) == family


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@given(sizes=SIZES)
@settings(max_examples=500)
def test_tokens_and_tiles_are_the_processors_on_500_samples(name, sizes):
    check_against_the_processor(CASES[name].family, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(480, 640), (1500, 400), (1, 90)])
@pytest.mark.parametrize("name", DEFAULTS)
def test_tokens_and_tiles_are_the_processors_with_published_sizes(name, size):
    check_against_the_processor(DEFAULTS[name], [size])


@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - {"smolvlm", "llava", "gemma3"}))
@given(height=LARGE, width=LARGE)
@example(height=1, width=5000)
@example(height=5000, width=1)
@settings(max_examples=500)
def test_counts_are_the_processors_own_for_500_sizes(name, height, width):
    # By the processors' size helpers, which cost no pixel; LLaVA and Gemma 3 have one count for all sizes.
    family = DEFAULTS[name]
    processor = processor_of(family)
    if name.startswith("qwen") and max(height, width) > 200 * min(height, width):
        with pytest.raises(SampleError):
            family.image(height, width)
        with pytest.raises(ValueError, match="aspect ratio"):
            processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        return
    family, _ = family.for_tokenizer(processor.tokenizer)
    geometry = family.image(height, width)
    theirs = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
    assert geometry.num_tokens == theirs.num_image_tokens[0]
    if name != "llava_onevision":  # whose helper says 1, whatever the tiles
        assert (geometry.num_patches if name.startswith("qwen") else geometry.num_tiles) == (
            theirs.num_image_patches[0] or 1
        )


@given(height=LARGE, width=LARGE)
@settings(max_examples=500)
def test_smolvlm_cuts_as_its_image_processor_counts(height, width):
    family = DEFAULTS["smolvlm"]
    tiles, rows, columns = processor_of(family).image_processor.get_number_of_image_patches(height, width)
    geometry = family.image(height, width)
    assert (geometry.num_tiles, geometry.grid.rows, geometry.grid.columns) == (
        (tiles, rows, columns) if tiles else (1, 1, 1)
    )
    assert geometry.num_image_tokens == 64 * geometry.num_tiles


@pytest.mark.parametrize("name", CASES)
@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=2))
@example(sizes=[(1, 1)])
@example(sizes=[(1, 200)])
@example(sizes=[(200, 1)])
@settings(max_examples=20)
def test_the_model_makes_as_many_features_as_there_are_tokens(name, sizes):
    sizes = [size for size in sizes if max(size) <= 200 * min(size)] or [(3, 5)]
    sample, *_ = sample_of(CASES[name].family, sizes)
    assemble = Assembler(
        budget=None,
        tile_size=CASES[name].family.tile_size,
        pad_token_id=256,
        append_pad=False,
        max_pixels=10**6,
        cut=CASES[name].family.cut,
    )
    pack, _ = assemble([sample])
    collate = VQACollator(processor_tokenizer(CASES[name].family), len(pack), family=CASES[name].family)
    with torch.no_grad():
        batch = collate([pack])
        batch["input_ids"] = moved(batch["input_ids"], name)
        assert torch.isfinite(model_of(name)(**batch).logits).all()  # it raises where they differ


def moved(ids: torch.Tensor, name: str) -> torch.Tensor:
    """Return the ids with the image token where the tiny model has it; its other tokens do not matter."""
    theirs = processor_tokenizer(CASES[name].family).convert_tokens_to_ids(CASES[name].family.image_token)
    own = tokenizer_of(name).convert_tokens_to_ids(CASES[name].family.image_token)
    return torch.where(ids == theirs, own, ids.clamp(max=255))
