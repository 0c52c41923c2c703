"""Image columns become bytes; every other column keeps the values that the data set shows."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, Features, Image, List, Value, load_dataset
from PIL.Image import Image as Picture

from tests.fakes import jpeg, picture, row
from vlmpack.stages.features import undecoded
from vlmpack.stages.source import RowSource

MIXED = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
]


@pytest.fixture
def images() -> Dataset:
    features = Features({
        "images": List(Image()),
        "cover": {"front": Image()},
        "texts": List({"user": Value("string"), "assistant": Value("string")}),
    })
    one = row(images=[{"bytes": jpeg(8, 6), "path": "a.jpg"}])
    one["cover"] = {"front": {"bytes": jpeg(4, 4), "path": None}}
    return Dataset.from_list([one], features=features)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_come_as_bytes_however_deep(images, streaming):
    dataset = images.to_iterable_dataset() if streaming else images
    (_, found), *_ = RowSource(dataset)
    assert found["images"] == [{"bytes": jpeg(8, 6), "path": "a.jpg"}]
    assert found["cover"]["front"]["bytes"] == jpeg(4, 4)
    assert found["texts"] == [{"user": "What is it?", "assistant": "A picture."}]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_mixed_types_are_not_handed_on_as_json_text(tmp_path, streaming):
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in MIXED))
    dataset = load_dataset(
        "json", data_files=str(file), split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    found = [raw["messages"] for _, raw in RowSource(dataset)]
    assert [[turn["content"] for turn in turns] for turns in found] == [
        ["hi", "yes"],
        [[{"type": "text", "text": "a"}]],
    ]


def test_a_transform_of_the_user_stays():
    dataset = Dataset.from_list([{"number": 1}])
    dataset.set_transform(lambda batch: {"images": [[picture(5, 4)] for _ in batch["number"]]})
    assert undecoded(dataset) is dataset
    (_, found), *_ = RowSource(dataset)
    assert isinstance(found["images"][0], Picture)
