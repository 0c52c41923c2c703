"""The index: what the stages say of every row, file by file; read again only what changed."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import pyarrow.parquet as pq
import pytest

from tests.unit.offline.conftest import FILES, HERE, write_corpus
from vlmpack.corpus import load_corpus
from vlmpack.errors import ConfigError, SourceError
from vlmpack.offline import Engine, Index, IndexSettings, build_index
from vlmpack.offline import index as index_module
from vlmpack.offline.files import dataset_files, read_rows
from vlmpack.samples import Refusal


def records(index):
    return [
        record
        for number in range(len(index.files))
        for record in pq.read_table(index.part(number)).to_pylist()
    ]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_it_holds_what_the_stages_make_of_every_row(index, samples):
    found = records(index)
    assert [each.file.name for each in index.files] == list(FILES)
    assert len(found) == len(samples) == index.num_rows == 24
    assert not any(isinstance(sample, Refusal) for sample in samples)
    for record, sample in zip(found, samples, strict=True):
        assert record["reason"] is None
        assert (record["tokens"], record["images"], record["patches"]) == sample.cost.as_tuple()
        assert record["input_ids"] == sample.input_ids.tolist()
        assert record["labels"] == sample.labels.tolist()
        assert record["image_starts"] == list(sample.image_starts)
        assert list(zip(record["heights"], record["widths"], strict=True)) == [
            (image.height, image.width) for image in sample.images
        ]
        assert record["tiles"] == sum(geometry.num_tiles for geometry in sample.geometries)
    assert found[14]["key"] == "deep/b.parquet:0"


def test_a_row_that_cannot_be_packed_is_there_with_its_reason(tmp_path):
    rows = [
        {"texts": [{"user": "Hello", "assistant": "Hi"}]},
        {"texts": []},
        {"images": [{"bytes": b"no picture"}], "texts": [{"user": "What?", "assistant": "That."}]},
    ]
    lines = [json.dumps(row, default=lambda data: data.decode()) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[0], "{broken", lines[1], lines[2]]) + "\n")
    made = build_index(tmp_path / "rows.jsonl", tmp_path / "index", engine=HERE)
    found = records(made)
    assert [record["reason"] for record in found] == [None, "bad_row", "no_text", "image_unreadable"]
    assert dict(made.refused) == {"bad_row": 1, "no_text": 1, "image_unreadable": 1}
    assert all(record["message"] for record in found[1:])


def test_a_second_run_reads_nothing_and_writes_the_same(corpus, tmp_path, monkeypatch):
    first = build_index(corpus, tmp_path / "index", engine=HERE)
    before = contents(tmp_path / "index")
    read = []
    monkeypatch.setattr(index_module, "read_rows", lambda path: read.append(path) or iter(()))
    again = build_index(corpus, tmp_path / "index", engine=HERE)
    assert read == []
    assert contents(tmp_path / "index") == before
    assert again.digest == first.digest


def test_files_that_were_added_or_changed_are_read_and_no_others(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "corpus")
    build_index(source, tmp_path / "index", engine=HERE)
    write_corpus(source, {"deep/c.parquet": range(44, 50), "d.parquet": range(50, 52)})
    (source / "a.parquet").unlink()
    read = []
    monkeypatch.setattr(index_module, "read_rows", lambda path: read.append(path.name) or read_rows(path))
    updated = build_index(source, tmp_path / "index", engine=HERE)
    assert sorted(read) == ["c.parquet", "d.parquet"]
    assert [each.file.name for each in updated.files] == ["d.parquet", "deep/b.parquet", "deep/c.parquet"]
    assert updated.num_rows == 7 + 6 + 2
    assert len(list((tmp_path / "index" / "parts").iterdir())) == 3, "parts of files that are gone are gone"
    build_index(source, tmp_path / "anew", engine=HERE)
    assert contents(tmp_path / "anew") == contents(tmp_path / "index")


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("at", [7, 20])
def test_a_killed_run_goes_on_and_ends_the_same(corpus, tmp_path, monkeypatch, at):
    rows = 0

    def dying(path):
        nonlocal rows
        for row in read_rows(path):
            if rows == at:
                raise KilledError
            rows += 1
            yield row

    monkeypatch.setattr(index_module, "read_rows", dying)
    with pytest.raises(KilledError):
        build_index(corpus, tmp_path / "index", engine=HERE)
    with pytest.raises(ConfigError, match="no whole index"):
        Index.open(tmp_path / "index")
    monkeypatch.undo()
    build_index(corpus, tmp_path / "index", engine=HERE)
    build_index(corpus, tmp_path / "whole", engine=HERE)
    assert contents(tmp_path / "index") == contents(tmp_path / "whole")


def test_an_index_of_other_settings_is_refused_with_what_changed(corpus, tmp_path):
    build_index(corpus, tmp_path / "index", engine=HERE)
    with pytest.raises(ConfigError, match=r"stale: max_side was 2048 and is 1024"):
        build_index(corpus, tmp_path / "index", IndexSettings(max_side=1024), engine=HERE)
    with pytest.raises(ConfigError, match=r"stale: chat_template was"):
        build_index(
            corpus,
            tmp_path / "index",
            IndexSettings(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"),
            engine=HERE,
        )


def test_two_runs_do_not_write_one_folder(corpus, tmp_path):
    from vlmpack.offline.atomic import only_run

    with only_run(tmp_path / "index"), pytest.raises(ConfigError, match="another run is writing"):
        build_index(corpus, tmp_path / "index", engine=HERE)


def test_a_broken_file_and_a_folder_without_any_say_so(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SourceError, match=r"broken\.parquet cannot be read"):
        build_index(tmp_path, tmp_path / "index", engine=HERE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no file that ends in one of \.parquet"):
        build_index(tmp_path / "empty", tmp_path / "index2", engine=HERE)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = load_corpus().with_format("arrow").select(range(6)).to_list()
    (tmp_path / "parquet").mkdir()
    load_corpus().select(range(6)).to_parquet(str(tmp_path / "parquet" / "x.parquet"))
    load_corpus().select(range(6)).save_to_disk(str(tmp_path / "arrow"))
    (tmp_path / "lines" / "images").mkdir(parents=True)
    (tmp_path / "tar").mkdir()
    lines = []
    with tarfile.open(tmp_path / "tar" / "x.tar", "w") as archive:
        for number, row in enumerate(rows):
            names = []
            for place, image in enumerate(row["images"]):
                name = f"images/{number}-{place}.bin"
                (tmp_path / "lines" / name).write_bytes(image["bytes"])
                names.append(name)
                _member(archive, f"{number:03d}.{place}.png", image["bytes"])
            lines.append(json.dumps({"images": names, "texts": row["texts"]}))
            _member(archive, f"{number:03d}.json", json.dumps({"texts": row["texts"]}).encode())
    (tmp_path / "lines" / "x.jsonl").write_text("\n".join(lines))
    made = {
        kind: records(build_index(tmp_path / kind, tmp_path / f"index-{kind}", engine=HERE))
        for kind in ("parquet", "arrow", "lines", "tar")
    }
    for kind, found in made.items():
        for record in found:
            del record["key"]
        assert found == made["parquet"], kind
    assert len(made["parquet"]) == 6


def _member(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def test_an_index_with_a_part_missing_or_of_another_version_is_refused(index, tmp_path):
    shutil.copytree(index.folder, tmp_path / "copy")
    (tmp_path / "copy" / "parts" / index.files[1].part).unlink()
    with pytest.raises(ConfigError, match=r"lacks the part of deep/b\.parquet"):
        Index.open(tmp_path / "copy")
    text = (tmp_path / "copy" / "index.json").read_text()
    (tmp_path / "copy" / "index.json").write_text(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(ConfigError, match="version 99"):
        Index.open(tmp_path / "copy")


@pytest.mark.slow
def test_two_processes_make_the_same_index(corpus, index, tmp_path):
    build_index(corpus, tmp_path / "index", engine=Engine(num_workers=2))
    assert contents(tmp_path / "index") == contents(index.folder)


def test_a_data_set_that_datasets_knows_is_indexed_from_its_files(tmp_path, monkeypatch, samples):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_corpus(tmp_path / "data", {"train.parquet": range(5)})
    files = dataset_files(str(tmp_path / "data"), "train")
    made = build_index(files, tmp_path / "index", engine=HERE)
    found = records(made)
    assert [record["input_ids"] for record in found] == [sample.input_ids.tolist() for sample in samples[:5]]
    assert Index.open(tmp_path / "index").corpus == files[0].parent
    with pytest.raises(SourceError, match="cannot be loaded"):
        dataset_files(str(tmp_path / "data"), "validation")
    with pytest.raises(ConfigError, match="made in memory"):
        build_index([], tmp_path / "none", engine=HERE)
