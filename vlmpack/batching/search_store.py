"""What a search tried, on disk: one that was killed goes on, and what killed it twice is not tried again."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlmpack.batching.search_rules import Trial
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmpack.batching.search import SearchResult
    from vlmpack.batching.search_rules import Rule


KILLED_FOR_GOOD: Final = 2
"""A size that began so often and never ended does not fit."""


class SearchStore:
    """A file of JSON lines, one before and one after each try, written through to the disk.

    A try that began and never ended was killed with its process. Once, that may have been anything, and it is
    made again; twice, and it counts as a size that does not fit (the system's OOM killer, a crash). On
    several ranks each needs a path of its own.

    Args:
        path: The file; made if it is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._digests: dict[str, str] = {}

    def trials(self, name: str, rule: Rule, start: int, cap: int) -> list[Trial]:
        """Return what earlier runs of the same search tried.

        Args:
            name: The configuration.
            rule: How sizes are chosen; another rule, start or cap is another search.
            start: The first size.
            cap: The largest size that may be used.

        Raises:
            ConfigError: If the file is no such store.
        """
        text = json.dumps([name, type(rule).__name__, repr(rule), start, cap])
        self._digests[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        trials: dict[int, Trial] = {}
        begun: Counter[int] = Counter()
        for line in self._lines():
            if line.get("search") != self._digests[name]:
                continue
            size = int(line["batch_size"])
            if line.get("cancelled"):
                begun[size] -= 1
            elif "fits" in line:
                trials[size] = Trial(size, bool(line["fits"]), line.get("peak_bytes"))
                begun[size] = 0
            else:
                begun[size] += 1
                if begun[size] >= KILLED_FOR_GOOD:
                    trials[size] = Trial(size, fits=False, peak_bytes=None)
        return list(trials.values())

    def begin(self, name: str, batch_size: int) -> None:
        """Note that a try begins.

        Args:
            name: The configuration, as in `trials`.
            batch_size: The size.
        """
        self._write({"search": self._digests[name], "name": name, "batch_size": batch_size})

    def end(self, name: str, trial: Trial) -> None:
        """Note how it ended.

        Args:
            name: The configuration, as in `trials`.
            trial: What became of it.
        """
        self._write({"search": self._digests[name], "name": name, **trial._asdict()})

    def cancel(self, name: str, batch_size: int) -> None:
        """Note that a try ended without an outcome: it was interrupted, or failed for another reason.

        Args:
            name: The configuration, as in `trials`.
            batch_size: The size.
        """
        line = {"search": self._digests[name], "name": name, "batch_size": batch_size, "cancelled": True}
        self._write(line)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        read = []
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
                read.append({**value})
            except (json.JSONDecodeError, TypeError) as error:
                if number == len(lines):  # cut short by what killed the process
                    break
                raise ConfigError(
                    f"{self.path}, line {number}, is no record of a search: {line!r}"
                ) from error
        return read

    def _write(self, value: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() and not self._ends_whole():
                file.write("\n")
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def write_results(path: str | Path, results: Sequence[SearchResult]) -> None:
    """Write the results as JSON: {"summary": [...]}, a row a configuration. Whole or not at all.

    Args:
        path: The file; an old one is replaced.
        results: In the order in which they were found.
    """
    path = Path(path)
    text = json.dumps({"summary": [result.as_dict() for result in results]}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
