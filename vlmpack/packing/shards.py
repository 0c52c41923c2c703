"""Shards: packs -> Parquet files that `datasets` loads back, images compressed as they were.

Tokens, labels and segments are planned and final; pixels are left to whoever trains, so a shard is about
as large as the images in it. Files carry their final names only once all are written: a folder either
holds a whole run or nothing that could be mistaken for one.
"""

from __future__ import annotations

import io
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from PIL import Image as Pillow
from PIL.TiffImagePlugin import TiffImageFile

from vlmpack.errors import ConfigError, SampleError, SourceError, StorageError, why_unwritten
from vlmpack.images.decode import to_rgb
from vlmpack.images.header import read_header
from vlmpack.images.orientation import turn_upright

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    import torch

    from vlmpack.packing.assemble import PackedSequence
    from vlmpack.samples import ImageRef

COLUMNS: Final = Features({
    "input_ids": List(Value("int32")),
    "labels": List(Value("int32")),
    "position_ids": List(Value("int32")),
    "segment_ids": List(Value("int32")),
    "keys": List(Value("string")),
    "num_images": Value("int32"),
    "num_tiles": Value("int32"),
    "num_patches": Value("int64"),
    "tiles_per_image": List(Value("int32")),
    "images": List(Image()),
})
"""One row a pack. The names mean what they mean in `PackedSequence`; `images` are the originals."""

_File: TypeAlias = tuple[bytes, str | None]
"""An image's file and its name."""
_PackAndFiles: TypeAlias = "tuple[PackedSequence, list[_File]]"

_SEQUENCES: Final = ("input_ids", "labels", "position_ids", "segment_ids")
_PACKS_A_GROUP: Final = 100
_BYTES_A_GROUP: Final = 64 << 20
"""A reader holds at least one row group in memory, and Arrow's offsets end at 2 GiB."""
_PNG_MODES: Final = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}


class ShardWriter:
    """Writes packs as `packs-00000-of-00004.parquet` and so on.

    A context manager: leaving it finishes the files, leaving it by an exception removes them.

    Args:
        folder: Made if need be; must be empty, hidden files aside.
        shard_bytes: Image bytes at which a shard is full.
        settings: What to write down about the run, as JSON under the key `vlmpack` of each file's metadata.

    Raises:
        ConfigError: If the folder is not empty or is a file, or a setting is invalid.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        shard_bytes: int = 512 << 20,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        if shard_bytes < 1:
            raise ConfigError(f"shard_bytes must be at least 1, got {shard_bytes}")
        self.folder = Path(folder)
        check_folder(self.folder)
        self._shard_bytes = shard_bytes
        self._schema = COLUMNS.arrow_schema.with_metadata({
            **(COLUMNS.arrow_schema.metadata or {}),
            b"vlmpack": json.dumps(dict(settings or {}), default=str).encode(),
        })
        self._drafts: list[Path] = []
        self._writer: pq.ParquetWriter | None = None
        self._group: list[_PackAndFiles] = []
        self._group_bytes = 0
        self._written_bytes = 0
        self.files: list[Path] = []
        """The finished shards, in order; empty until `close`."""

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()  # does nothing to finished files

    def write(self, pack: PackedSequence) -> None:
        """Add a pack. O(tokens + image bytes).

        Args:
            pack: With its images: from a `ConstantLengthDataset` with `keep_images`.

        Raises:
            ConfigError: If it does not carry its images.
            SourceError: If an image's file cannot be read any more.
            StorageError: If the disk is full, or the folder cannot be written.
        """
        if len(pack.images) != pack.cost.num_images:
            raise ConfigError(
                f"a pack of {pack.cost.num_images} images carries {len(pack.images)} of them (samples "
                f"{', '.join(pack.keys)}); make it with ConstantLengthDataset(..., keep_images=True)"
            )
        try:
            files = [stored_file(image) for image in pack.images]
        except (SampleError, OSError) as error:
            raise SourceError(
                f"an image of the samples {', '.join(pack.keys)} cannot be stored: {error}"
            ) from error
        self._group.append((pack, files))
        self._group_bytes += sum(len(data) for data, _ in files)
        full = self._written_bytes + self._group_bytes >= self._shard_bytes
        if full or self._group_bytes >= _BYTES_A_GROUP or len(self._group) >= _PACKS_A_GROUP:
            self._end_group()
        if full:
            self._end_shard()

    def close(self) -> None:
        """Finish the files and give them their names; there are none if no pack came.

        Raises:
            StorageError: If the disk is full, or the folder cannot be written.
        """
        self._end_group()
        self._end_shard()
        files = [
            self.folder / f"packs-{number:05d}-of-{len(self._drafts):05d}.parquet"
            for number in range(len(self._drafts))
        ]
        with self._storing():
            for draft, file in zip(self._drafts, files, strict=True):
                draft.replace(file)
            if files:
                _sync(self.folder)
        self.files, self._drafts = files, []

    def discard(self) -> None:
        """Remove what was written and has no final name yet."""
        if self._writer is not None:
            with suppress(OSError):  # of a full disk: the file is removed anyway
                self._writer.close()
            self._writer = None
        self._group = []
        for draft in self._drafts:
            draft.unlink(missing_ok=True)
        self._drafts = []

    def _end_group(self) -> None:
        if not self._group:
            return
        with self._storing():
            if self._writer is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._drafts.append(self.folder / f".packs-{len(self._drafts):05d}.{os.getpid()}.part")
                self._writer = pq.ParquetWriter(self._drafts[-1], self._schema, compression="zstd")
            self._writer.write_table(_table(self._group, self._schema))
        self._written_bytes += self._group_bytes
        self._group, self._group_bytes = [], 0

    def _end_shard(self) -> None:
        if self._writer is not None:
            with self._storing():
                self._writer.close()
                _sync(self._drafts[-1])
        self._writer, self._written_bytes = None, 0

    @contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(why_unwritten(error, f"packs in {self.folder}")) from error


def write_shards(
    packs: Iterable[PackedSequence],
    folder: str | Path,
    *,
    shard_bytes: int = 512 << 20,
    settings: Mapping[str, object] | None = None,
) -> list[Path]:
    """Write all packs and return the files.

    Args:
        packs: With their images: from a `ConstantLengthDataset` with `keep_images`.
        folder: Made if need be; must be empty, hidden files aside.
        shard_bytes: Image bytes at which a shard is full.
        settings: What to write down about the run, as JSON under the key `vlmpack` of each file's metadata.

    Raises:
        ConfigError: If the folder or a setting is invalid, or a pack does not carry its images.
        SourceError: If an image's file cannot be read any more.
    """
    with ShardWriter(folder, shard_bytes=shard_bytes, settings=settings) as writer:
        for pack in packs:
            writer.write(pack)
    return writer.files


def check_folder(folder: Path) -> None:
    """Refuse a folder in which packs would mix with other files, or which cannot be one.

    Args:
        folder: Where shards shall go; need not exist.

    Raises:
        ConfigError: If it is a file, or has files in it that are not hidden.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; packed shards need a folder")
    found = sorted(path.name for path in folder.glob("[!.]*")) if folder.is_dir() else []
    if found:
        raise ConfigError(
            f"{folder} is not empty, it has {found[0]}{' and more' if len(found) > 1 else ''}; packs of two "
            "runs would mix. Choose another folder or empty this one."
        )


def _table(group: Sequence[_PackAndFiles], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pydict(pack_columns(group), schema=schema)


def pack_columns(group: Sequence[_PackAndFiles]) -> dict[str, Any]:
    """Return the columns of `COLUMNS` for some packs.

    Args:
        group: Packs, each with the files of its images.
    """
    packs = [pack for pack, _ in group]
    columns: dict[str, Any] = {name: _lists([getattr(pack, name) for pack in packs]) for name in _SEQUENCES}
    columns |= {
        "keys": [pack.keys for pack in packs],
        "num_images": [pack.cost.num_images for pack in packs],
        "num_tiles": [sum(pack.tiles_per_image) for pack in packs],
        "num_patches": [pack.cost.num_patches for pack in packs],
        "tiles_per_image": [pack.tiles_per_image for pack in packs],
        "images": [[{"bytes": data, "path": name} for data, name in files] for _, files in group],
    }
    return columns


def _lists(rows: Sequence[torch.Tensor]) -> pa.ListArray:
    """Return the rows as lists of int32, without a Python object a token."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = pa.array(np.concatenate([row.numpy() for row in rows]))
    return pa.ListArray.from_arrays(pa.array(offsets), values.cast(pa.int32()))


def stored_file(image: ImageRef) -> _File:
    """Return the bytes and the name under which `datasets` keeps an image.

    Args:
        image: As the data set has it.

    Raises:
        SampleError: If the picture has metadata or a size that no decoder takes.
    """
    source = image.source
    if isinstance(source, bytes):
        return source, None
    if isinstance(source, Path):
        return source.read_bytes(), source.name
    if not isinstance(source, Pillow.Image):
        return source.read_bytes(), None
    # A picture without a file: upright, and as PNG, whose pixels are exactly these.
    orientation = read_header(source).orientation
    source.load()
    if not isinstance(source, TiffImageFile):  # which Pillow has turned upright by now
        source = turn_upright(source, orientation)
    file = io.BytesIO()
    (source if source.mode in _PNG_MODES else to_rgb(source)).save(file, "PNG", exif=b"")
    return file.getvalue(), None


def _sync(path: Path) -> None:
    """Make sure that a file or a folder is on the disk before anything refers to it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
