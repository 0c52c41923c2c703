"""Samples of different tasks, sizes and dimensions become one batch without losing anything."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import tokenizer
from vlmpack.batching import HeterogeneousBatch, HeterogeneousCollator
from vlmpack.errors import ConfigError


def sample(*shapes: tuple[int, ...], task: str = "T1", ids: tuple[int, ...] = (5, 6), **more: object) -> dict:
    images = [torch.full(shape, float(number + 1)) for number, shape in enumerate(shapes)]
    return {"images": images, "task_type": task, "input_ids": list(ids), **more}


def test_volumes_of_different_sizes_are_padded_to_six_axes():
    batch = HeterogeneousCollator()([
        sample((1, 4, 6, 2), task="T1", ids=(5, 6, 7), key="a", age=70),
        sample((1, 5, 6, 3), (1, 3, 2, 1), task="T3", ids=(8,), key="b"),
    ])
    assert batch.pixel_values.shape == (2, 2, 1, 5, 6, 3)  # batch, max_images, C, H, W, D
    assert batch.image_mask.tolist() == [[True, False], [True, True]]
    assert batch.image_sizes.tolist() == [[[4, 6, 2], [0, 0, 0]], [[5, 6, 3], [3, 2, 1]]]
    assert batch.pixel_values[0, 0].sum() == 4 * 6 * 2  # ones inside, zeros behind
    assert batch.pixel_values[1, 1].sum() == 2 * 3 * 2 * 1
    assert batch.task_types == ("T1", "T3")
    assert batch.task_ids.tolist() == [0, 2]
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch.metadata == ({"key": "a", "age": 70}, {"key": "b"})


@given(
    spatial=st.integers(1, 3),
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=3), min_size=1, max_size=6),
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=5),
)
def test_every_image_can_be_cut_out_again(spatial, sizes, counts):
    rng = torch.Generator().manual_seed(0)
    rows = [
        [torch.rand(2, *sizes[(row + at) % len(sizes)][:spatial], generator=rng) for at in range(count)]
        for row, count in enumerate(counts)
    ]
    batch = HeterogeneousCollator()([{"images": images, "task_type": "T1"} for images in rows])
    assert batch.image_mask.sum(1).tolist() == counts
    for row, images in enumerate(rows):
        for at, image in enumerate(images):
            cut = batch.pixel_values[row, at]
            for axis, size in enumerate(batch.image_sizes[row, at].tolist(), start=1):
                cut = cut.narrow(axis, 0, size)
            assert torch.equal(cut, image)
    if any(counts):  # and beside the images there is nothing
        assert torch.isclose(batch.pixel_values.sum(), sum(image.sum() for row in rows for image in row))
    else:
        assert batch.pixel_values is None


def test_a_batch_is_what_a_model_takes():
    batch = HeterogeneousCollator()([sample((3, 2, 2))])
    assert list(batch) == ["pixel_values", "image_mask", "input_ids", "attention_mask", "labels"]
    assert dict(**batch)["input_ids"] is batch.input_ids
    text_only = HeterogeneousCollator()([{"input_ids": [1], "task_type": "T1"}])
    assert "pixel_values" not in text_only
    assert len(text_only) == 4
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, HeterogeneousBatch)
    assert moved.pixel_values.is_meta
    assert moved.task_ids.is_meta
    assert moved.task_types == ("T1",)


def test_text_is_tokenised_and_padded_with_the_tokenizers_token():
    batch = HeterogeneousCollator(tokenizer())([{"text": "two words"}, {"text": "A longer line of text."}])
    assert batch.input_ids.shape[0] == 2
    assert batch.input_ids[0, -1] == tokenizer().pad_token_id
    assert (batch.labels[batch.attention_mask == 0] == -100).all()


def test_tasks_are_inferred_where_none_is_given():
    images = [torch.zeros(1, 2, 2)] * 2
    batch = HeterogeneousCollator()([{"images": images}, {"images": images, "subject_id": ["a", "b"]}])
    assert batch.task_types == ("T2", "T3")


def test_one_tensor_may_hold_several_images():
    several = {"images": torch.zeros(2, 1, 3, 3), "num_images": 2, "task_type": "T2"}
    one = {"images": torch.zeros(1, 3, 3), "task_type": "T1"}
    assert HeterogeneousCollator()([several, one]).image_mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "at least one sample"),
        ([sample((1, 2, 2), task="T9", key="k")], r"sample k is of task 'T9'.*tasks=\(\.\.\., 'T9'\)"),
        ([sample((1, 2, 2)), sample((3, 2, 2), key="k")], r"sample k has an image of shape \(3, 2, 2\)"),
        ([sample((1, 2, 2)), sample((1, 2, 2, 2), key="k")], "number of axes must agree"),
        ([sample((4,), key="k")], r"needs \(C, \*spatial\)"),
        ([sample((1, 2, 2), key="k", num_images=2)], "num_images says 2, but there are 1"),
        ([sample((1, 2, 2), key="k", labels=[1])], r"labels has shape \(1,\), input_ids \(2,\)"),
        ([sample((1, 2, 2)), {"images": [], "task_type": "T1"}], "the same text fields"),
        ([{"text": "hi", "key": "k"}], "sample k has text, but the collator has no tokenizer"),
    ],
)
def test_bad_samples_are_named(samples, message):
    with pytest.raises(ConfigError, match=message):
        HeterogeneousCollator()(samples)


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="distinct"):
        HeterogeneousCollator(tasks=("T1", "T1"))
    with pytest.raises(ConfigError, match="max_images"):
        HeterogeneousCollator(max_images=-1)
    with pytest.raises(ConfigError, match="sample k has 2 images, over max_images 1"):
        HeterogeneousCollator(max_images=1)([sample((1, 2, 2), (1, 2, 2), key="k")])
    assert HeterogeneousCollator(SimpleNamespace(pad_token_id=None))([sample((1, 2, 2))]).num_samples == 1
