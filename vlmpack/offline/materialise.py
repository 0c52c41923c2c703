"""Materialise a plan: read each file of a group once, in order, and write its packs as one shard.

Tokens come from the index and images from the files, so nothing is tokenised twice and no pixel is decoded
unless it is asked for: the work is to copy bytes into the order of the packs.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value

from vlmpack.budget import PackBudget, SampleCost
from vlmpack.errors import SampleError, SourceError
from vlmpack.images import MAX_PIXELS
from vlmpack.offline.atomic import whole_file, write_text
from vlmpack.offline.files import SourceFile, read_rows
from vlmpack.packing import Assembler
from vlmpack.packing.shards import COLUMNS, pack_columns, stored_file
from vlmpack.samples import Refusal, Sample
from vlmpack.stages.rows import RowParser

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlmpack.geometry import Tiling
    from vlmpack.packing import PackedSequence

PACKED: Final = Features({
    **COLUMNS,
    "tokens_per_sample": List(Value("int32")),
    "images_per_sample": List(Value("int32")),
    "patches_per_sample": List(Value("int64")),
    "image_sizes": List(Value("int32")),
    "tiles": Value("large_binary"),
})
"""One row a pack. `image_sizes` has height and width of each image in turn; `tiles` is uint8 [N, P, P, 3]."""

_BYTES_A_GROUP: Final = 16 << 20
"""Four times as much costs a quarter more time, spent on fresh memory pages for each group."""
_PACKS_A_GROUP: Final = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFile:
    """A file that a shard is made of."""

    file: SourceFile
    """As it was indexed."""
    part: str
    """The path of its part of the index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSettings:
    """What a worker has to know."""

    corpus: str
    """The corpus folder."""
    tiling: Tiling
    """How images are cut."""
    budget: PackBudget
    """What a pack may hold."""
    pad_token_id: int
    """What is appended to each sample."""
    append_pad: bool
    """Whether it is."""
    pixels: bool
    """Store uint8 tiles instead of compressed images."""
    image_marker: str | None
    """What stands for an image in a row's text."""


def materialise(
    files: dict[int, GroupFile], sub_plan: str, out_path: str, settings: ShardSettings
) -> dict[str, Any]:
    """Write one shard and return its row of the manifest: the unit of work, a plain function for any engine.

    A shard that is already there, whole, is left alone. A sample whose row is not what it was, or whose image
    turns out to be broken, leaves its pack and is named in the manifest; the others stay.

    Args:
        files: By their number in the index.
        sub_plan: Path of the group's samples, pack by pack.
        out_path: The shard.
        settings: How packs are built.

    Returns:
        {"shard", "bytes", "digest", "packs", "samples", "refused": [{"key", "reason", "message"}]}.

    Raises:
        SourceError: If a file is gone, changed or broken.
    """
    out = Path(out_path)
    record = out.parent / "manifest" / f"{out.stem}.json"
    known = _finished(out, record)
    if known is not None:
        return known
    table = pq.read_table(sub_plan)
    samples, refused = _read_samples(files, table, settings)
    packs = _split(table["pack"].to_numpy())
    places = list(zip(table["file"].to_pylist(), table["row"].to_pylist(), strict=True))
    assemble = Assembler(
        budget=settings.budget,
        tile_size=settings.tiling.tile_size,
        pad_token_id=settings.pad_token_id,
        append_pad=settings.append_pad,
        max_pixels=MAX_PIXELS,
        decode=settings.pixels,
    )
    num_packs = num_samples = 0
    schema = PACKED.arrow_schema
    with whole_file(out) as draft, _writer(draft, schema) as writer:
        group: list[tuple[PackedSequence, list[tuple[bytes, str | None]]]] = []
        size = 0
        for start, stop in packs:
            members = [samples.pop(place) for place in places[start:stop] if place in samples]
            pack, broken = assemble(members, keep_images=True) if members else (None, [])
            refused += broken
            if pack is None:
                continue
            images = [] if settings.pixels else [stored_file(image) for image in pack.images]
            group.append((pack, images))
            num_packs, num_samples = num_packs + 1, num_samples + len(pack.keys)
            size += sum(len(data) for data, _ in images) + pack.tiles.numel()
            if size >= _BYTES_A_GROUP or len(group) == _PACKS_A_GROUP:
                writer.write_table(_table(group, settings))
                group, size = [], 0
        if group:
            writer.write_table(_table(group, settings))
    if num_samples + len(refused) != len(places):
        raise SourceError(
            f"{out} holds {num_samples} samples and {len(refused)} were refused, of {len(places)} planned; "
            "please report this"
        )
    made = SourceFile.of(out.parent, out)
    row = {
        "shard": out.name,
        "bytes": made.size,
        "digest": made.digest,
        "packs": num_packs,
        "samples": num_samples,
        "refused": [
            {"key": refusal.key, "reason": str(refusal.reason), "message": refusal.message[:500]}
            for refusal in sorted(refused, key=lambda refusal: refusal.key)
        ],
    }
    write_text(record, json.dumps(row, indent=1) + "\n")
    return row


def _finished(out: Path, record: Path) -> dict[str, Any] | None:
    """Return the manifest's row of a shard that is there, whole; None if it has to be made."""
    if not out.is_file() or not record.is_file():
        return None
    row: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    made = SourceFile.of(out.parent, out)
    return row if (row["bytes"], row["digest"]) == (made.size, made.digest) else None


def _writer(draft: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer that leaves compressed pictures as they are."""
    pictures = {"images.list.element.bytes", "tiles"}
    columns = [path for path in _leaves(schema) if path not in pictures]
    compression = dict.fromkeys(columns, "zstd") | dict.fromkeys(pictures, "none")
    return pq.ParquetWriter(draft, schema, compression=compression, use_dictionary=False)


def _leaves(schema: pa.Schema) -> Iterator[str]:
    for field in schema:
        if pa.types.is_list(field.type):
            element = field.type.value_type
            if pa.types.is_struct(element):
                yield from (f"{field.name}.list.element.{child.name}" for child in element)
            else:
                yield f"{field.name}.list.element"
        else:
            yield field.name


def _read_samples(
    files: dict[int, GroupFile], table: pa.Table, settings: ShardSettings
) -> tuple[dict[tuple[int, int], Sample], list[Refusal]]:
    """Read every file once, in order, and return the wanted samples by file and row, images compressed."""
    file_of, row_of = table["file"].to_numpy(), table["row"].to_numpy()
    samples: dict[tuple[int, int], Sample] = {}
    refused: list[Refusal] = []
    parse = RowParser(image_marker=settings.image_marker, image_root=settings.corpus, max_pixels=MAX_PIXELS)
    for number in np.unique(file_of).tolist():
        group_file = files[number]
        path = group_file.file.check(Path(settings.corpus))
        wanted = np.sort(row_of[file_of == number])
        for record, raw in _wanted(Path(group_file.part), path, wanted):
            try:
                samples[number, record["row"]] = _sample(record, raw, parse, settings)
            except SampleError as error:
                refused.append(Refusal.of(record["key"], error))
    return samples, refused


def _wanted(part: Path, path: Path, wanted: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield (record of the index, raw row) for the wanted rows of a file.

    Raises:
        SourceError: If the file has fewer rows than the index.
    """
    records = _records(part, wanted)
    left = iter(wanted.tolist())
    following = next(left, None)
    for number, raw in enumerate(read_rows(path)):
        if number == following:
            yield next(records), raw
            following = next(left, None)
            if following is None:
                return
    raise SourceError(f"{path} has fewer rows than when it was indexed; index again")


def _records(part: Path, wanted: Any) -> Iterator[dict[str, Any]]:
    columns = ["row", "key", "heights", "widths", "image_starts", "images", "patches", "input_ids", "labels"]
    with pq.ParquetFile(part) as file:
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            rows = batch["row"].to_numpy()
            keep = np.isin(rows, wanted, assume_unique=True)
            ids, labels = batch["input_ids"], batch["labels"]
            for place in np.flatnonzero(keep).tolist():
                yield {
                    "row": int(rows[place]),
                    "key": batch["key"][place].as_py(),
                    "sizes": list(
                        zip(batch["heights"][place].as_py(), batch["widths"][place].as_py(), strict=True)
                    ),
                    "image_starts": tuple(batch["image_starts"][place].as_py()),
                    "patches": batch["patches"][place].as_py(),
                    "input_ids": ids[place].values.to_numpy().astype(np.int64),
                    "labels": labels[place].values.to_numpy().astype(np.int64),
                }


def _pairs(heights: list[int], widths: list[int]) -> list[tuple[int, int]]:
    return list(zip(heights, widths, strict=True))


def _sample(record: dict[str, Any], raw: Any, parse: RowParser, settings: ShardSettings) -> Sample:
    """Return the sample as it was indexed, with the images as they are now.

    Raises:
        SampleError: If the row or an image cannot be read any more, or has another size.
    """
    row = parse(record["key"], raw)
    sizes = [(image.height, image.width) for image in row.images]
    if sizes != record["sizes"]:
        raise SampleError(
            "row_changed",
            f"its images are {sizes} (height, width), and were {record['sizes']} when it was indexed; index "
            "again",
        )
    geometries = settings.tiling.sample(sizes)
    return Sample(
        key=record["key"],
        input_ids=record["input_ids"],
        labels=record["labels"],
        images=row.images,
        geometries=geometries,
        image_starts=record["image_starts"],
        cost=SampleCost(
            num_tokens=len(record["input_ids"]), num_images=len(sizes), num_patches=record["patches"]
        ),
    )


def _split(pack_ids: Any) -> list[tuple[int, int]]:
    """Return (start, stop) of each run of equal pack numbers."""
    edges = [0, *(np.flatnonzero(np.diff(pack_ids)) + 1).tolist(), len(pack_ids)]
    return list(itertools.pairwise(edges)) if len(pack_ids) else []


def _table(group: Sequence[tuple[PackedSequence, list[Any]]], settings: ShardSettings) -> pa.Table:
    packs = [pack for pack, _ in group]
    columns = pack_columns(group)
    columns["tokens_per_sample"] = [[cost.num_tokens for cost in pack.costs] for pack in packs]
    columns["images_per_sample"] = [[cost.num_images for cost in pack.costs] for pack in packs]
    columns["patches_per_sample"] = [[cost.num_patches for cost in pack.costs] for pack in packs]
    columns["image_sizes"] = [[side for size in pack.image_sizes for side in size] for pack in packs]
    columns["tiles"] = [
        pack.tiles.permute(0, 2, 3, 1).contiguous().numpy().tobytes() if settings.pixels else None
        for pack in packs
    ]
    return pa.Table.from_pydict(columns, schema=PACKED.arrow_schema)
