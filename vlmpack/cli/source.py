"""Source: what the user calls a data set -> its rows.

A Parquet, Arrow, JSON or JSON Lines file; a folder of such files, of `save_to_disk`, or of images with
their metadata; or, for streaming, a name on the Hugging Face Hub.
"""

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from vlmpack.cli.hub import check_hub
from vlmpack.cli.json_lines import open_json
from vlmpack.errors import ConfigError, SourceError

T = TypeVar("T")

_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_JSON = {".json", ".jsonl", ".ndjson"}
_METADATA = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Rows, and where their images may lie."""

    rows: Any
    """What `RowSource` takes: a Hugging Face data set or a sequence of rows."""
    folder: Path | None
    """The folder of the data, None on the Hub."""
    split: str
    """The split that was taken, empty where there are none."""


def open_source(
    where: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    streaming: bool = False,
    max_rows: int | None = None,
) -> Source:
    """Find the data set that the user means. Reads no row yet, except to copy a file into the cache.

    Args:
        where: A path, or a name on the Hub.
        split: The only one or "train" where None.
        subset: The configuration, for data sets that have several.
        streaming: Read files as they come, without copying them into the cache of `datasets`.
        max_rows: Rows to take, from the first.

    Raises:
        ConfigError: If there is no such data set, or it leaves a choice open.
        SourceError: If it cannot be loaded.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return _from_file(path, split, streaming, max_rows)
    if path.is_dir():
        return _from_folder(path, split, subset, streaming, max_rows)
    if not _HUB_NAME.match(where) or where.startswith(".") or path.suffix in _JSON | _TABLES.keys():
        raise ConfigError(f"there is no file or folder {where}{_did_you_mean(path)}")
    if not streaming:
        raise ConfigError(
            f"there is no file or folder {where}{_did_you_mean(path)}; if it is a data set on the Hugging "
            "Face Hub, add --streaming, which reads its rows as they come instead of downloading it first"
        )
    check_hub("dataset", where)
    return _from_hub_or_folder(where, split, subset, streaming, max_rows)


def _from_file(path: Path, split: str | None, streaming: bool, max_rows: int | None) -> Source:
    if path.suffix in _JSON:
        _only_split("", split, path)
        return Source(rows=open_json(path, max_rows=max_rows), folder=path.parent, split="")
    if path.suffix not in _TABLES:
        known = ", ".join(sorted([*_JSON, *_TABLES]))
        raise ConfigError(f"{path} is no data set: a file must end in one of {known}")
    rows = _read(_TABLES[path.suffix], path, split, streaming)
    return Source(rows=_first(rows, max_rows), folder=path.parent, split="")


def _from_folder(
    path: Path, split: str | None, subset: str | None, streaming: bool, max_rows: int | None
) -> Source:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_disk(path, split, max_rows)
    files = sorted(path.iterdir())
    if any(file.name in _METADATA for file in files):
        # Left alone, `datasets` takes a picture with "dev" or "test" in its name for a split of its own.
        rows = _read("imagefolder", path / "**", split, streaming)
        return Source(rows=_first(rows, max_rows), folder=path, split="")
    lines = [file for file in files if file.suffix in {".jsonl", ".ndjson"}]
    if lines:
        names = [file.stem for file in lines]
        chosen = names[0] if split is None and len(names) == 1 else _choose(split, names, path)
        rows = open_json(lines[names.index(chosen)], max_rows=max_rows)
        return Source(rows=rows, folder=path, split=chosen)
    return _from_hub_or_folder(str(path), split, subset, streaming, max_rows)


def _from_disk(path: Path, split: str | None, max_rows: int | None) -> Source:
    from datasets import DatasetDict, load_from_disk

    loaded = _loaded(str(path), lambda: load_from_disk(str(path)))
    if isinstance(loaded, DatasetDict):
        chosen = _choose(split, list(loaded), path)
        return Source(rows=_first(loaded[chosen], max_rows), folder=path, split=chosen)
    _only_split("", split, path)
    return Source(rows=_first(loaded, max_rows), folder=path, split="")


def _read(kind: str, path: Path, split: str | None, streaming: bool) -> Any:
    from datasets import load_dataset

    folder = path.parent
    _only_split("train", split, folder if path.name == "**" else path)
    files = f"{glob.escape(str(folder))}/{path.name if path.name == '**' else glob.escape(path.name)}"
    return _loaded(
        str(path), lambda: load_dataset(kind, data_files=files, split="train", streaming=streaming)
    )


def _from_hub_or_folder(
    where: str, split: str | None, subset: str | None, streaming: bool, max_rows: int | None
) -> Source:
    from datasets import load_dataset, load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    def builder() -> Any:
        try:
            return load_dataset_builder(where, name=subset)
        except (EmptyDatasetError, DataFilesNotFoundError) as error:
            raise ConfigError(
                f"{where} has no data in it; a folder must hold Parquet or JSON Lines files, images with a "
                "metadata.jsonl, or what save_to_disk wrote"
            ) from error

    splits = [str(name) for name in _loaded(where, builder).config.data_files or {}]
    chosen = _choose(split, splits, where)
    rows = _loaded(where, lambda: load_dataset(where, name=subset, split=chosen, streaming=streaming))
    folder = Path(where) if Path(where).is_dir() else None
    return Source(rows=_first(rows, max_rows), folder=folder, split=chosen)


def _choose(split: str | None, splits: Sequence[str], where: object) -> str:
    names = ", ".join(splits)
    if split is None:
        if len(splits) == 1:
            return splits[0]
        if "train" in splits:
            return "train"
        raise ConfigError(f"{where} has the splits {names}; choose one with --split")
    if split.partition("[")[0] not in splits:
        raise ConfigError(f"--split: {where} has no split {split!r}; it has {names}")
    return split


def _only_split(only: str, split: str | None, where: object) -> None:
    if split is not None and split != only:
        raise ConfigError(f"--split: {where} has no splits; leave the option out")


def _loaded(where: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except ConfigError:
        raise
    except Exception as error:  # `datasets` and Arrow raise dozens of kinds
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = (str(root).strip() or type(root).__name__).splitlines()[0]
        raise SourceError(f"{where} cannot be loaded: {reason}") from error


def _first(rows: Any, max_rows: int | None) -> Any:
    if max_rows is None:
        return rows
    return rows.select(range(min(max_rows, len(rows)))) if hasattr(rows, "select") else rows.take(max_rows)


def _did_you_mean(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""
