"""Source: any data set -> (key, raw row), split over the workers of a DataLoader.

A row that the data set cannot make is refused where the data set can go on (it is indexed), and is
an error where it cannot (it is a stream, and Python generators die of exceptions).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypedDict

import numpy as np
from torch.utils.data import IterableDataset as TorchStream
from torch.utils.data import get_worker_info

from vlmpack.errors import ConfigError, SourceError
from vlmpack.samples import Refusal
from vlmpack.stages.upstream import Upstream, UpstreamState

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64s: TypeAlias = npt.NDArray[np.int64]

_ROWS_PER_READ: Final = 64

RawRow: TypeAlias = Mapping[str, object]
"""A row as the data set gives it, before anybody looked at its columns."""


class SourceState(TypedDict):
    """Where a `RowSource` stands, behind the row that it gave last; plain values, fit for JSON."""

    part: list[int] | None
    """[worker, workers] that read it; None before the first row, where it suits any number of workers."""
    epoch: int
    """The pass over the data."""
    num_read: int
    """Rows of this part that came before, or, of a stream, rows that were pulled out of it."""
    window: list[int] | None
    """Of a shuffled stream: [the window, rows of it that came]; what stands above is its beginning."""
    upstream: UpstreamState
    """What a streaming data set says of itself."""


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
        shuffle_seed: Shuffle the rows, another way in each epoch: all of them where the data set has a
            length, else within windows. None leaves them in order.
        shuffle_window: Rows of a stream that wait to be shuffled together.

    Raises:
        ConfigError: If `dataset` is neither indexable nor iterable, or a setting is invalid.
    """

    def __init__(
        self,
        dataset: object,
        *,
        key_column: str | None = None,
        splits_itself: bool = False,
        shuffle_seed: int | None = None,
        shuffle_window: int = 1024,
    ) -> None:
        if shuffle_window < 1:
            raise ConfigError(f"shuffle_window must be at least 1 row, got {shuffle_window}")
        if shuffle_seed is not None and shuffle_seed < 0:
            raise ConfigError(f"shuffle_seed must not be negative, got {shuffle_seed}")
        is_hugging_face = _is_hf_stream(dataset)
        self._dataset = _undecoded(dataset)
        self._key_column = getattr(dataset, "key_column", None) if key_column is None else key_column
        self._splits_itself = (
            splits_itself or is_hugging_face or bool(getattr(dataset, "splits_itself", False))
        )
        self._seed = shuffle_seed
        self._window_rows = shuffle_window
        self.num_rows: int | None = _length(dataset)
        """Rows in all, None for a stream."""
        if self.num_rows is None and not isinstance(dataset, Iterable):
            raise ConfigError(
                f"a data set must be iterable, or have a length and an index; {type(dataset).__name__} has "
                "neither. Pass one split of a DatasetDict, for example dataset['train']."
            )
        self._upstream = Upstream(self._dataset, is_hugging_face=is_hugging_face)
        self._place = _beginning(0)
        self._is_at_row = False
        """Whether the place of an unshuffled stream is behind `_num_pulled` rows, not where it began."""
        self._num_pulled = 0
        self._saved: SourceState | None = None

    @property
    def resume_fault(self) -> str:
        """Why a position would not be exact; empty if it is."""
        return self._upstream.fault

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data the next one is: what is shuffled is shuffled another way in each.

        Args:
            epoch: From 0.
        """
        self._place, self._is_at_row = _beginning(epoch), False

    def state_dict(self) -> SourceState:
        """Return where the latest pass stands, behind the row that it gave last.

        Raises:
            ConfigError: If the place in this data set could not be found again.
        """
        if self.resume_fault:
            raise ConfigError(self.resume_fault)
        if self._saved is not None:
            return self._saved
        if self._is_at_row:
            self._place["num_read"] = self._num_pulled
            self._place["upstream"] = self._upstream.state()
        return self._place.copy()

    def load_state_dict(self, state: SourceState | None) -> None:
        """Begin the next pass behind the row that was given last when the state was saved.

        Args:
            state: From `state_dict` of a source over the same data; None forgets one that was loaded.
        """
        self._saved = state

    def __iter__(self) -> Iterator[tuple[str, object] | Refusal]:
        worker = get_worker_info()
        part = [worker.id, worker.num_workers] if worker else [0, 1]
        self._begin(part)
        if self.num_rows is None:
            rows = self._stream(part) if self._seed is None else self._shuffled(part, self._seed)
        else:
            rows = self._part(part)
        yield from rows

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
        return next(self._indexed(range(index, index + 1)))

    def digest(self) -> str:
        """Return what tells this data set from another: its length or shards, columns, and some of its text.

        Text of the first and the last row only, so that it costs two rows; none of a stream.
        """
        described: list[object] = [self._key_column, self._seed, self.num_rows]
        if self.num_rows is None:
            described += [self._window_rows, type(self._dataset).__name__]
            described += [
                getattr(self._dataset, name, None) for name in ("column_names", "num_shards", "shards")
            ]
        for index in {0, self.num_rows - 1} if self.num_rows else ():
            item = self.row(index)
            described.append(item.key if isinstance(item, Refusal) else (item[0], _texts(item[1])))
        return f"{zlib.crc32(repr(described).encode(errors='replace')):08x}"

    def _begin(self, part: list[int]) -> None:
        """Stand where the saved state says, or at the beginning of the epoch.

        Raises:
            ConfigError: If the state is of another number of workers.
        """
        saved, self._saved = self._saved, None
        self._place = _beginning(self._place["epoch"]) if saved is None else saved.copy()
        self._is_at_row = False
        if self._place["part"] not in (None, part):
            worker, num_workers = self._place["part"] or part
            raise ConfigError(
                f"the saved position is of worker {worker} of {num_workers}, this is worker {part[0]} of "
                f"{part[1]}: each worker reads a part of its own. Use num_workers={num_workers} again"
            )
        self._place["part"] = part
        self._num_pulled = self._place["num_read"]

    def _part(self, part: list[int]) -> Iterator[tuple[str, object] | Refusal]:
        """Yield this worker's rows of a data set with a length."""
        assert self.num_rows is not None
        start, stop = (self.num_rows * worker // part[1] for worker in (part[0], part[0] + 1))
        order: range | Int64s = range(start, stop)
        if self._seed is not None:
            rng = np.random.default_rng([self._seed, self._place["epoch"]])
            order = rng.permutation(self.num_rows)[start:stop].copy()  # the whole of it is let go
        first = self._place["num_read"]
        for number, item in enumerate(self._indexed(order[first:]), first + 1):
            self._place["num_read"] = number
            yield item

    def _indexed(self, order: range | Int64s) -> Iterator[tuple[str, object] | Refusal]:
        rows: Iterator[object] | None = None
        for number, position in enumerate(map(int, order)):
            try:
                # A generator that raised is spent: begin again behind the row that it failed on.
                rows = rows or _rows_at(self._dataset, order[number:])
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

    def _stream(self, part: list[int]) -> Iterator[tuple[str, object] | Refusal]:
        worker_id, num_workers = part
        prefix = f"{worker_id}:" if num_workers > 1 and self._splits_itself else ""
        rows = self._upstream.rows(
            epoch=self._place["epoch"], num_read=self._place["num_read"], state=self._place["upstream"]
        )
        self._is_at_row = self._seed is None
        last = "the start"
        while True:
            position = self._num_pulled
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
            self._num_pulled += 1
            if isinstance(raw, Refusal):
                yield raw
            elif self._splits_itself or position % num_workers == worker_id:
                key = self._key(raw, f"{prefix}{position}")
                last = f"row {key}"
                yield key, raw

    def _shuffled(self, part: list[int], seed: int) -> Iterator[tuple[str, object] | Refusal]:
        """Yield the rows of a stream window by window, each window in a seeded order of its own."""
        number, num_done = self._place["window"] or (0, 0)
        rows = self._stream(part)
        failure: SourceError | None = None
        is_last = False
        while not is_last:
            if not num_done:
                upstream = None if self.resume_fault else self._upstream.state()
                self._place |= {"num_read": self._num_pulled, "upstream": upstream, "window": [number, 0]}
            window: list[tuple[str, object] | Refusal] = []
            try:
                window.extend(islice(rows, self._window_rows))
            except SourceError as error:  # raised behind the rows that came before it
                failure = error
            is_last = len(window) < self._window_rows
            rng = np.random.default_rng([seed, self._place["epoch"], part[0], number])
            for done, index in enumerate(rng.permutation(len(window)).tolist(), 1):
                if done > num_done:
                    self._place["window"] = [number, done]
                    yield window[index]
            number, num_done = number + 1, 0
        if failure is not None:
            raise failure

    def _key(self, raw: object, position: str) -> str:
        if self._key_column is None or not isinstance(raw, Mapping):
            return position
        if self._key_column not in raw:
            raise ConfigError(
                f"key_column {self._key_column!r} is not a column; there are {', '.join(map(repr, raw))}"
            )
        return str(raw[self._key_column])


def _beginning(epoch: int) -> SourceState:
    return SourceState(part=None, epoch=epoch, num_read=0, window=None, upstream=None)


def _texts(value: object) -> object:
    """Return the texts and numbers in a row, without its pictures."""
    if isinstance(value, Mapping):
        return [(str(name), _texts(inner)) for name, inner in value.items()]
    if isinstance(value, list | tuple):
        return [_texts(inner) for inner in value]
    return value if isinstance(value, str | int | float) else type(value).__name__


def _length(dataset: object) -> int | None:
    """Return the number of rows where rows can be had by index, else None."""
    # Every torch stream has an index by inheritance, which raises, and many know their length.
    if isinstance(dataset, Mapping | TorchStream) or not hasattr(dataset, "__getitem__"):
        return None
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return None


def _rows_at(dataset: Any, order: range | Int64s) -> Iterator[object]:
    """Iterate over rows by number; a Hugging Face data set does this far faster than one by one."""
    if not (hasattr(dataset, "select") and hasattr(dataset, "format")):
        return (dataset[int(index)] for index in order)
    is_arrow = dataset.format["type"] == "arrow"
    if len(order) == 1:
        only = dataset[int(order[0])]
        return iter(only.to_pylist() if is_arrow else [only])
    if not isinstance(order, range):
        if not is_arrow:
            return (dataset[int(index)] for index in order)
        reads = (order[start : start + _ROWS_PER_READ] for start in range(0, len(order), _ROWS_PER_READ))
        return (row for read in reads for row in dataset[read.tolist()].to_pylist())
    part = dataset.select(order)
    if not is_arrow:
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
