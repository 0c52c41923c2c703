"""Rows are read once each, by one worker each, whatever kind of data set they come from."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value
from torch.utils.data import Subset

from tests.fakes import Rows, SizedStream, Stream, broken_at, jpeg, row
from vlmpack.errors import ConfigError, SourceError
from vlmpack.samples import Refusal
from vlmpack.stages import RowSource


class Worker:
    def __init__(self, worker_id, num_workers):
        self.id, self.num_workers = worker_id, num_workers


def read(dataset, worker_id=0, num_workers=1, **settings):
    source = RowSource(dataset, **settings)
    with patch("vlmpack.stages.source.get_worker_info", lambda: Worker(worker_id, num_workers)):
        return list(source)


def test_a_list_gives_its_rows_with_their_positions_as_keys():
    assert read(["a", "b"]) == [("0", "a"), ("1", "b")]


def test_a_key_column_names_the_rows():
    rows = [{"id": 7}, {"id": "x"}]
    assert [key for key, _ in read(rows, key_column="id")] == ["7", "x"]
    assert [key for key, _ in read(Stream(rows.__getitem__, 2), key_column="id")] == ["7", "x"]


@pytest.mark.parametrize(
    "dataset", [[{"id": 1}], Stream(lambda _: {"id": 1}, 1), Rows(lambda _: {"id": 1}, 1)]
)
def test_a_misspelt_key_column_is_an_error_that_lists_the_columns(dataset):
    with pytest.raises(ConfigError, match=r"key_column 'ID' is not a column; there are 'id'"):
        read(dataset, key_column="ID")


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 7, 10])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [list, Rows, Stream])
def test_each_row_is_read_by_exactly_one_worker(kind, num_workers, num_rows):
    rows = list(range(num_rows))
    dataset = rows if kind is list else kind(rows.__getitem__, num_rows)
    parts = [read(dataset, worker, num_workers) for worker in range(num_workers)]
    assert sorted(value for part in parts for _, value in part) == rows
    assert sorted(int(key) for part in parts for key, _ in part) == rows
    assert all(int(key) == value for part in parts for key, value in part)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_a_map_style_data_set_is_split_evenly_and_in_order(num_workers):
    parts = [read(list(range(10)), worker, num_workers) for worker in range(num_workers)]
    assert [value for part in parts for _, value in part] == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_stream_that_splits_itself_is_not_split_again():
    dataset = Stream(lambda index: index, 4)
    parts = [read(dataset, worker, 2, splits_itself=True) for worker in range(2)]
    assert [[value for _, value in part] for part in parts] == [[0, 1, 2, 3]] * 2
    keys = [key for part in parts for key, _ in part]
    assert len(set(keys)) == 8, "rows of different workers must not share a key"


def test_a_torch_stream_that_knows_its_length_is_read_as_a_stream():
    assert read(SizedStream(["a", "b"])) == [("0", "a"), ("1", "b")]
    assert RowSource(SizedStream(["a"])).num_rows is None


def test_a_torch_subset_is_read_by_index():
    assert read(Subset(list("abcd"), [3, 1])) == [("0", "d"), ("1", "b")]


@pytest.mark.parametrize("broken", [(0,), (2,), (0, 1, 2, 3), (1, 3)])
def test_a_row_that_a_map_style_data_set_cannot_make_is_refused_and_the_rest_is_read(broken):
    items = read(Rows(broken_at(*broken), 4))
    assert len(items) == 4
    refused = {int(item.key): item for item in items if isinstance(item, Refusal)}
    assert tuple(refused) == broken
    for index, refusal in refused.items():
        assert refusal.reason == "source_error"
        assert refusal.numbers == {"row": index, "exception": "KeyError"}
        assert f"KeyError on row {index}" in refusal.message
        assert f"user bug at {index}" in refusal.message
    assert sorted(int(item[0]) for item in items if isinstance(item, tuple)) == sorted(
        {0, 1, 2, 3} - {*broken}
    )


def test_a_row_by_index_that_cannot_be_made_is_refused_too():
    source = RowSource(Rows(broken_at(1), 3))
    assert source.row(1).reason == "source_error"
    assert source.row(-1) == ("2", row("Question 2?"))
    with pytest.raises(IndexError, match="row 3 of 3"):
        source.row(3)
    with pytest.raises(ConfigError, match="a stream has no rows by index"):
        RowSource(Stream(str, 3)).row(0)


def test_a_transform_that_raises_does_not_end_a_hugging_face_data_set():
    def transform(batch):
        if 2 in batch["n"]:
            raise ValueError("user bug")
        return {"n": [10 * n for n in batch["n"]]}

    items = read(Dataset.from_dict({"n": list(range(5))}).with_transform(transform))
    outcomes = [item.reason if isinstance(item, Refusal) else item[1]["n"] for item in items]
    assert outcomes == [0, 10, "source_error", 30, 40]


@pytest.mark.parametrize("index", [0, 2])
def test_a_stream_that_raises_is_an_error_that_names_the_row(index):
    with pytest.raises(SourceError, match=rf"KeyError on row {index} \(after") as caught:
        read(Stream(broken_at(index), 4))
    assert f"user bug at {index}" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_mapped_hugging_face_stream_that_raises_names_the_row_and_the_last_good_one():
    def add(row):
        if row["n"] == 3:
            raise ValueError("user bug")
        return row

    rows = [{"n": n, "id": f"id-{n}"} for n in range(5)]
    dataset = IterableDataset.from_generator(lambda: iter(rows)).map(add)
    with pytest.raises(SourceError, match=r"ValueError on row 3 \(after row id-2\): user bug"):
        read(dataset, key_column="id")


def test_a_long_exception_text_is_cut():
    def make(index):
        raise ValueError("x" * 1_000_000)

    assert len(read(Rows(make, 1))[0].message) < 2_000
    with pytest.raises(SourceError) as caught:
        read(Stream(make, 1))
    assert len(str(caught.value)) < 2_000


def test_a_data_set_that_ends_before_its_length_is_an_error():
    dataset = Dataset.from_dict({"n": [0, 1, 2]})
    source = RowSource(dataset)
    with patch("vlmpack.stages.source._rows_at", lambda *_: iter([{"n": 0}])):
        iterator = iter(source)
        assert next(iterator) == ("0", {"n": 0})
        with pytest.raises(SourceError, match="says that it has 3 rows but ended at row 1"):
            next(iterator)


def hugging_face_rows(n):
    files = [jpeg(20 + i, 30) for i in range(n)]
    features = Features({"images": List(Image()), "n": Value("int64")})
    columns = {"images": [[{"bytes": file, "path": None}] for file in files], "n": list(range(n))}
    return Dataset.from_dict(columns, features=features), files


@pytest.mark.parametrize("num_workers", [1, 2])
def test_hugging_face_images_arrive_as_bytes_undecoded(num_workers):
    dataset, files = hugging_face_rows(5)
    items = [item for worker in range(num_workers) for item in read(dataset, worker, num_workers)]
    assert [raw["images"][0]["bytes"] for _, raw in items] == files
    assert [key for key, _ in items] == list("01234")
    shuffled = dataset.shuffle(seed=1)
    assert sorted(raw["n"] for _, raw in read(shuffled)) == list(range(5))


def test_hugging_face_streams_arrive_undecoded():
    dataset, files = hugging_face_rows(4)
    items = read(dataset.to_iterable_dataset(num_shards=2))
    assert [raw["images"][0]["bytes"] for _, raw in items] == files


def test_the_data_set_that_the_user_holds_is_left_as_it_was():
    dataset, _ = hugging_face_rows(2)
    read(dataset)
    assert dataset.format["type"] is None
    assert dataset[0]["images"][0].size == (20, 30)


@pytest.mark.parametrize("wrong", [3, None, object()])
def test_what_is_no_data_set_is_refused_at_construction(wrong):
    with pytest.raises(ConfigError, match="must be iterable, or have a length and an index"):
        RowSource(wrong)


def test_a_dictionary_of_splits_is_refused_and_the_split_named():
    with pytest.raises(ConfigError, match=r"dataset\['train'\]"):
        RowSource(DatasetDict({"train": Dataset.from_dict({"n": [1]})}))


def test_a_length_with_holes_is_not_trusted_blindly():
    rows = Rows(lambda index: [row(), row()][index], 3)  # IndexError on the third
    items = read(rows)
    assert [isinstance(item, Refusal) for item in items] == [False, False, True]
    assert "IndexError" in items[2].message


def test_numpy_rows_keep_their_types():
    assert read([np.int64(3)])[0][1].dtype == np.int64
