"""JSON and JSON Lines files as rows, read where they lie.

`datasets` reads such files too, but gives up on the whole file at the first broken line, copies it into
its cache, and turns a column of mixed types (a content that is now a string, now a list of parts) into
JSON text. Here a broken line is one refused row.
"""

import json
from pathlib import Path

import numpy as np

from vlmpack.errors import SourceError


class JsonLines:
    """The rows of a JSON Lines file; a row is parsed when it is asked for. 8 bytes of memory a row.

    Args:
        path: A text file in UTF-8 with a JSON value a line; empty lines are skipped.
        max_rows: Rows to take, from the first.
    """

    def __init__(self, path: Path, *, max_rows: int | None = None) -> None:
        self._path = path
        starts: list[int] = []
        start = 0
        with path.open("rb") as file:
            for line in file:
                if len(starts) == max_rows:
                    break
                if line.strip():
                    starts.append(start)
                start += len(line)
        self._starts = np.array(starts, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> object:
        """Return the row at this index.

        Raises:
            IndexError: If there is none.
            ValueError: If the line is not JSON in UTF-8.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self._path.open("rb") as file:
            file.seek(int(self._starts[index]))
            return json.loads(file.readline())


def open_json(path: Path, *, max_rows: int | None = None) -> JsonLines | list[object]:
    """Return the rows of a JSON Lines file, or of a JSON file that is one array.

    Args:
        path: The file.
        max_rows: Rows to take, from the first.

    Raises:
        SourceError: If it is an array, which can only be read whole, and broken.
    """
    with path.open("rb") as file:
        is_array = file.read(4096).lstrip().startswith(b"[")
    if not is_array:
        return JsonLines(path, max_rows=max_rows)
    try:
        rows: list[object] = json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"{path} is not a JSON array, though it begins like one: {error}") from error
    return rows[:max_rows]
