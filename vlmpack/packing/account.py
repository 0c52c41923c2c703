"""Account: what became of each row, a line a row, in Parquet files.

A file carries its final name only once it is whole. Memory stays bounded: lines are written in groups.

A run that was stopped and resumed reads some rows again and may write them down again. What becomes of a
row is the same each time, so lines that agree in epoch, worker and row are one line: `read_account` keeps
one of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmpack.errors import ConfigError, StorageError, why_unwritten

if TYPE_CHECKING:
    from vlmpack.errors import RefusalReason

COLUMNS: Final = pa.schema([
    pa.field("epoch", pa.int32(), nullable=False),
    pa.field("worker", pa.int32(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("pack", pa.int64()),
    pa.field("reason", pa.string()),
])
"""`row`: rows that this worker read before it. Of `pack`, the pack's number in the order of this worker, and
`reason`, for which the row was refused, one is always null."""

_LINES_A_GROUP: Final = 8192


class Account:
    """Writes the lines of one pass of one worker; a file that nothing was added to is not written.

    Args:
        folder: Made if need be.
        epoch: The pass over the data.
        part: [worker, workers].
    """

    def __init__(self, folder: Path, *, epoch: int, part: list[int]) -> None:
        self._folder = folder
        self._epoch = epoch
        self._worker, self._num_workers = part
        self._lines: list[tuple[int, str, int | None, str | None]] = []
        self._writer: pq.ParquetWriter | None = None
        self._draft: Path | None = None

    def add(
        self, key: str, row: int, *, pack: int | None = None, reason: RefusalReason | None = None
    ) -> None:
        """Write down what became of a row.

        Args:
            key: Names the row.
            row: Rows before it.
            pack: The pack that it is in.
            reason: Why it is in none.

        Raises:
            StorageError: If the disk is full, or the folder cannot be written.
        """
        self._lines.append((row, key, pack, reason))
        if len(self._lines) >= _LINES_A_GROUP:
            self._write()

    def close(self) -> None:
        """Finish the file and give it its name.

        Raises:
            StorageError: If the disk is full, or the folder cannot be written.
        """
        self._write()
        if self._writer is None or self._draft is None:
            return
        try:
            self._writer.close()
            number = 0
            while (file := self._file(number)).exists():
                number += 1
            self._draft.replace(file)
        except OSError as error:
            raise StorageError(why_unwritten(error, f"the account in {self._folder}")) from error
        finally:
            self._writer = None

    def _file(self, number: int) -> Path:
        stem = f"account-{self._epoch:04d}-{self._worker:05d}-of-{self._num_workers:05d}"
        return self._folder / f"{stem}-{number:03d}.parquet"

    def _write(self) -> None:
        if not self._lines:
            return
        rows, keys, packs, reasons = zip(*self._lines, strict=True)
        columns: dict[str, Any] = {
            "epoch": [self._epoch] * len(rows),
            "worker": [self._worker] * len(rows),
            "row": rows,
            "key": [key.encode(errors="replace").decode() for key in keys],
            "pack": packs,
            "reason": reasons,
        }
        self._lines = []
        try:
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._draft = self._folder / f".account-{self._worker:05d}.{os.getpid()}.part"
                self._writer = pq.ParquetWriter(self._draft, COLUMNS, compression="zstd")
            self._writer.write_table(pa.table(columns, schema=COLUMNS))
        except OSError as error:
            raise StorageError(why_unwritten(error, f"the account in {self._folder}")) from error


def read_account(folder: str | Path) -> pa.Table:
    """Return one line for each row of all finished files, ordered by epoch, worker and row.

    Args:
        folder: That accounts were written into.

    Raises:
        ConfigError: If there is none.
    """
    files = sorted(Path(folder).glob("account-*.parquet"))
    if not files:
        raise ConfigError(f"there is no account in {folder}")
    table = pa.concat_tables([pq.read_table(file) for file in files])
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in ("epoch", "worker", "row")])
    table = table.take(order)
    places = [table[name].to_numpy() for name in ("epoch", "worker", "row")]
    is_first = [True] * min(1, len(table))
    is_first += [any(place[at] != place[at - 1] for place in places) for at in range(1, len(table))]
    return table.filter(pa.array(is_first))
