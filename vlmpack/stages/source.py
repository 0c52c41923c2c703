"""Source: any data set -> (key, raw row), split over the workers of a DataLoader.

A row that the data set cannot make is refused where the data set can go on (it is indexed), and is
an error where it cannot (it is a stream, and Python generators die of exceptions).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch.utils.data import get_worker_info

from vlmpack.errors import ConfigError, SourceError
from vlmpack.samples import Refusal

RawRow: TypeAlias = Mapping[str, object]
"""A row as the data set gives it, before anybody looked at its columns."""


class RowSource:
    """Rows of a data set with their keys, each exactly once over all workers.

    * A data set with a length is cut into contiguous ranges, one a worker.
    * A Hugging Face `IterableDataset` deals its shards to the workers itself.
    * Any other iterable is read whole by each worker, which keeps every W-th row; pass
      `splits_itself=True` if it looks at `get_worker_info` on its own.

    Hugging Face image columns are cast to undecoded bytes, so that reading a row costs no pixels.

    Args:
        dataset: A Hugging Face data set, a torch data set, a list of rows, or an iterable of rows.
        key_column: The column that names a row; its position where None.
        splits_itself: Whether a plain iterable gives each worker its own part.

    Raises:
        ConfigError: If `dataset` is neither indexable nor iterable.
    """

    def __init__(
        self, dataset: object, *, key_column: str | None = None, splits_itself: bool = False
    ) -> None:
        self._dataset = _undecoded(dataset)
        self._key_column = key_column
        self._splits_itself = splits_itself or _is_hf_stream(dataset)
        self.num_rows: int | None = _length(dataset)
        """Rows in all, None for a stream."""
        if self.num_rows is None and not isinstance(dataset, Iterable):
            raise ConfigError(
                f"a data set must be iterable, or have a length and an index; {type(dataset).__name__} has "
                "neither. Pass one split of a DatasetDict, for example dataset['train']."
            )

    def __iter__(self) -> Iterator[tuple[str, RawRow] | Refusal]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.num_rows is None:
            return self._stream(worker_id, num_workers)
        start = self.num_rows * worker_id // num_workers
        stop = self.num_rows * (worker_id + 1) // num_workers
        return self._indexed(start, stop)

    def row(self, index: int) -> tuple[str, RawRow]:
        """Return the key and the raw row at `index` of a data set that has a length.

        Raises:
            ConfigError: If the data set is a stream.
            IndexError: If there is no such row.
        """
        if self.num_rows is None:
            raise ConfigError("a stream has no rows by index; iterate over it, or load it map-style")
        if not -self.num_rows <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        index %= self.num_rows
        raw = self._dataset[index]  # type: ignore[index]
        return self._key(raw, str(index)), raw

    def _indexed(self, start: int, stop: int) -> Iterator[tuple[str, RawRow] | Refusal]:
        position = start
        while position < stop:
            # A generator that raised is spent: begin again behind the row that it failed on.
            rows = _slice(self._dataset, position, stop)
            try:
                for raw in rows:
                    yield self._key(raw, str(position)), raw
                    position += 1
            except Exception as error:  # noqa: BLE001  whatever the user's transform raises
                yield Refusal(
                    key=str(position),
                    reason="source_error",
                    message=f"the data set raised {type(error).__name__} on row {position}: {error}",
                    numbers={"row": position, "exception": type(error).__name__},
                )
                position += 1
            else:
                if position < stop:
                    raise SourceError(
                        f"the data set says that it has {self.num_rows} rows but ended at row {position}"
                    )

    def _stream(self, worker_id: int, num_workers: int) -> Iterator[tuple[str, RawRow] | Refusal]:
        prefix = f"{worker_id}:" if num_workers > 1 and self._splits_itself else ""
        rows = iter(self._dataset)  # type: ignore[call-overload]
        position = 0
        last = "the start"
        while True:
            try:
                raw = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise SourceError(
                    f"the data set raised {type(error).__name__} on row {prefix}{position} (after {last}): "
                    f"{error}. A stream cannot go on after an exception: catch it inside the mapped function "
                    "and return a row that a filter drops, or load the data set map-style, where such a "
                    "row is refused and counted."
                ) from error
            if self._splits_itself or position % num_workers == worker_id:
                key = self._key(raw, f"{prefix}{position}")
                last = f"row {key}"
                yield key, raw
            position += 1

    def _key(self, raw: object, position: str) -> str:
        if self._key_column is None or not isinstance(raw, Mapping):
            return position
        if self._key_column not in raw:
            raise ConfigError(
                f"key_column {self._key_column!r} is not a column; there are {', '.join(map(repr, raw))}"
            )
        return str(raw[self._key_column])


def _length(dataset: object) -> int | None:
    """Return the number of rows where rows can be had by index, else None."""
    if isinstance(dataset, Mapping) or not hasattr(dataset, "__getitem__"):
        return None
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return None


def _slice(dataset: Any, start: int, stop: int) -> Iterator[object]:
    """Iterate over rows start..stop; a Hugging Face data set does this far faster than by index."""
    if hasattr(dataset, "select") and hasattr(dataset, "features"):
        return iter(dataset.select(range(start, stop)))
    return (dataset[index] for index in range(start, stop))


def _is_hf_stream(dataset: object) -> bool:
    from datasets import IterableDataset  # noqa: PLC0415  costs a second; a list of rows needs none of it

    return isinstance(dataset, IterableDataset)


def _undecoded(dataset: object) -> object:
    """Switch off image decoding in a Hugging Face data set; others are returned as they are.

    Raises:
        ConfigError: If it is a dictionary of splits instead of one split.
    """
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict  # noqa: PLC0415

    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise ConfigError(f"pass one split, for example dataset[{next(iter(dataset), 'train')!r}]")
    if not isinstance(dataset, Dataset | IterableDataset) or dataset.features is None:
        return dataset
    for column, feature in dataset.features.items():
        plain = _without_decoding(feature)
        if plain is not feature:
            dataset = dataset.cast_column(column, plain)
    return dataset


def _without_decoding(feature: Any) -> Any:
    """Return the feature with every image in it left as bytes; the same object if nothing changes."""
    from datasets import Image, LargeList, List  # noqa: PLC0415

    if isinstance(feature, Image):
        return Image(mode=feature.mode, decode=False) if feature.decode else feature
    if isinstance(feature, List | LargeList):
        inner = _without_decoding(feature.feature)
        return feature if inner is feature.feature else type(feature)(inner)
    if isinstance(feature, dict):
        plain = {name: _without_decoding(value) for name, value in feature.items()}
        return feature if all(plain[name] is feature[name] for name in feature) else plain
    if isinstance(feature, Sequence) and not isinstance(feature, str) and len(feature) == 1:
        return [_without_decoding(feature[0])]
    return feature
