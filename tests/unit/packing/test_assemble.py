"""A pack is its samples side by side, kept apart, with the tiles of exactly those that are in it."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from tests.fakes import SMALL, drawn, jpeg, only, packs_of, picture, png, row, samples_of
from tests.strategies import made_samples
from vlmpack.budget import PackBudget, SampleCost
from vlmpack.errors import BudgetError
from vlmpack.images import MAX_PIXELS, GlobalAndSplitImages
from vlmpack.packing import Assembler
from vlmpack.samples import Sample


def assembler(budget=None, **settings):
    defaults = {"tile_size": 32, "pad_token_id": 9, "append_pad": True, "max_pixels": MAX_PIXELS}
    return Assembler(budget=budget, **{**defaults, **settings})


def text_sample(key, ids, labels):
    return Sample(
        key=key,
        input_ids=np.array(ids, np.int64),
        labels=np.array(labels, np.int64),
        images=(),
        geometries=(),
        image_starts=(),
        cost=SampleCost(num_tokens=len(ids), num_images=0, num_patches=0),
    )


A = text_sample("a", [1, 2, 3], [1, -100, 3])
B = text_sample("b", [4, 5], [-100, 5])


def test_two_samples_with_appended_padding():
    pack, refusals = assembler()([A, B])
    assert pack.input_ids.tolist() == [1, 2, 3, 9, 4, 5, 9]
    # The first label of a segment is masked: the position before it belongs to another sample.
    assert pack.labels.tolist() == [-100, -100, 3, -100, -100, 5, -100]
    assert pack.segment_ids.tolist() == [1, 1, 1, 0, 2, 2, 0]
    assert pack.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 0]
    assert pack.keys == ("a", "b")
    assert [cost.num_tokens for cost in pack.costs] == [4, 3]
    assert pack.cost == SampleCost(num_tokens=7, num_images=0, num_patches=0)
    assert len(pack) == 7
    assert refusals == []


def test_two_samples_without_padding():
    pack, _ = assembler(append_pad=False)([A, B])
    assert pack.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert pack.labels.tolist() == [-100, -100, 3, -100, 5]
    assert pack.segment_ids.tolist() == [1, 1, 1, 2, 2]
    assert pack.position_ids.tolist() == [0, 1, 2, 0, 1]


@given(samples=st.lists(made_samples(), min_size=1, max_size=5), append_pad=st.booleans())
def test_any_samples_side_by_side(samples, append_pad):
    pack, _ = assembler(append_pad=append_pad, decode=False)(samples)
    for tensor in (pack.input_ids, pack.labels, pack.segment_ids, pack.position_ids):
        assert tensor.dtype == torch.int64
        assert tensor.shape == (len(pack),)
    at = 0
    for number, sample in enumerate(samples, start=1):
        span = slice(at, at + len(sample.input_ids))
        assert pack.input_ids[span].tolist() == sample.input_ids.tolist()
        assert pack.labels[span].tolist() == [-100, *sample.labels[1:].tolist()]
        assert set(pack.segment_ids[span].tolist()) == {number}
        assert pack.position_ids[span].tolist() == list(range(len(sample.input_ids)))
        at = span.stop
        if append_pad:
            assert (pack.input_ids[at], pack.labels[at]) == (9, -100)
            assert (pack.segment_ids[at], pack.position_ids[at]) == (0, 0)
            at += 1
    assert at == len(pack) == pack.cost.num_tokens
    # What transformers looks at: a new segment wherever positions do not go on by one.
    restarts = 1 + int((pack.position_ids.diff() != 1).sum())
    assert restarts == len(samples) * (1 + append_pad)


def test_no_label_leaks_between_samples_after_the_shift():
    pack, _ = assembler(append_pad=False)([A, A, B, B])
    shifted = pack.labels.roll(-1)
    shifted[-1] = -100
    for position in range(len(pack) - 1):
        if pack.segment_ids[position] != pack.segment_ids[position + 1]:
            assert shifted[position] == -100


def picture_samples(*images):
    return list(samples_of([row(f"q{i}", images=list(group)) for i, group in enumerate(images)]))


def test_tiles_are_those_of_the_images_in_order():
    files = [[jpeg(70, 40)], [], [png(32, 32), png(40, 100, mode="RGBA")]]
    pack, _ = assembler()(picture_samples(*files))
    cut = GlobalAndSplitImages(32)
    expected = []
    for file in (file for group in files for file in group):
        picture = Image.open(io.BytesIO(file))
        geometry = SMALL.image(picture.height, picture.width)
        if picture.mode == "RGBA":
            page = Image.new("RGB", picture.size, "white")
            page.paste(picture, mask=picture.getchannel("A"))
            picture = page
        expected.append(cut(picture.resize((geometry.width, geometry.height), Image.Resampling.BICUBIC))[0])
    assert pack.tiles_per_image == tuple(map(len, expected)) == (7, 1, 9)
    assert torch.equal(pack.tiles, torch.cat(expected))
    assert pack.tiles.dtype == torch.uint8
    assert sum(cost.num_patches for cost in pack.costs) == 4 * len(pack.tiles)


def broken_body(width=64, height=64):
    file = jpeg(width, height)
    return file[: len(file) // 2]


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_sample_with_a_broken_image_leaves_and_the_others_stay(where):
    groups = [[jpeg(40, 40)], [png(32, 64)], [png(70, 40)]]
    whole, _ = assembler()(picture_samples(*groups))
    groups[where] = [png(32, 32), broken_body(), png(32, 32)]
    pack, refusals = assembler()(picture_samples(*groups))
    refusal = only(refusals)
    assert (refusal.key, refusal.reason) == (str(where), "image_truncated")
    left = [number for number in range(3) if number != where]
    assert pack.keys == tuple(map(str, left))
    bounds = np.cumsum([0, *whole.tiles_per_image])
    assert torch.equal(pack.tiles, torch.cat([whole.tiles[bounds[n] : bounds[n + 1]] for n in left]))
    assert pack.cost.num_tokens == len(pack)
    assert pack.segment_ids.max() == 2


def test_a_pack_of_broken_samples_only_is_none_with_all_refusals():
    pack, refusals = assembler()(picture_samples([broken_body()], [broken_body(32, 32)]))
    assert pack is None
    assert [refusal.key for refusal in refusals] == ["0", "1"]


def test_a_file_that_changed_since_it_was_planned_is_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(32, 32))
    sample = only(samples_of([row(images=["a.png"])], image_root=tmp_path))
    path.write_bytes(png(64, 64))
    pack, refusals = assembler()([sample])
    assert pack is None
    assert only(refusals).reason == "image_unreadable"
    path.unlink()
    assert only(assembler()([sample])[1]).reason == "image_unreadable"


def test_without_decoding_the_plan_is_the_same_and_there_are_no_tiles():
    samples = picture_samples([jpeg(70, 40)], [broken_body()])
    pack, refusals = assembler(decode=False)(samples)
    assert refusals == []
    assert pack.tiles.shape == (0, 3, 32, 32)
    assert pack.tiles_per_image == (7, 5)
    assert pack.cost.num_patches == 4 * 12


def test_images_are_kept_on_demand():
    samples = picture_samples([jpeg(70, 40)], [broken_body()], [png(9, 9)])
    pack, _ = assembler()(samples, keep_images=True)
    assert [image.source for image in pack.images] == [jpeg(70, 40), png(9, 9)]
    assert assembler()(samples)[0].images == ()


@pytest.mark.parametrize("axis", ["max_tokens", "max_images", "max_patches"])
def test_a_pack_over_its_budget_is_an_error_with_the_figures(axis):
    samples = picture_samples([jpeg(70, 40)], [jpeg(70, 40)])
    tokens = sum(sample.cost.num_tokens + 1 for sample in samples)
    limits = {"max_tokens": tokens, "max_images": 2, "max_patches": 56}
    assert assembler(PackBudget(**limits))(samples)[0].keys == ("0", "1")
    tight = PackBudget(**{**limits, axis: limits[axis] - 1})
    with pytest.raises(ValueError, match=rf"{limits[axis]} {axis[4:]} > {limits[axis] - 1} \(samples 0, 1\)"):
        assembler(tight)(samples)
    with pytest.raises(BudgetError):
        assembler(tight)(samples)


def test_an_empty_pack_has_every_tensor():
    pack = assembler().empty()
    assert len(pack) == 0
    assert pack.tiles.shape == (0, 3, 32, 32)
    assert pack.keys == ()
    assert pack.cost == SampleCost(num_tokens=0, num_images=0, num_patches=0)


def test_samples_are_not_changed():
    sample = only(picture_samples([jpeg(70, 40)]))
    before = replace(sample, input_ids=sample.input_ids.copy(), labels=sample.labels.copy())
    pack, _ = assembler()([sample, sample])
    pack.input_ids[:] = -1
    pack.labels[:] = -1
    assert np.array_equal(sample.input_ids, before.input_ids)
    assert np.array_equal(sample.labels, before.labels)


def test_pictures_in_memory_are_cut_like_files():
    file = png(70, 40)
    for image in (picture(70, 40), Image.open(io.BytesIO(file)), np.asarray(picture(70, 40))):
        from_memory, _ = assembler()(picture_samples([image]))
        from_file, _ = assembler()(picture_samples([file]))
        assert torch.equal(from_memory.tiles, from_file.tiles)


def test_threads_never_load_one_opened_picture_at_once(monkeypatch):
    load, inside, overlaps = ImageFile.ImageFile.load, set(), []

    def watched(self):
        if not self.tile:  # loaded before, which is safe
            return load(self)
        if id(self) in inside:
            overlaps.append(self)
        inside.add(id(self))
        time.sleep(0.01)
        try:
            return load(self)
        finally:
            inside.discard(id(self))

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    shared = Image.open(io.BytesIO(jpeg(70, 40)))
    rows = [row(f"q{number}", images=[shared]) for number in range(12)]
    packed, refused = drawn(packs_of(rows, seq_length=60, decode_threads=4, queue_size=8))
    assert (len(packed), refused) == (12, [])
    assert not overlaps


def test_a_broken_opened_picture_is_refused_for_every_row_that_shares_it():
    shared = Image.open(io.BytesIO(broken_body()))
    rows = [row(f"q{number}", images=[shared]) for number in range(6)] + [row()]
    dataset = packs_of(rows, seq_length=60, decode_threads=3)
    assert drawn(dataset) == (["6"], list("012345"))
    assert dataset.report.num_refused == {"image_truncated": 6}
