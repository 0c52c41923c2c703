"""Index a corpus: one pass over every file, without a pixel; what a row costs, and its tokens.

    corpus/                       index/
      train-0.parquet  -------->    parts/5f0c....parquet   key, costs, sizes, tokens of a row; or why not
      train-1.parquet  -------->    parts/91ab....parquet
      photos/a.tar     -------->    parts/c07e....parquet
                                    index.json              the files, and what the parts depend on

A part is written whole, under a name made of the file and of everything it depends on. So a run that was
killed goes on, files that were added are added, files that changed are read again, and nothing else is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from vlmpack.errors import ConfigError, SourceError
from vlmpack.offline.atomic import only_run, whole_file, write_text
from vlmpack.offline.engine import Engine, run_tasks
from vlmpack.offline.files import SourceFile, corpus_files, read_rows
from vlmpack.offline.settings import IndexSettings, check_fingerprint
from vlmpack.packing.pad_token import pad_token_id
from vlmpack.samples import Refusal, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

VERSION: Final = 1
SCHEMA: Final = pa.schema([
    ("row", pa.int64()),
    ("key", pa.string()),
    ("reason", pa.string()),
    ("message", pa.string()),
    ("tokens", pa.int32()),
    ("images", pa.int32()),
    ("patches", pa.int64()),
    ("tiles", pa.int32()),
    ("heights", pa.list_(pa.int32())),
    ("widths", pa.list_(pa.int32())),
    ("image_starts", pa.list_(pa.int32())),
    ("input_ids", pa.list_(pa.int32())),
    ("labels", pa.list_(pa.int32())),
])
"""One row a row of the file, in its order; `reason` is null where the row can be packed."""

_ROWS_A_GROUP: Final = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedFile:
    """One file of an index."""

    file: SourceFile
    """As it was when it was read."""
    part: str
    """The name of its part."""
    rows: int
    """Rows of the file."""
    refused: dict[str, int]
    """Rows that cannot be packed, by reason."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "file": self.file.as_dict(),
            "part": self.part,
            "rows": self.rows,
            "refused": dict(sorted(self.refused.items())),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """An index on disk."""

    folder: Path
    """Where it is."""
    corpus: Path
    """Where its files are."""
    settings: IndexSettings
    """How rows became costs."""
    fingerprint: dict[str, Any]
    """What it depends on."""
    pad_token_id: int
    """The tokenizer's padding token, so that whoever writes packs need not load it."""
    files: tuple[IndexedFile, ...]
    """By name."""

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(each.rows for each in self.files)

    @property
    def refused(self) -> Counter[str]:
        """Rows that cannot be packed, by reason."""
        total: Counter[str] = Counter()
        for each in self.files:
            total.update(each.refused)
        return total

    @property
    def digest(self) -> str:
        """A name for all that it says."""
        text = json.dumps([self.fingerprint, [each.as_dict() for each in self.files]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def part(self, number: int) -> Path:
        """Return the path of a file's part.

        Args:
            number: Of the file.
        """
        return self.folder / "parts" / self.files[number].part

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Return the index in a folder.

        Args:
            folder: Where `build_index` put it.

        Raises:
            ConfigError: If there is none, or a part is missing.
        """
        folder = Path(folder)
        path = folder / "index.json"
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            if plain["version"] != VERSION:
                raise ConfigError(f"{path} has version {plain['version']}, this program reads {VERSION}")
            files = tuple(
                IndexedFile(
                    file=SourceFile(**each["file"]),
                    part=each["part"],
                    rows=each["rows"],
                    refused=each["refused"],
                )
                for each in plain["files"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder} is no whole index: {path.name} {error}; run the index again"
            ) from error
        missing = [each.file.name for each in files if not (folder / "parts" / each.part).is_file()]
        if missing:
            raise ConfigError(f"{folder} lacks the part of {missing[0]}; run the index again")
        return cls(
            folder=folder,
            corpus=Path(plain["corpus"]),
            settings=IndexSettings(**plain["settings"]),
            fingerprint=plain["fingerprint"],
            pad_token_id=plain["pad_token_id"],
            files=files,
        )


def build_index(
    source: str | Path | Sequence[Path],
    out: str | Path,
    settings: IndexSettings | None = None,
    *,
    engine: Engine | None = None,
    on_file: Callable[[IndexedFile, int], object] | None = None,
) -> Index:
    """Read every file that is new or changed, and write the index. O(rows of those files).

    Args:
        source: The corpus: a folder, a file, or the files of `dataset_files`.
        out: The index; may hold an older one of the same settings.
        settings: How rows become costs.
        engine: What runs the files; None: a process for each core.
        on_file: Called with each file as it is done, and the number of files.

    Raises:
        ConfigError: If there is no file, the folder has an index of other settings, or another run writes it.
        SourceError: If a file is broken or a worker died.
    """
    settings = settings or IndexSettings()
    root, files = corpus_files(Path(source) if isinstance(source, str) else source)
    out = Path(out)
    tokenizer = settings.load_tokenizer()
    fingerprint = settings.fingerprint(tokenizer)
    with only_run(out):
        if (out / "index.json").is_file():
            check_fingerprint(out, json.loads((out / "index.json").read_text())["fingerprint"], fingerprint)
        parts = {file.name: _part_name(file, fingerprint) for file in files}
        done: dict[str, IndexedFile] = {}
        tasks = []
        for file in files:
            finished = _finished(file, out / "parts" / parts[file.name])
            if finished is None:
                tasks.append((file, root, out / "parts" / parts[file.name], settings))
            else:
                done[file.name] = finished
        for made in run_tasks(index_file, tasks, engine or Engine()):
            done[made.file.name] = made
            if on_file is not None:
                on_file(made, len(files))
        plain = {
            "version": VERSION,
            "corpus": str(root.resolve()),
            "settings": settings.model_dump(),
            "fingerprint": fingerprint,
            "pad_token_id": pad_token_id(tokenizer),
        }
        _write_index(out, plain, [done[file.name] for file in files])
    return Index.open(out)


def index_file(file: SourceFile, root: Path, part: Path, settings: IndexSettings) -> IndexedFile:
    """Write the part of one file: the unit of work, a plain function for any engine.

    Args:
        file: As it was listed.
        root: The corpus.
        part: Where to write.
        settings: How rows become costs.

    Raises:
        SourceError: If the file is broken, or changed since it was listed.
    """
    path = file.check(root)
    samples = settings.samples(read_rows(path), _tokenizer(settings), root)
    refused: Counter[str] = Counter()
    num_rows = 0
    with whole_file(part) as draft:
        metadata = {b"file": json.dumps(file.as_dict()).encode()}
        with pq.ParquetWriter(draft, SCHEMA.with_metadata(metadata), compression="zstd") as writer:
            for group in _groups(_records(samples, file, settings), _ROWS_A_GROUP):
                num_rows += len(group)
                refused.update(record["reason"] for record in group if record["reason"] is not None)
                writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
            writer.add_key_value_metadata({"refused": json.dumps(dict(sorted(refused.items())))})
        file.check(root)  # read while somebody wrote it, it would be neither the old nor the new one
    return IndexedFile(file=file, part=part.name, rows=num_rows, refused=dict(refused))


def _records(samples: Any, file: SourceFile, settings: IndexSettings) -> Iterator[dict[str, Any]]:
    for row, item in enumerate(samples):
        key = item.key if settings.key_column is not None else f"{file.name}:{row}"
        yield _refused(row, key, item) if isinstance(item, Refusal) else _admitted(row, key, item)


def _admitted(row: int, key: str, sample: Sample) -> dict[str, Any]:
    return {
        "row": row,
        "key": key,
        "reason": None,
        "message": None,
        "tokens": sample.cost.num_tokens,
        "images": sample.cost.num_images,
        "patches": sample.cost.num_patches,
        "tiles": sum(geometry.num_tiles for geometry in sample.geometries),
        "heights": [image.height for image in sample.images],
        "widths": [image.width for image in sample.images],
        "image_starts": list(sample.image_starts),
        "input_ids": sample.input_ids,
        "labels": sample.labels,
    }


def _refused(row: int, key: str, refusal: Refusal) -> dict[str, Any]:
    return {**dict.fromkeys(SCHEMA.names), "row": row, "key": key, "reason": str(refusal.reason),
            "message": refusal.message[:500]}  # fmt: skip


def _groups(records: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for record in records:
        group.append(record)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


_TOKENIZERS: dict[str, Any] = {}
"""Of this process: a worker loads a tokenizer once, not once a file."""


def _tokenizer(settings: IndexSettings) -> Any:
    name = settings.model_dump_json()
    if name not in _TOKENIZERS:
        _TOKENIZERS[name] = settings.load_tokenizer()
    return _TOKENIZERS[name]


def _part_name(file: SourceFile, fingerprint: dict[str, Any]) -> str:
    text = json.dumps([VERSION, file.as_dict(), fingerprint], sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.parquet"


def _finished(file: SourceFile, part: Path) -> IndexedFile | None:
    """Return what an earlier run found in the file, or None if it has to be read.

    Raises:
        SourceError: If what it wrote is broken.
    """
    if not part.is_file():
        return None
    try:
        footer = pq.read_metadata(part)
        refused = json.loads(footer.metadata[b"refused"])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise SourceError(f"{part} is broken: {error}; remove it and index again") from error
    return IndexedFile(file=file, part=part.name, rows=footer.num_rows, refused=refused)


def _write_index(out: Path, plain: dict[str, Any], files: list[IndexedFile]) -> None:
    """Write the index, and remove the parts of files that are gone or changed."""
    listed = {**plain, "files": [each.as_dict() for each in files]}
    write_text(out / "index.json", json.dumps(listed, indent=1) + "\n")
    known = {each.part for each in files}
    for path in (out / "parts").glob("*.parquet"):
        if path.name not in known:
            path.unlink()


__all__ = ["Index", "IndexedFile", "build_index", "index_file"]
