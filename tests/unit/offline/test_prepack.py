"""Packs on disk: every planned sample once, as the stages make it; killed, moved, broken and read back."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.unit.offline.conftest import FILES, HERE, LIMITS, write_corpus
from tests.unit.offline.test_index import contents
from vlmpack import PackLoader
from vlmpack.errors import ConfigError, SourceError
from vlmpack.images import tile_image
from vlmpack.offline import Engine, PlanFolder, PlanSettings, build_index, build_plan, load_packed, prepack


@pytest.fixture(scope="session")
def packed(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "packed"
    prepack(plan, folder, engine=HERE)
    return folder


def by_key(samples):
    keys = [f"{name}:{place}" for name, rows in FILES.items() for place in range(len(rows))]
    return dict(zip(keys, samples, strict=True))


def test_a_plan_has_every_sample_once_within_every_budget(plan, samples):
    keys, packs = [], 0
    for number, group in enumerate(plan.groups):
        table = plan.group_table(number).to_pylist()
        assert [row["pack"] for row in table] == sorted(row["pack"] for row in table)
        for pack in {row["pack"] for row in table}:
            rows = [row for row in table if row["pack"] == pack]
            assert sum(row["tokens"] for row in rows) <= 4096
            assert sum(row["images"] for row in rows) <= 18
        packs += len({row["pack"] for row in table})
        keys += [(row["file"], row["row"]) for row in table]
        assert {row["file"] for row in table} <= set(group.files)
    assert packs == plan.num_packs >= plan.lower_bound
    assert len(set(keys)) == len(keys) == plan.num_samples == len(samples) - sum(plan.refused.values())


def test_a_plan_is_a_function_of_index_and_settings(index, plan, tmp_path):
    assert build_plan(index, tmp_path / "again", LIMITS).digest == plan.digest
    assert contents(tmp_path / "again") == contents(plan.folder)
    other = build_plan(index, tmp_path / "other", LIMITS.model_copy(update={"seed": 1}))
    assert other.digest != plan.digest
    whole = build_plan(index, tmp_path / "whole", LIMITS.model_copy(update={"group_bytes": 0}))
    assert len(whole.groups) == 1
    assert whole.num_packs == plan.global_packs <= plan.num_packs


def test_limits_of_a_sample_are_kept_and_counted(index, tmp_path, samples):
    settings = PlanSettings(
        seq_length=2048, max_images_per_example=1, max_sample_length=400, method="first_fit"
    )
    made = build_plan(index, tmp_path / "plan", settings)
    costs = [sample.cost for sample in samples]
    long = [cost for cost in costs if cost.num_tokens >= 400]
    several = [cost for cost in costs if cost.num_tokens < 400 and cost.num_images > 1]
    assert made.refused == {"sample_too_long": len(long), "too_many_images": len(several)}
    assert made.num_samples == len(samples) - len(long) - len(several)
    with pytest.raises(SourceError, match="none of the 24 rows"):
        build_plan(index, tmp_path / "none", PlanSettings(seq_length=2))


def test_a_plan_of_an_index_that_changed_is_refused(tmp_path):
    source = write_corpus(tmp_path / "corpus", {"a.parquet": range(4)})
    build_plan(build_index(source, tmp_path / "index", engine=HERE), tmp_path / "plan", LIMITS)
    write_corpus(source, {"b.parquet": range(4, 6)})
    build_index(source, tmp_path / "index", engine=HERE)
    with pytest.raises(ConfigError, match="plan again"):
        PlanFolder.open(tmp_path / "plan")


def test_packs_hold_the_samples_as_the_stages_make_them(packed, plan, samples):
    folder, known, seen = load_packed(packed), by_key(samples), []
    assert len(folder) == plan.num_packs
    for number in range(len(folder)):
        pack = folder[number]
        at_tile = 0
        for segment, key in enumerate(pack.keys, start=1):
            sample, where = known[key], pack.segment_ids == segment
            assert pack.input_ids[where].tolist() == sample.input_ids.tolist()
            assert pack.labels[where].tolist()[1:] == sample.labels.tolist()[1:]
            assert pack.labels[where][0] == -100
            assert pack.position_ids[where].tolist() == list(range(len(sample.input_ids)))
            for image, geometry in zip(sample.images, sample.geometries, strict=True):
                tiles = tile_image(image.source, geometry, tile_size=512)
                assert torch.equal(pack.tiles[at_tile : at_tile + geometry.num_tiles], tiles)
                at_tile += geometry.num_tiles
        assert at_tile == len(pack.tiles)
        seen += pack.keys
    refused = {key for key, sample in known.items() if sample.cost.num_images > 4}
    assert sorted(seen) == sorted(set(known) - refused)


def test_pixels_on_disk_are_the_pixels_that_would_be_decoded(packed, plan, tmp_path):
    prepack(plan, tmp_path / "pixels", engine=HERE, pixels=True)
    stored, decoded = load_packed(tmp_path / "pixels"), load_packed(packed)
    for number in range(len(decoded)):
        assert torch.equal(stored[number].tiles, decoded[number].tiles)
        assert stored[number].keys == decoded[number].keys
    with pytest.raises(ConfigError, match="holds packs of plan"):
        prepack(plan, tmp_path / "pixels", engine=HERE)


def test_a_part_of_a_pack_is_its_samples_with_segments_from_one(packed):
    folder = load_packed(packed)
    number = max(range(len(folder)), key=lambda n: folder.starts[n + 1] - folder.starts[n])
    start, stop = int(folder.starts[number]), int(folder.starts[number + 1])
    middle = (start + stop) // 2
    whole, first, second = folder[number], folder[start, middle], folder[middle, stop]
    assert first.keys + second.keys == whole.keys
    for name in ("input_ids", "labels", "position_ids", "tiles"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(whole, name))
    assert sorted(set(second.segment_ids.tolist()) - {0}) == list(range(1, stop - middle + 1))
    assert first.costs + second.costs == whole.costs
    for bad in ((start, stop + 1), (start, start), (10**6, 10**6 + 1)):
        with pytest.raises(IndexError):
            folder[bad]
    with pytest.raises(IndexError):
        folder[len(folder)]


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_loader_over_packs_on_disk_is_even_and_resumes(packed, world_size):
    def loader(rank):
        return PackLoader(
            load_packed(packed, decode=False),
            batch_size=1,
            collate_fn=lambda packs: [key for pack in packs for key in pack.keys],
            rank=rank,
            world_size=world_size,
            seed=5,
        )

    loaders = [loader(rank) for rank in range(world_size)]
    assert len({len(each) for each in loaders}) == 1
    epoch = [list(each) for each in loaders]
    keys = [key for rank in epoch for batch in rank for key in batch]
    assert len(keys) == len(set(keys)) == int(load_packed(packed, decode=False).starts[-1])
    first = loader(0)
    had = [next(iter(first))]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = loader(0)
    resumed.load_state_dict(state)
    assert had + list(resumed) == epoch[0]


def test_a_second_run_makes_no_shard_again(packed, plan, monkeypatch):
    before = contents(packed)
    monkeypatch.setattr(
        sys.modules["vlmpack.offline.materialise"], "_read_samples", lambda *_: pytest.fail("read again")
    )
    prepack(plan, packed, engine=HERE)
    assert contents(packed) == before


def test_a_shard_that_was_damaged_is_made_again(packed, plan, tmp_path):
    shutil.copytree(packed, tmp_path / "packed")
    (shard, *_) = sorted((tmp_path / "packed").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="not what the manifest says"):
        load_packed(tmp_path / "packed")
    prepack(plan, tmp_path / "packed", engine=HERE)
    assert contents(tmp_path / "packed") == contents(packed)


def test_a_file_that_is_gone_or_changed_is_named(tmp_path):
    source = write_corpus(tmp_path / "corpus", {"a.parquet": range(4), "b.parquet": range(4, 8)})
    plan = build_plan(build_index(source, tmp_path / "index", engine=HERE), tmp_path / "plan", LIMITS)
    (source / "b.parquet").rename(tmp_path / "b.parquet")
    with pytest.raises(SourceError, match=r"b\.parquet is gone"):
        prepack(plan, tmp_path / "packed", engine=HERE)
    write_corpus(source, {"b.parquet": range(8, 12)})
    with pytest.raises(SourceError, match=r"b\.parquet changed since it was indexed"):
        prepack(plan, tmp_path / "packed", engine=HERE)
    with pytest.raises(ConfigError, match="no whole set of packs"):
        load_packed(tmp_path / "packed")
    (tmp_path / "b.parquet").replace(source / "b.parquet")
    manifest = prepack(plan, tmp_path / "packed", engine=HERE)
    assert manifest["samples"] == plan.num_samples


def test_rows_whose_images_broke_since_are_refused_and_all_others_packed(tmp_path):
    from vlmpack.corpus import load_corpus

    source = tmp_path / "corpus"
    (source / "images").mkdir(parents=True)
    lines = []
    for number, row in enumerate(load_corpus().with_format("arrow").select(range(8)).to_list()):
        names = [f"images/{number}-{place}" for place in range(len(row["images"]))]
        for name, image in zip(names, row["images"], strict=True):
            (source / name).write_bytes(image["bytes"])
        lines.append(json.dumps({"images": names, "texts": row["texts"]}))
    (source / "rows.jsonl").write_text("\n".join(lines))
    plan = build_plan(build_index(source, tmp_path / "index", engine=HERE), tmp_path / "plan", LIMITS)
    with_images = [n for n in range(8) if (source / f"images/{n}-0").exists()][:3]
    gone, other, truncated = (source / f"images/{number}-0" for number in with_images)
    gone.unlink()
    other.write_bytes(_picture((17, 19)))
    truncated.write_bytes(truncated.read_bytes()[:-400])
    manifest = prepack(plan, tmp_path / "pixels", engine=HERE, pixels=True)
    refused = [refusal for row in manifest["shards"] for refusal in row["refused"]]
    assert {refusal["key"] for refusal in refused} == {f"rows.jsonl:{number}" for number in with_images}
    assert "row_changed" in {refusal["reason"] for refusal in refused}
    assert manifest["samples"] == plan.num_samples - 3
    assert sum(len(pack.keys) for pack in load_packed(tmp_path / "pixels")) == manifest["samples"]


def _picture(size):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def test_a_full_disk_leaves_no_draft_and_the_next_run_goes_on(packed, plan, tmp_path, monkeypatch):
    import errno

    import pyarrow.parquet as pq

    write, calls = pq.ParquetWriter.write_table, []

    def full(self, table, *arguments):
        calls.append(table)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, table, *arguments)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        prepack(plan, tmp_path / "packed", engine=HERE)
    assert not list((tmp_path / "packed").glob(".*.part"))
    assert len(list((tmp_path / "packed").glob("*.parquet"))) == 1, "what was finished stays"
    monkeypatch.undo()
    prepack(plan, tmp_path / "packed", engine=HERE)
    assert contents(tmp_path / "packed") == contents(packed)


def test_a_folder_of_something_else_is_refused(plan, tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not empty"):
        prepack(plan, tmp_path, engine=HERE)
    assert (tmp_path / "precious.txt").read_text() == "keep me"


@pytest.mark.slow
def test_ray_and_the_pool_write_the_same(packed, plan, tmp_path):
    prepack(plan, tmp_path / "pool", engine=Engine(num_workers=2))
    assert contents(tmp_path / "pool") == contents(packed)
    pytest.importorskip("ray")
    prepack(plan, tmp_path / "ray", engine=Engine(name="ray", num_workers=2))
    assert contents(tmp_path / "ray") == contents(packed)


@pytest.mark.slow
def test_killed_at_random_points_every_phase_ends_as_without(corpus, index, plan, packed, tmp_path):
    phases = [
        (["index", str(corpus), "--out", "index", "--num-workers", "0"], "index", index.folder),
        (["plan", "index", "--out", "plan", "--group-mib", "0", "--method", "first_fit"], "plan", None),
        (["prepack", "plan", "--out", "packed", "--num-workers", "0"], "packed", None),
    ]
    rng = random.Random(0)
    for command, folder, expected in phases:
        kills = 0
        for attempt in range(20):
            process = subprocess.Popen(
                [sys.executable, "-m", "vlmpack", *command],
                cwd=tmp_path,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "COLUMNS": "200"},
            )
            if attempt < 3:
                time.sleep(rng.uniform(1.0, 4.0))
                process.send_signal(signal.SIGKILL)
            _, errors = process.communicate(timeout=100)
            if process.returncode == 0:
                break
            kills += process.returncode == -signal.SIGKILL
            assert process.returncode == -signal.SIGKILL, errors.decode()
        assert kills >= 1
        if expected is not None:
            assert contents(tmp_path / folder) == contents(expected)
    manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
    assert manifest["samples"] == plan.num_samples
