"""Monitor: keeps what every step did, on disk as it happens, and makes curves, tables and a report of it.

folder/metrics.jsonl    a line a step and an epoch, written at once: a run that dies leaves its metrics
folder/metrics.json     everything, by `export_json`
folder/report.html      by `generate_report`
"""

from __future__ import annotations

import json
import logging
import math
import time
from typing import TYPE_CHECKING, Any, Final

from vlmpack.batching.metrics import BatchMetrics, EpochMetrics
from vlmpack.errors import ConfigError
from vlmpack.memory.linear_cost import GB

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

FORMAT: Final = 1
"""Version of what is written."""


class DynamicBatchingMonitor:
    """Records batches and epochs of a run.

    An epoch ends when a step of the next one is recorded, or by `end_epoch`. Only one process should have a
    monitor with a folder.

    Args:
        folder: Where metrics and the report go; None: nowhere by themselves.
        title: Of the report.
        limit_bytes: What the device has, drawn beside its use; None: unknown.
        settings: What the run was configured with, for the report.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        title: str = "Training",
        limit_bytes: float | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.folder = folder
        self.title = title
        self.limit_bytes = limit_bytes
        self.settings = dict(settings or {})
        self.batches: list[BatchMetrics] = []
        """Every step, in order."""
        self.epochs: list[EpochMetrics] = []
        """Every finished epoch."""
        self._first_of_epoch = 0
        self._started = time.perf_counter()
        self._eval_losses: dict[int, float] = {}
        self._num_ooms = 0
        self._owns_journal = False

    # ---- recording -------------------------------------------------------------------------
    def record_batch(self, metrics: BatchMetrics) -> None:
        """Add a step.

        Args:
            metrics: What it did; steps and epochs never go back.

        Raises:
            ConfigError: If the step is not later than the last one; `rewind` first where a run goes back.
        """
        if self.batches:
            last = self.batches[-1]
            if metrics.step <= last.step or metrics.epoch < last.epoch:
                raise ConfigError(
                    f"step {metrics.step} of epoch {metrics.epoch} comes after step {last.step} of epoch "
                    f"{last.epoch}: call rewind({metrics.step - 1}) where a run resumes from there"
                )
            if metrics.epoch > last.epoch:
                self.end_epoch()
        if not math.isfinite(metrics.loss):
            logger.warning("step %d has a loss of %s", metrics.step, metrics.loss)
        self.batches.append(metrics)
        self._num_ooms += metrics.num_ooms
        self._write("batch", metrics.to_json())

    def record_evaluation(self, loss: float) -> None:
        """Add an evaluation: it belongs to the epoch that is running, or that has just ended.

        Args:
            loss: The evaluation's loss.
        """
        if self._open:
            self._eval_losses[self.batches[-1].epoch] = loss
        elif self.epochs:
            values = self.epochs[-1].to_json() | {"eval_loss": loss}
            self.epochs[-1] = EpochMetrics.from_json(values)
            self._write("epoch", self.epochs[-1].to_json())

    def end_epoch(self) -> EpochMetrics | None:
        """Sum up the steps since the last epoch ended.

        Returns:
            The epoch, or None if there was no step.
        """
        if not self._open:
            return None
        steps = self._open
        epoch = steps[-1].epoch
        now = time.perf_counter()
        # Records that come from elsewhere are made in no time.
        seconds = max(now - self._started, math.fsum(each.seconds for each in steps))
        metrics = EpochMetrics.of(epoch, steps, seconds=seconds, eval_loss=self._eval_losses.pop(epoch, None))
        self.epochs.append(metrics)
        self._first_of_epoch, self._started = len(self.batches), now
        self._write("epoch", metrics.to_json())
        return metrics

    @property
    def _open(self) -> list[BatchMetrics]:
        return self.batches[self._first_of_epoch :]

    def rewind(self, step: int) -> None:
        """Forget what came after a step, for a run that resumes from it.

        Where the folder has metrics of an earlier process, they are read first. A run that begins at 0 sets
        them aside.

        Args:
            step: The last step that counts.
        """
        if not self.batches and step > 0 and self.folder is not None:
            path = self.folder / "metrics.jsonl"
            self.batches, self.epochs = _read_journal(path) if path.exists() else ([], [])
            self._owns_journal = True
        elif self.batches and step == 0 and self.folder is not None:
            _set_aside(self.folder / "metrics.jsonl")  # another run with the same monitor
        self.batches = [each for each in self.batches if each.step <= step]
        done = sum(each.num_steps for each in self.epochs)
        while done > len(self.batches):
            done -= self.epochs.pop().num_steps
        self._first_of_epoch, self._started = done, time.perf_counter()
        self._num_ooms = sum(each.num_ooms for each in self.batches)
        if self._owns_journal:
            self._rewrite()

    # ---- what a run was --------------------------------------------------------------------
    def latest(self) -> dict[str, float]:
        """Return the last step's figures by names that fit a Trainer's log; empty before the first step."""
        if not self.batches:
            return {}
        last = self.batches[-1]
        figures: dict[str, float | None] = {
            "samples_per_s": last.samples_per_s or None,
            "step_samples": last.num_samples,
            "micro_batches": last.num_micro_batches,
            "memory_peak_gb": last.peak_bytes / GB or None,
            "oom_recoveries": self._num_ooms,
            "lr_scale": last.lr_scale,
            **{f"loss_{task}": loss for task, loss in last.task_losses.items()},
            **{f"weight_{task}": weight for task, weight in last.task_weights.items()},
        }
        return {name: value for name, value in figures.items() if value is not None}

    def summary(self) -> EpochMetrics:
        """Return the whole run as if it were one epoch; its `seconds` are those of the epochs."""
        seconds = math.fsum(each.seconds for each in self.epochs) + math.fsum(
            each.seconds for each in self._open
        )
        return EpochMetrics.of(self.epochs[-1].epoch if self.epochs else 0, self.batches, seconds=seconds)

    @property
    def task_types(self) -> tuple[str, ...]:
        """Every task that occurred, sorted."""
        return tuple(
            sorted({task for each in self.batches for task in (*each.task_types, *each.task_losses)})
        )

    # ---- files -----------------------------------------------------------------------------
    def export_json(self, path: Path | None = None) -> Path:
        """Write everything as one JSON file, replaced whole.

        Args:
            path: Where to; None: metrics.json in the folder.

        Returns:
            Where to.
        """
        target = self._path(path, "metrics.json")
        values = {
            "format": FORMAT,
            "title": self.title,
            "settings": self.settings,
            "summary": self.summary().to_json(),
            "epochs": [each.to_json() for each in self.epochs],
            "batches": [each.to_json() for each in self.batches],
        }
        _replace(target, json.dumps(values, indent=1, allow_nan=False, default=str) + "\n")
        return target

    @classmethod
    def load(cls, path: Path) -> DynamicBatchingMonitor:
        """Return the monitor of a run from `metrics.jsonl` or from what `export_json` wrote.

        Args:
            path: Either file.

        Raises:
            ConfigError: If it is neither, or of a later version.
        """
        if path.suffix == ".jsonl":
            monitor = cls()
            monitor.batches, monitor.epochs = _read_journal(path)
        else:
            values = _parse(path.read_text(encoding="utf-8"), f"{path}")
            if values.get("format") != FORMAT:
                raise ConfigError(f"{path} has format {values.get('format')!r}, this version reads {FORMAT}")
            monitor = cls(title=values["title"], settings=values["settings"])
            monitor.batches = [BatchMetrics.from_json(each) for each in values["batches"]]
            monitor.epochs = [EpochMetrics.from_json(each) for each in values["epochs"]]
        monitor._first_of_epoch = sum(each.num_steps for each in monitor.epochs)
        monitor._num_ooms = sum(each.num_ooms for each in monitor.batches)
        return monitor

    def plot_training_curves(self, path: Path | None = None) -> Path:
        """Draw loss, memory, throughput and splits over the steps.

        Args:
            path: A picture, by its suffix; None: training_curves.png in the folder.

        Returns:
            Where it was written.
        """
        from vlmpack.batching.curves import training_curves

        target = self._path(path, "training_curves.png")
        training_curves(self).savefig(target, dpi=130)
        return target

    def plot_task_comparison(self, path: Path | None = None) -> Path:
        """Draw the tasks' losses, weights, gradient norms and shares of samples.

        Args:
            path: A picture, by its suffix; None: task_comparison.png in the folder.

        Returns:
            Where it was written.
        """
        from vlmpack.batching.curves import task_comparison

        target = self._path(path, "task_comparison.png")
        task_comparison(self).savefig(target, dpi=130)
        return target

    def generate_report(self, path: Path | None = None) -> Path:
        """Write one HTML file that needs no other, with figures and tables of the run.

        Args:
            path: Where to; None: report.html in the folder.

        Returns:
            Where it was written.
        """
        from vlmpack.batching.report_html import render

        target = self._path(path, "report.html")
        _replace(target, render(self))
        return target

    def close(self) -> None:
        """End the running epoch."""
        self.end_epoch()

    def _path(self, path: Path | None, name: str) -> Path:
        if path is not None:
            return path
        if self.folder is None:
            raise ConfigError(f"say where {name} should go: the monitor has no folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        path = self._path(None, "metrics.jsonl")
        if not self._owns_journal:
            _set_aside(path)
            self._owns_journal = True
        # Opened for each line: nothing is left in a buffer when a run dies. 30 us on a local disk.
        with path.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")

    def _rewrite(self) -> None:
        if self.folder is None:
            return
        lines = [{"kind": "batch", **each.to_json()} for each in self.batches]
        lines += [{"kind": "epoch", **each.to_json()} for each in self.epochs]
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        _replace(self._path(None, "metrics.jsonl"), text)


def _read_journal(path: Path) -> tuple[list[BatchMetrics], list[EpochMetrics]]:
    """Read what `_write` wrote; a last line that was cut off is left out.

    Raises:
        ConfigError: If a line is none of metrics.
    """
    batches: list[BatchMetrics] = []
    epochs: dict[int, EpochMetrics] = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            logger.warning("%s ends in the middle of a line, which is left out", path)
            break
        values = _parse(line, f"{path}, line {number}")
        kind = values.pop("kind", None)
        if kind == "batch":
            batches.append(BatchMetrics.from_json(values))
        elif kind == "epoch":
            epoch = EpochMetrics.from_json(values)
            epochs[epoch.epoch] = epoch  # written again when its evaluation came later
        else:
            raise ConfigError(f"{path}, line {number}: unknown kind {kind!r}")
    return batches, list(epochs.values())


def _set_aside(path: Path) -> None:
    """Rename the metrics of an earlier run, which this one does not continue."""
    if not path.exists() or not path.stat().st_size:
        return
    number = 1
    while (old := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(old)
    logger.info("metrics of an earlier run are now in %s", old)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where} holds no metrics")
    return values


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
