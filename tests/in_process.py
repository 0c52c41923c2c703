"""DataLoader workers without processes, so that hypothesis can try hundreds of runs."""

from __future__ import annotations

import io
import pickle
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

from torch.utils.data._utils import worker as torch_worker
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def as_worker(worker_id: int, num_workers: int) -> Iterator[None]:
    """Let everybody who asks believe to be this worker of a DataLoader."""
    before = torch_worker._worker_info
    torch_worker._worker_info = SimpleNamespace(id=worker_id, num_workers=num_workers)
    try:
        yield
    finally:
        torch_worker._worker_info = before


class InProcessLoader:
    """Stands in for `torch.utils.data.DataLoader` with batch_size=None: the same items in the same order."""

    def __init__(self, dataset: object, *, num_workers: int, **_options: object) -> None:
        self._dataset = dataset
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[object]:
        if not self._num_workers:
            yield from self._dataset
            return
        streams = {}
        for worker in range(self._num_workers):
            twin = _copy(self._dataset)
            with as_worker(worker, self._num_workers):
                streams[worker] = iter(twin)
        while streams:
            for worker, stream in list(streams.items()):
                with as_worker(worker, self._num_workers):
                    try:
                        item = next(stream)
                    except StopIteration:
                        del streams[worker]
                        continue
                yield item


def _copy(dataset: object) -> object:
    """Return what a worker gets, but with the same tokenizers, which take half a second each to copy."""
    tokenizers: dict[str, object] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> str | None:
            if not isinstance(value, PreTrainedTokenizerBase):
                return None
            tokenizers[str(id(value))] = value
            return str(id(value))

    class Unpickler(pickle.Unpickler):  # noqa: S301 - our own
        def persistent_load(self, name: str) -> object:
            return tokenizers[name]

    file = io.BytesIO()
    Pickler(file).dump(dataset)
    file.seek(0)
    return Unpickler(file).load()
