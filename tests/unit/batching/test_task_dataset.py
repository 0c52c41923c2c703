from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from tests.fakes import jpeg, picture, row, tokenizer
from vlmpack.batching import HeterogeneousTaskDataset
from vlmpack.errors import ConfigError, SampleError
from vlmpack.geometry import Tiling

TINY = Tiling(tile_size=32, max_side=32, patch_size=16, tokens_per_tile=4)
JPEG = jpeg(60, 40)


def rows():
    return [
        row(images=[JPEG]),
        row("Which is larger?", images=[JPEG, JPEG]),
        row("Same person?", images=[JPEG, JPEG]) | {"subject_id": ["sub-1", "sub-2"]},
        row("How many is 1 + 1?", "2"),
    ]


def test_tasks_and_costs_are_known_before_pixels_are_read():
    dataset = HeterogeneousTaskDataset(rows(), tokenizer(), tiling=TINY)
    found = [dataset.get_sample_metadata(index) for index in range(len(dataset))]
    assert [each["task_type"] for each in found] == ["T1", "T2", "T3", "T1"]
    assert [each["num_images"] for each in found] == [1, 2, 2, 0]
    assert [each["num_patches"] for each in found] == [4, 8, 8, 0]  # 32 / 16 squared, an image
    assert dataset.task_types == ("T1", "T2", "T3")
    assert dataset.task_distribution == {"T1": 0.5, "T2": 0.25, "T3": 0.25}
    for index, each in enumerate(found):
        assert len(dataset[index]["input_ids"]) == each["num_tokens"]
        assert len(dataset[index]["images"]) == each["num_images"]


def test_a_sample_is_what_a_model_with_one_picture_an_image_takes():
    image = picture(32, 32, seed=3)
    file = io.BytesIO()
    image.save(file, "PNG")
    text = tokenizer()
    dataset = HeterogeneousTaskDataset([row("What?", "Noise.", [file.getvalue()])], text, tiling=TINY)
    sample = dataset[0]
    (pixels,) = sample["images"]
    assert pixels.shape == (3, 32, 32)
    want = torch.tensor(list(image.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, want)  # a picture of the right size is not resampled
    assert (sample["input_ids"] == text.convert_tokens_to_ids("<|image|>")).sum() == 4
    supervised = sample["labels"] != -100
    assert text.decode(sample["labels"][supervised]).startswith("Noise.")
    assert (sample["key"], sample["task_type"]) == ("0", "T1")


def test_tasks_can_be_named_by_anything_in_the_row():
    named = [each | {"source": f"s{number % 2}"} for number, each in enumerate(rows())]
    dataset = HeterogeneousTaskDataset(named, tokenizer(), tiling=TINY, task_of=lambda each: each["source"])
    assert dataset.task_types == ("s0", "s1")
    with pytest.raises(ConfigError, match="row 0: task_of must return a name, got None"):
        HeterogeneousTaskDataset(rows(), tokenizer(), tiling=TINY, task_of=lambda each: None)


def test_rows_that_cannot_be_used_are_refused_and_counted():
    bad = [
        *rows(),
        row(images=[b"<html>"]),
        row(answer="word " * 200),
        row(images=[JPEG] * 4),
        {"texts": [], "images": []},
    ]
    dataset = HeterogeneousTaskDataset(bad, tokenizer(), tiling=TINY, max_length=100)
    assert len(dataset) == 4
    assert dataset.num_refused == {
        "image_unreadable": 1,
        "sample_too_long": 1,
        "too_many_images": 1,
        "no_text": 1,
    }
    assert [refusal.key for refusal in dataset.refusals] == ["4", "5", "6", "7"]
    assert "4 images; the limit is 3 (max_images)" in dataset.refusals[2].message


def test_a_picture_broken_in_its_body_is_named_or_refused_beforehand():
    broken = [row(images=[JPEG]), row(images=[JPEG[: len(JPEG) // 2]])]
    dataset = HeterogeneousTaskDataset(broken, tokenizer(), tiling=TINY)
    assert len(dataset) == 2
    with pytest.raises(SampleError, match=r"row 1: .*verify=True refuses such rows beforehand"):
        dataset[1]
    checked = HeterogeneousTaskDataset(broken, tokenizer(), tiling=TINY, verify=True)
    assert len(checked) == 1
    assert checked.num_refused == {"image_truncated": 1}


def test_tiles_streams_and_empty_data_sets_are_refused():
    with pytest.raises(ConfigError, match="say max_side=32"):
        HeterogeneousTaskDataset(rows(), tokenizer(), tiling=Tiling(tile_size=32, max_side=64, patch_size=16))
    with pytest.raises(ConfigError, match="a stream has no length"):
        HeterogeneousTaskDataset(iter(rows()), tokenizer(), tiling=TINY)
    with pytest.raises(ConfigError, match=r"none of 1 rows can be used \(no_text: 1\)"):
        HeterogeneousTaskDataset([{"texts": [], "images": []}], tokenizer(), tiling=TINY)


def test_opened_pictures_work_too():
    dataset = HeterogeneousTaskDataset(
        [row(images=[Image.open(io.BytesIO(JPEG))])], tokenizer(), tiling=TINY, verify=True
    )
    assert dataset[0]["images"][0].shape == (3, 32, 32)
