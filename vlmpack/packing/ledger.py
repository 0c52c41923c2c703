"""One report out of many processes: each worker keeps its own in a small file, the reader adds them up.

A DataLoader worker is another process and can end at any time; a file survives it, whatever the
start method is. Files are replaced whole, so a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import weakref
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Final

from vlmpack.packing.report import PackingReport

if TYPE_CHECKING:
    from vlmpack.budget import PackBudget

_WRITE_EVERY_S: Final = 0.5


class Ledger:
    """Keeps the `PackingReport` of each worker of one data set; picklable, so workers take it along.

    Args:
        budget: What a pack may hold.
    """

    def __init__(self, budget: PackBudget) -> None:
        self._budget = budget
        self._folder = Path(tempfile.mkdtemp(prefix="vlmpack-"))
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _remove, self._folder, self._owner)
        self._own: PackingReport | None = None
        self._file: Path | None = None
        self._written_s = 0.0

    def start(self, worker_id: int = 0, num_workers: int = 0) -> PackingReport:
        """Begin a pass in this process and return its empty report, to be counted into.

        Args:
            worker_id: The DataLoader worker.
            num_workers: Workers in all, 0 in the main process.
        """
        for file in self._folder.glob("*.json"):  # of an earlier pass with other workers
            if not num_workers or not file.name.endswith(f"-of-{num_workers}.json"):
                file.unlink(missing_ok=True)
        self._file = self._folder / f"{worker_id}-of-{num_workers}.json" if num_workers else None
        self._own = PackingReport(budget=self._budget)
        self.write(now=True)
        return self._own

    def write(self, *, now: bool = False) -> None:
        """Let other processes see the report; at most every half second unless `now`."""
        if self._file is None or self._own is None:
            return
        if not now and time.monotonic() - self._written_s < _WRITE_EVERY_S:
            return
        draft = self._file.with_suffix(f".{os.getpid()}")
        try:
            draft.write_text(json.dumps(self._own.as_dict()))
            draft.replace(self._file)
        except FileNotFoundError:  # the data set was dropped while its workers were still running
            return
        self._written_s = time.monotonic()

    def total(self) -> PackingReport:
        """Return the sum over this process and all workers of the latest pass."""
        total = PackingReport(budget=self._budget)
        files = sorted(self._folder.glob("*.json"))
        for file in files:
            total.merge(PackingReport.from_dict(json.loads(file.read_text())))
        if self._own is not None and not files:
            total.merge(self._own)
        return total

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in {"_finalizer", "_own"}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._own = None


def _remove(folder: Path, owner: int) -> None:
    """Remove the folder, but never from a forked worker that ends before its parent."""
    if os.getpid() == owner:
        rmtree(folder, ignore_errors=True)
