"""Tar shards give their rows in order, lead nowhere else, and break for themselves alone."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from tests.fakes import jpeg, samples_of
from tests.in_process import as_worker
from vlmpack.errors import ConfigError
from vlmpack.samples import Refusal
from vlmpack.stages import TarShards

GOOD = json.dumps({"texts": [{"user": "What is it?", "assistant": "A cat."}]}).encode()


def shard(path, members):
    """Write a tar file of (name, content); a TarInfo goes in as it is."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            if isinstance(name, tarfile.TarInfo):
                archive.addfile(name)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info, b""


def rows_of(*paths, **settings):
    return list(TarShards(paths, **settings))


def test_members_of_one_name_are_one_row(tmp_path):
    first, second = jpeg(30, 40), jpeg(50, 40)
    path = shard(
        tmp_path / "a.tar",
        [
            ("x/1.jpg", first),
            ("x/1.b.JPEG", second),
            ("x/1.json", GOOD),
            ("x/1.cls", b"7"),
            ("x/2.txt", b"A dog."),
        ],
    )
    one, two = rows_of(path, prompt="What?")
    assert one == {"images": [first, second], **json.loads(GOOD), "__key__": "a.tar/x/1"}
    assert two == {
        "images": [], "__key__": "a.tar/x/2", "texts": [{"user": "What?", "assistant": "A dog."}]
    }  # fmt: skip


def test_rows_become_samples_named_by_shard_and_name(tmp_path):
    path = shard(tmp_path / "a.tar", [("1.jpg", jpeg(30, 40)), ("1.json", GOOD), ("2.json", GOOD)])
    samples = list(samples_of(TarShards([path])))
    assert [sample.key for sample in samples] == ["a.tar/1", "a.tar/2"]
    assert [sample.cost.num_images for sample in samples] == [1, 0]


@pytest.mark.parametrize(
    ("member", "told"),
    [
        (link("2.jpg", "/etc/passwd"), "link or a device"),
        (("2.json", b"{"), "Expecting property name"),
        (("2.json", b"[1]"), "must be an object, got list"),
        (("2.json", b"[" * 100_000), "2.json"),
        (("2.txt", b"\xff\xfe"), "utf-8"),
        (("2.jpg", b"x" * 2000), "2,000 bytes, over max_member_bytes 1,900"),
    ],
)
def test_a_broken_row_is_refused_and_the_others_stay(tmp_path, member, told):
    path = shard(tmp_path / "a.tar", [("1.json", GOOD), member, ("3.json", GOOD)])
    one, two, three = rows_of(path, max_member_bytes=1900 if "1,900" in told else 1 << 20)
    assert isinstance(two, Refusal)
    assert (two.key, two.reason) == ("a.tar/2", "bad_row")
    assert told in two.message
    assert (one["__key__"], three["__key__"]) == ("a.tar/1", "a.tar/3")


def test_names_that_climb_out_of_the_shard_lead_nowhere(tmp_path):
    path = shard(tmp_path / "a.tar", [("../../etc/1.json", GOOD), ("/abs/2.json", GOOD)])
    assert [row["__key__"] for row in rows_of(path)] == ["a.tar/../../etc/1", "a.tar//abs/2"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_what_a_cut_shard_still_has_is_read_and_the_next_shard_follows(tmp_path):
    whole = shard(tmp_path / "a.tar", [(f"{n}.jpg", jpeg(64, 64)) for n in range(4)])
    content = whole.read_bytes()
    cut = tmp_path / "b.tar"
    cut.write_bytes(content[: len(content) // 2])
    after = shard(tmp_path / "c.tar", [("1.json", GOOD)])
    empty = shard(tmp_path / "d.tar", [])
    rows = rows_of(cut, empty, after)
    *before, refusal, last = rows
    assert [row["__key__"] for row in before] == [f"b.tar/{n}" for n in range(len(before))]
    assert 1 <= len(before) < 4
    assert refusal.reason == "source_error"
    assert "the rest of shard" in refusal.message
    assert last["__key__"] == "c.tar/1"


def test_a_shard_of_noise_is_one_refusal(tmp_path):
    noise = tmp_path / "n.tar"
    noise.write_bytes(bytes(range(256)) * 40)
    (refusal,) = rows_of(noise)
    assert refusal.reason == "source_error"


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_each_row_is_read_by_one_worker(tmp_path, num_workers):
    paths = [shard(tmp_path / f"{s}.tar", [(f"{n}.json", GOOD) for n in range(s)]) for s in range(4)]
    found = []
    for worker in range(num_workers):
        with as_worker(worker, num_workers):
            found += [row["__key__"] for row in rows_of(*paths)]
    assert sorted(found) == sorted(f"{s}.tar/{n}" for s in range(4) for n in range(s))


def test_any_row_is_a_place_to_go_on_from(tmp_path):
    paths = [shard(tmp_path / f"{s}.tar", [(f"{n}.json", GOOD) for n in range(3 * s)]) for s in range(3)]
    whole = rows_of(*paths)
    for stop in range(len(whole) + 1):
        first = TarShards(paths)
        rows = iter(first)
        head = [next(rows) for _ in range(stop)]
        second = TarShards(paths)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert head + list(second) == whole
        assert list(second) == whole, "the next pass begins at the beginning"


def test_shards_that_cannot_be_read_are_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="there is no tar shard; shards is empty"):
        TarShards([])
    with pytest.raises(ConfigError, match=r"there is no tar shard .*missing\.tar"):
        TarShards([tmp_path / "missing.tar"])
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"compressed.*unpack it to \.tar"):
        TarShards([tmp_path / "a.tar.gz"])
