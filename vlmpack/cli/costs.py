"""Costs: what the user calls a set of sample costs -> int64 [n, 3]: tokens, images, ViT patches.

A named workload, or a Parquet or CSV file with a row a sample. Only the columns that count are read.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from vlmpack.errors import ConfigError, SourceError
from vlmpack.packing.workloads import WORKLOADS, costs_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Int64s: TypeAlias = npt.NDArray[np.int64]

DEFAULT_NUM_SAMPLES: Final = 100_000
"""Samples that are drawn from a workload where nothing is said."""

COLUMNS: Final = ("num_tokens", "num_images", "num_patches", "num_tiles")
"""What a file's columns are called; all but the first may be missing, which means 0."""

MAX_COST: Final = 10**9
"""A cost above is taken for an error: no sample has as many tokens, images, patches or tiles."""


def read_costs(where: str, *, num_samples: int | None, seed: int, patches_per_tile: int) -> Int64s:
    """Return the costs that the user means, C-contiguous int64 [n, 3]. O(n).

    Args:
        where: A name of `WORKLOADS`, or a path that ends in .parquet or .csv.
        num_samples: Samples to draw from a workload, or rows to take from a file, from the first.
        seed: Decides the draw from a workload.
        patches_per_tile: What turns tiles into ViT patches.

    Raises:
        ConfigError: If there is neither a workload nor a file of this name.
        SourceError: If the file cannot be read, or does not hold costs.
    """
    if where in WORKLOADS:
        drawn = costs_of(where, DEFAULT_NUM_SAMPLES if num_samples is None else num_samples, seed)
        drawn[:, 2] *= patches_per_tile
        return drawn
    path = Path(where).expanduser()
    if path.suffix not in _READERS:
        raise ConfigError(f"{where} is neither a workload nor a Parquet or CSV file{_did_you_mean(path)}")
    if not path.is_file():
        raise ConfigError(f"there is no file {where}{_did_you_mean(path)}")
    return _costs(_read(path), where, num_samples, patches_per_tile)


def _read(path: Path) -> pa.Table:
    try:
        return _READERS[path.suffix](path)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(f"{path} cannot be loaded: {reason}") from error


def _read_parquet(path: Path) -> pa.Table:
    wanted = _wanted(path, parquet.read_schema(path).names)
    return parquet.ParquetFile(path).read(columns=wanted)


def _read_csv(path: Path) -> pa.Table:
    if not path.stat().st_size:
        raise SourceError(f"{path} is empty; its first line must name the columns, num_tokens among them")
    with csv.open_csv(path) as reader:
        wanted = _wanted(path, reader.schema.names)
    # Left to guess, Arrow takes the type of the first block and fails at a 1.5 in the second.
    types = dict.fromkeys(wanted, pa.float64())
    return csv.read_csv(path, convert_options=csv.ConvertOptions(include_columns=wanted, column_types=types))


_READERS: Final[dict[str, Callable[[Path], pa.Table]]] = {".parquet": _read_parquet, ".csv": _read_csv}


def _wanted(path: Path, names: list[str]) -> list[str]:
    """Return those of a file's columns that are costs.

    Raises:
        SourceError: If there is no column of tokens, or one too many.
    """
    twice = sorted({name for name in names if name in COLUMNS and names.count(name) > 1})
    if twice:
        raise SourceError(f"{path} has more than one column {', '.join(twice)}; keep one")
    if "num_tokens" not in names:
        near = get_close_matches("num_tokens", [name for name in names if name not in COLUMNS], n=1)
        meant = f" (rename {near[0]!r}?)" if near else ""
        raise SourceError(
            f"{path} has no column 'num_tokens'{meant}; there are {', '.join(map(repr, names)) or 'none'}"
        )
    if "num_patches" in names and "num_tiles" in names:
        raise SourceError(f"{path} has num_patches and num_tiles, which stand for the same; keep one of them")
    return [name for name in names if name in COLUMNS]


def _costs(table: pa.Table, where: str, num_samples: int | None, patches_per_tile: int) -> Int64s:
    if num_samples is not None:
        table = table.slice(0, num_samples)
    if not table.num_rows:
        raise SourceError(f"{where} has no row")
    costs = np.zeros((table.num_rows, 3), np.int64)
    for name in table.column_names:
        factor = patches_per_tile if name == "num_tiles" else 1
        costs[:, min(COLUMNS.index(name), 2)] = factor * _whole_numbers(table[name], name, where)
    return costs


def _whole_numbers(column: pa.ChunkedArray, name: str, where: str) -> Int64s:
    """Return the column as int64 [n], all of it at least 0 (tokens: at least 1).

    Raises:
        SourceError: If it holds anything else; names the first such row, from 0, and counts them.
    """
    if column.null_count == len(column):
        raise SourceError(f"{where}: the column {name} is empty")
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise SourceError(f"{where}: the column {name} must hold whole numbers, it holds {column.type}")
    numbers: npt.NDArray[np.int64 | np.float64] = column.to_numpy()
    # integers become floats where a value is missing, which then is NaN
    least = int(name == "num_tokens")
    good = (numbers >= least) & (numbers <= MAX_COST)
    if numbers.dtype.kind == "f":
        good &= numbers == np.trunc(numbers)
    if good.all():
        return numbers.astype(np.int64)
    row, num_wrong = int(good.argmin()), int((~good).sum())
    more = f" ({num_wrong:,} such rows of {good.size:,})" if num_wrong > 1 else ""
    raise SourceError(
        f"{where}, row {row}: {name} is {numbers[row]:.15g}; it must be a whole number from {least} to "
        f"{MAX_COST:,}{more}"
    )


def _did_you_mean(path: Path) -> str:
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    files = [str(path.parent / file.name) for file in beside if file.suffix in _READERS]
    near = get_close_matches(str(path), [*WORKLOADS, *files], n=1)
    return f" (did you mean {near[0]}?)" if near else f"; the workloads are {', '.join(WORKLOADS)}"
