"""Source: any data set -> (key, raw row), split over the workers of a DataLoader.

A row that the data set cannot make is refused where the data set can go on (it is indexed), and is
an error where it cannot (it is a stream, and Python generators die of exceptions).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeAlias

from torch.utils.data import IterableDataset as TorchStream
from torch.utils.data import get_worker_info

from vlmpack.errors import ConfigError, SourceError
from vlmpack.samples import Refusal

_ROWS_PER_READ: Final = 64

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

    def __iter__(self) -> Iterator[tuple[str, object] | Refusal]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.num_rows is None:
            return self._stream(worker_id, num_workers)
        start = self.num_rows * worker_id // num_workers
        stop = self.num_rows * (worker_id + 1) // num_workers
        return self._indexed(start, stop)

    def row(self, index: int) -> tuple[str, object] | Refusal:
        """Return the key and the raw row at `index`, or its refusal if the data set cannot make it.

        Raises:
            ConfigError: If the data set is a stream.
            IndexError: If there is no such row.
        """
        if self.num_rows is None:
            raise ConfigError("a stream has no rows by index; iterate over it, or load it map-style")
        if not -self.num_rows <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        index %= self.num_rows
        return next(self._indexed(index, index + 1))

    def _indexed(self, start: int, stop: int) -> Iterator[tuple[str, object] | Refusal]:
        rows: Iterator[object] | None = None
        for position in range(start, stop):
            try:
                # A generator that raised is spent: begin again behind the row that it failed on.
                rows = rows or _slice(self._dataset, position, stop)
                raw = next(rows)
            except StopIteration:
                raise SourceError(
                    f"the data set says that it has {self.num_rows} rows but ended at row {position}"
                ) from None
            except Exception as error:  # whatever the user's transform raises
                rows = None
                yield Refusal(
                    key=str(position),
                    reason="source_error",
                    message=f"the data set raised {type(error).__name__} on row {position}: {error!s:.500}",
                    numbers={"row": position, "exception": type(error).__name__},
                )
            else:
                yield self._key(raw, str(position)), raw

    def _stream(self, worker_id: int, num_workers: int) -> Iterator[tuple[str, object] | Refusal]:
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
                    f"{error!s:.500}. A stream cannot go on after an exception: catch it inside the mapped "
                    "function and return a row that a filter drops, or load the data set map-style, where "
                    "such a row is refused and counted."
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
    # Every torch stream has an index by inheritance, which raises, and many know their length.
    if isinstance(dataset, Mapping | TorchStream) or not hasattr(dataset, "__getitem__"):
        return None
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return None


def _slice(dataset: Any, start: int, stop: int) -> Iterator[object]:
    """Iterate over rows start..stop; a Hugging Face data set does this far faster than by index."""
    if not (hasattr(dataset, "select") and hasattr(dataset, "format")):
        return (dataset[index] for index in range(start, stop))
    if stop == start + 1:
        only = dataset[start]
        return iter(only.to_pylist() if dataset.format["type"] == "arrow" else [only])
    part = dataset.select(range(start, stop))
    if part.format["type"] != "arrow":
        return iter(part)
    return (row for table in part.iter(_ROWS_PER_READ) for row in table.to_pylist())


def _is_hf_stream(dataset: object) -> bool:
    from datasets import IterableDataset  # costs a second; a list of rows needs none of it

    return isinstance(dataset, IterableDataset)


def _undecoded(dataset: object) -> object:
    """Switch off image decoding in a Hugging Face data set; others are returned as they are.

    Raises:
        ConfigError: If it is a dictionary of splits instead of one split.
    """
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise ConfigError(f"pass one split, for example dataset[{next(iter(dataset), 'train')!r}]")
    if isinstance(dataset, Dataset | IterableDataset):
        from vlmpack.stages.features import undecoded  # after datasets, for the same reason

        return undecoded(dataset)
    return dataset
