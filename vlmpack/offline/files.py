"""The files of a corpus: what they are called, whether they changed, and their rows in order.

A file is the unit of the work: it is indexed once, whole, and again only if it changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow.ipc
import pyarrow.parquet as pq

from vlmpack.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SUFFIXES: Final = (".parquet", ".arrow", ".jsonl", ".ndjson", ".tar")
"""What a corpus is made of."""

_EDGE: Final = 1 << 16
_BATCH: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of a corpus, as it was when it was looked at."""

    name: str
    """Path below the corpus folder, with forward slashes: names the file in every row's key."""
    size: int
    """Bytes."""
    digest: str
    """Of the size and of 64 KiB at either end, where all formats keep what changes with the rows."""

    @classmethod
    def of(cls, root: Path, path: Path) -> SourceFile:
        """Return the file as it is now. Reads 128 KiB.

        Args:
            root: The corpus.
            path: A file in it.

        Raises:
            SourceError: If it cannot be read.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                edges = file.read(_EDGE)
                if size > _EDGE:
                    file.seek(-_EDGE, io.SEEK_END)
                    edges += file.read(_EDGE)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error}") from error
        digest = hashlib.sha256(f"{size}:".encode() + edges).hexdigest()[:32]
        return cls(name=path.relative_to(root).as_posix(), size=size, digest=digest)

    def check(self, root: Path) -> Path:
        """Return the path, if the file is still what it was.

        Args:
            root: The corpus.

        Raises:
            SourceError: If it is gone or changed.
        """
        path = root / self.name
        if not path.is_file():
            raise SourceError(f"{self.name} is gone from {root} since it was indexed; index again")
        now = SourceFile.of(root, path)
        if now != self:
            raise SourceError(
                f"{self.name} changed since it was indexed ({self.size:,} bytes then, {now.size:,} now); "
                "index again, which reads only what changed, and plan again"
            )
        return path

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def corpus_files(source: Path | Sequence[Path]) -> tuple[Path, list[SourceFile]]:
    """Return the corpus folder and its files, by name.

    Args:
        source: A folder, searched to any depth, hidden files left out; one file; or several in one folder.

    Raises:
        ConfigError: If there is none.
        SourceError: If one cannot be read.
    """
    if not isinstance(source, Path):
        if not source:
            raise ConfigError("the data set has no files: it was made in memory; save_to_disk it first")
        root = Path(os.path.commonpath([path.parent for path in source]))
        return root, [SourceFile.of(root, path) for path in sorted(source)]
    if source.is_file():
        root, paths = source.parent, [source]
    else:
        root = source
        paths = [
            path
            for path in sorted(source.rglob("*"))
            if path.suffix in SUFFIXES
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(source).parts)
        ]
    if not paths or (source.is_file() and source.suffix not in SUFFIXES):
        raise ConfigError(f"{source} has no file that ends in one of {', '.join(SUFFIXES)}")
    return root, [SourceFile.of(root, path) for path in paths]


def dataset_files(name: str, split: str) -> list[Path]:
    """Return the files of a data set that `datasets` knows, brought into its cache if need be.

    Args:
        name: On the Hugging Face Hub, or a folder that `load_dataset` takes.
        split: One of its splits.

    Raises:
        SourceError: If it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        loaded = load_dataset(name, split=split)
    except Exception as error:  # `datasets` and the hub's client raise dozens of kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(f"the data set {name} cannot be loaded: {reason}") from error
    return [Path(each["filename"]) for each in loaded.cache_files]


def read_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a file in order; images stay compressed. Memory: one batch, or one line.

    A line of JSON Lines that is not JSON is yielded as the error, so that it is one refused row.

    Args:
        path: One of `SUFFIXES`.

    Raises:
        SourceError: If the file is broken.
    """
    reader = {".parquet": _parquet, ".arrow": _arrow, ".tar": _tar}.get(path.suffix, _json_lines)
    try:
        yield from reader(path)
    except (OSError, pyarrow.ArrowException, tarfile.TarError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def _parquet(path: Path) -> Iterator[Any]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH):
            yield from batch.to_pylist()


def _arrow(path: Path) -> Iterator[Any]:
    with pyarrow.memory_map(str(path)) as file:
        for batch in pyarrow.ipc.open_stream(file):
            for start in range(0, batch.num_rows, _BATCH):
                yield from batch.slice(start, _BATCH).to_pylist()


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    yield error


_PICTURES: Final = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})


def _tar(path: Path) -> Iterator[Any]:
    """Yield WebDataset samples: neighbouring members with the same name up to the first dot."""
    with tarfile.open(path, "r:") as archive:
        stem: str | None = None
        row: dict[str, Any] = {"images": []}
        for member in archive:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            name, _, kind = base.partition(".")
            this = f"{folder}/{name}"
            if stem is not None and this != stem:
                yield row
                row = {"images": []}
            stem = this
            file = archive.extractfile(member)
            _add(row, kind.lower(), file.read() if file else b"")
        if stem is not None:
            yield row


def _add(row: dict[str, Any], kind: str, data: bytes) -> None:
    if kind.rsplit(".", 1)[-1] in _PICTURES:
        row["images"].append({"bytes": data, "path": None})
    elif kind == "json":
        try:
            values = json.loads(data)
        except ValueError:
            values = None  # the row is then refused for what it lacks
        if isinstance(values, dict):
            row.update({name: value for name, value in values.items() if name != "images"})
    else:
        row[kind] = data.decode("utf-8", errors="replace")
