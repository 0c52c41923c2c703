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
from multiprocessing import parent_process
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Final

from vlmpack.packing.report import PackingReport

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vlmpack.budget import PackBudget

_WRITE_EVERY_S: Final = 0.5


class Ledger:
    """Keeps the `PackingReport` of each worker of one data set; picklable, so workers take it along.

    A worker's file bears the number of the process that reads it, so that the training processes of one
    launcher, each with workers of its own, do not add up each other's counts.

    Args:
        budget: What a pack may hold.
    """

    def __init__(self, budget: PackBudget) -> None:
        self._budget = budget
        self._own: list[PackingReport] = []
        self._file: Path | None = None
        self._num_workers = 0
        self._finished = False
        self._written_s = 0.0
        self._open_folder()

    def _open_folder(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=f"vlmpack-{os.getpid()}-"))
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _remove, self._folder, self._owner)

    def start(self, worker_id: int = 0, num_workers: int = 0) -> PackingReport:
        """Begin a pass in this process and return its empty report, to be counted into.

        Args:
            worker_id: The DataLoader worker.
            num_workers: Workers in all, 0 in the main process.
        """
        parent = parent_process()
        reader = parent.pid if num_workers and parent is not None else os.getpid()
        for file in self._folder.glob(f"{reader}-*.json"):  # of an earlier pass with other workers
            if not num_workers or not file.name.endswith(f"-of-{num_workers}.json"):
                file.unlink(missing_ok=True)
        self._file = self._folder / _name(reader, worker_id, num_workers) if num_workers else None
        self._num_workers = num_workers
        self._own = [PackingReport(budget=self._budget)]
        self._finished = False
        self.write(now=True)
        return self._own[0]

    def add(self, report: PackingReport) -> PackingReport:
        """Let the pass in this process count into one more report, and return it.

        Args:
            report: Under the same budget; what it has counted before is part of the pass.
        """
        self._own.append(report)
        return report

    def finish(self) -> PackingReport | None:
        """End a pass in this process.

        Returns:
            The sum over all workers if this one is the last to finish, else None.
        """
        self._finished = True
        self.write(now=True)
        if self._file is None or not self._folder.exists():
            return self._sum(self._own)
        reader = self._file.name.partition("-")[0]
        # By name: a listing of the folder may miss a file that is being replaced just now.
        names = [_name(reader, worker, self._num_workers) for worker in range(self._num_workers)]
        reports = _read(self._folder / name for name in names)
        finished = [report for report, has_finished in reports if has_finished]
        return self._sum(finished) if len(finished) == self._num_workers else None

    def write(self, *, now: bool = False) -> None:
        """Let other processes see the report; at most every half second unless `now`."""
        if self._file is None or not self._own:
            return
        if not now and time.monotonic() - self._written_s < _WRITE_EVERY_S:
            return
        draft = self._file.with_suffix(f".{os.getpid()}")
        report = self._sum(self._own).as_dict()
        try:
            draft.write_text(json.dumps({"finished": self._finished, "report": report}))
            draft.replace(self._file)
        except FileNotFoundError:  # the data set was dropped while its workers were still running
            return
        self._written_s = time.monotonic()

    def has_workers(self) -> bool:
        """Return whether workers count for this process."""
        return any(self._folder.glob(f"{os.getpid()}-*.json"))

    def total(self) -> PackingReport:
        """Return the sum over this process and all workers of the latest pass."""
        files = sorted(self._folder.glob(f"{os.getpid()}-*.json"))
        return self._sum([report for report, _ in _read(files)] or self._own)

    def _sum(self, reports: list[PackingReport]) -> PackingReport:
        total = PackingReport(budget=self._budget)
        for report in reports:
            total.merge(report)
        return total

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in {"_finalizer", "_own"}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._own = []
        # A worker shares the folder of the process that started it; any other copy is on its own.
        if self._owner == os.getpid() or not self._folder.exists():
            self._open_folder()


def _name(reader: int | str | None, worker_id: int, num_workers: int) -> str:
    return f"{reader}-{worker_id}-of-{num_workers}.json"


def _read(files: Iterable[Path]) -> list[tuple[PackingReport, bool]]:
    """Return the report of each worker that has begun, and whether it has finished."""
    found = []
    for file in files:
        try:
            content = json.loads(file.read_text())
        except FileNotFoundError:  # not begun, or begun anew just now
            continue
        found.append((PackingReport.from_dict(content["report"]), bool(content["finished"])))
    return found


def _remove(folder: Path, owner: int) -> None:
    """Remove the folder, but never from a forked worker that ends before its parent."""
    if os.getpid() == owner:
        rmtree(folder, ignore_errors=True)
