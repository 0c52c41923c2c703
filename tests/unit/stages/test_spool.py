from __future__ import annotations

import pytest
import torch

from vlmpack import ConstantLengthDataset, SpooledSamples, VQADataset
from vlmpack.corpus import load_corpus, load_tokenizer
from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling
from vlmpack.images.spool import SpooledBytes
from vlmpack.stages import add_image_tokens


@pytest.fixture(scope="module")
def samples():
    tokenizer = load_tokenizer()
    add_image_tokens(tokenizer, Tiling())
    return VQADataset(load_corpus().select(range(20)), tokenizer)


def packs_of(samples):
    return list(ConstantLengthDataset(samples, decode_threads=1))


def test_packs_are_the_same(samples, tmp_path):
    plain, spooled = packs_of(samples), packs_of(SpooledSamples(samples, tmp_path))
    assert len(plain) == len(spooled) > 1
    for one, other in zip(plain, spooled, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.tiles, other.tiles)


def test_images_wait_on_disk_and_nothing_else_changes(samples):
    on_disk = 0
    for one, other in zip(samples, SpooledSamples(samples), strict=True):
        assert one.key == other.key
        for image, moved in zip(getattr(one, "images", ()), getattr(other, "images", ()), strict=True):
            assert (image.height, image.width) == (moved.height, moved.width)
            if isinstance(moved.source, SpooledBytes):
                on_disk += 1
                assert moved.source.read_bytes() == image.source
    assert on_disk > 3


def test_all_else_is_the_data_sets_own(samples):
    spooled = SpooledSamples(samples)
    assert spooled.num_rows == 20
    assert spooled.tokenizer is samples.tokenizer
    assert spooled[3].key == samples[3].key
    with pytest.raises(AttributeError, match="no_such_thing"):
        spooled.no_such_thing  # noqa: B018


def test_the_other_way_to_iterate_spools_too():
    class Resumable:
        def samples(self, wanted):
            return iter([wanted, None])

    assert list(SpooledSamples(Resumable()).samples("all")) == ["all", None]


def test_a_folder_that_is_missing_is_refused(samples, tmp_path):
    with pytest.raises(ConfigError, match="make it first"):
        SpooledSamples(samples, tmp_path / "none")
