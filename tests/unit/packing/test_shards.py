from __future__ import annotations

import io
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from tests import fakes
from vlmpack.budget import SampleCost
from vlmpack.errors import ConfigError, SourceError
from vlmpack.images import decode, read_header
from vlmpack.packing import ConstantLengthDataset, PackedSequence
from vlmpack.packing.shards import ShardWriter, write_shards
from vlmpack.samples import ImageRef
from vlmpack.stages import VQADataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` converts out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def packs_of(rows, **settings):
    samples = VQADataset(
        rows, fakes.tokenizer(), tiling=fakes.SMALL, image_root=settings.pop("image_root", None)
    )
    return ConstantLengthDataset(samples, seq_length=128, keep_images=True, decode_threads=0, **settings)


def hand_made(key: str, source: object = None, length: int = 3) -> PackedSequence:
    """Return a pack of one sample with the tokens 0, 1, 2, ... and at most one image."""
    images = ()
    if source is not None:
        header = read_header(source)
        images = (ImageRef(source=source, height=header.height, width=header.width, mode=header.mode),)
    tokens = torch.arange(length)
    return PackedSequence(
        input_ids=tokens,
        labels=torch.where(tokens > 0, tokens, -100),
        segment_ids=torch.ones_like(tokens),
        position_ids=tokens,
        tiles=torch.empty((0, 3, 32, 32), dtype=torch.uint8),
        tiles_per_image=(1,) * len(images),
        keys=(key,),
        costs=(SampleCost(num_tokens=length, num_images=len(images), num_patches=4 * len(images)),),
        images=images,
    )


def test_shards_load_back_with_every_column_as_it_was(tmp_path):
    rows = [fakes.row(images=[fakes.jpeg(40, 30, seed=i)], question=f"Question {i}?") for i in range(12)]
    packs = list(packs_of(rows))
    files = write_shards(packs, tmp_path / "out")
    assert [file.name for file in files] == ["packs-00000-of-00001.parquet"]

    loaded = load_dataset(str(tmp_path / "out"), split="train").with_format(
        "torch", columns=["input_ids", "labels"]
    )
    plain = loaded.with_format(None)
    assert len(packs) > 1
    assert len(loaded) == len(packs)
    for pack, tensors, row in zip(packs, loaded, plain, strict=True):
        assert torch.equal(tensors["input_ids"], pack.input_ids)
        assert torch.equal(tensors["labels"], pack.labels)
        assert row["position_ids"] == pack.position_ids.tolist()
        assert row["segment_ids"] == pack.segment_ids.tolist()
        assert row["keys"] == list(pack.keys)
        # A picture of 40 x 30 is cut into 2 x 2 tiles of 32 pixels and a global one, of 4 patches each.
        assert row["tiles_per_image"] == [5] * len(pack.keys)
        assert row["num_images"] == len(pack.keys)
        assert row["num_tiles"] == 5 * len(pack.keys)
        assert row["num_patches"] == 20 * len(pack.keys)
        assert [image.size for image in row["images"]] == [(40, 30)] * len(pack.keys)


def test_images_are_the_original_bytes_in_the_order_of_their_tokens(tmp_path):
    rows = [
        fakes.row(images=[fakes.jpeg(30, 20, seed=2 * i), fakes.jpeg(20, 30, seed=2 * i + 1)])
        for i in range(5)
    ]
    write_shards(packs_of(rows), tmp_path / "out")
    stored = pq.read_table(tmp_path / "out").to_pylist()
    assert sum(len(row["keys"]) for row in stored) == 5
    for row in stored:
        expected = [data for key in row["keys"] for data in rows[int(key)]["images"]]
        assert [image["bytes"] for image in row["images"]] == expected


def test_a_file_is_read_and_keeps_its_name(tmp_path):
    data = fakes.jpeg(30, 20)
    (tmp_path / "photo.jpg").write_bytes(data)
    write_shards(packs_of([fakes.row(images=["photo.jpg"])], image_root=tmp_path), tmp_path / "out")
    (row,) = pq.read_table(tmp_path / "out").to_pylist()
    assert row["images"] == [{"bytes": data, "path": "photo.jpg"}]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr", "HSV", "LAB", "F", "La"]
)
def test_a_picture_without_a_file_is_stored_without_loss(tmp_path, mode):
    noise = np.random.default_rng(0).integers(0, 65536, (9, 7), dtype=np.uint16)
    if mode == "I;16":
        picture = Image.fromarray(noise)
    elif mode == "F":
        picture = Image.fromarray((noise / 65535).astype(np.float32))
    elif mode == "LAB":
        picture = Image.merge("LAB", [fakes.picture(7, 9, seed).convert("L") for seed in range(3)])
    elif mode == "La":
        picture = fakes.picture(7, 9).convert("LA").convert("La")
    else:
        picture = fakes.picture(7, 9, mode=mode)
    assert picture.mode == mode
    write_shards([hand_made("a", picture)], tmp_path)
    (row,) = pq.read_table(tmp_path / "packs-00000-of-00001.parquet").to_pylist()
    # What training sees must not change, which is the picture after our own decoder.
    assert np.array_equal(decode(row["images"][0]["bytes"]), decode(picture))


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF", "PNG"])
def test_a_turned_picture_is_stored_upright_once(tmp_path, file_format):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    fakes.picture(7, 9).save(file, file_format, exif=exif)
    picture = Image.open(io.BytesIO(file.getvalue()))
    write_shards([hand_made("a", picture)], tmp_path)
    (row,) = load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train")
    assert row["images"][0].size == (9, 7)
    assert np.array_equal(row["images"][0].convert("RGB"), decode(file.getvalue()))


def test_a_full_shard_ends_and_names_count_all_shards(tmp_path):
    data = fakes.jpeg(30, 20)
    with ShardWriter(tmp_path / "out", shard_bytes=2 * len(data)) as writer:
        for index in range(5):
            writer.write(hand_made(str(index), data))
        assert not list((tmp_path / "out").glob("*.parquet"))
    # Two images fill a shard: 2 + 2 + 1 packs.
    names = [f"packs-0000{number}-of-00003.parquet" for number in range(3)]
    assert [file.name for file in writer.files] == names
    assert [pq.read_metadata(file).num_rows for file in writer.files] == [2, 2, 1]
    loaded = load_dataset("parquet", data_files=[str(file) for file in writer.files], split="train")
    assert [row["keys"] for row in loaded.remove_columns("images")] == [["0"], ["1"], ["2"], ["3"], ["4"]]
    assert sorted(os.listdir(tmp_path / "out")) == names


def test_packs_without_images_load_as_lists(tmp_path):
    write_shards([hand_made("a"), hand_made("b", length=2)], tmp_path)
    first, second = load_dataset(str(tmp_path), split="train")
    assert first["images"] == []
    assert first["labels"] == [-100, 1, 2]
    assert second["input_ids"] == [0, 1]


def test_every_file_says_how_it_was_made(tmp_path):
    write_shards([hand_made("a")], tmp_path, settings={"seq_length": 128, "image_root": tmp_path})
    schema = pq.read_schema(tmp_path / "packs-00000-of-00001.parquet")
    assert json.loads(schema.metadata[b"vlmpack"]) == {"seq_length": 128, "image_root": str(tmp_path)}


def test_a_failure_leaves_no_file_behind(tmp_path):
    def packs():
        for index in range(3):
            yield hand_made(str(index), fakes.jpeg(30, 20))
        raise SourceError("the disk with the images went away")

    with pytest.raises(SourceError, match="went away"):
        write_shards(packs(), tmp_path / "out", shard_bytes=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_no_pack_makes_no_folder(tmp_path):
    assert write_shards([], tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_refused_before_any_work(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty, it has notes\.txt; .* Choose another folder"):
        ShardWriter(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        ShardWriter(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="shard_bytes must be at least 1, got 0"):
        ShardWriter(tmp_path / "out", shard_bytes=0)


def test_a_pack_without_its_images_is_refused_with_the_remedy(tmp_path):
    packs = ConstantLengthDataset(
        VQADataset([fakes.row(images=[fakes.jpeg(30, 20)])], fakes.tokenizer(), tiling=fakes.SMALL),
        seq_length=128,
    )
    with pytest.raises(ConfigError, match=r"1 images carries 0 of them \(samples 0\); .*keep_images=True"):
        write_shards(packs, tmp_path / "out")


def test_a_file_that_vanished_is_named(tmp_path):
    file = tmp_path / "photo.jpg"
    file.write_bytes(fakes.jpeg(30, 20))
    pack = hand_made("row 7", file)
    file.unlink()
    with pytest.raises(SourceError, match=r"samples row 7 cannot be stored.*photo\.jpg"):
        write_shards([pack], tmp_path / "out")


def test_packs_carry_no_images_unless_asked():
    rows = [fakes.row(images=[fakes.jpeg(30, 20)])]
    packs = packs_of(rows)
    packs.keep_images = False
    assert [pack.images for pack in packs] == [()]
    packs.keep_images = True
    assert [[image.source for image in pack.images] for pack in packs] == [rows[0]["images"]]
