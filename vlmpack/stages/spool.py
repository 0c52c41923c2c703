"""Spool: samples whose images wait on disk, so that a deep look-ahead takes little memory.

A look-ahead of 4,096 samples holds their compressed images: 0.9 GB a worker where they are 200 kB each.
On disk they cost a write and a read, 1 % of what decoding costs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlmpack.errors import ConfigError
from vlmpack.images.spool import Spool
from vlmpack.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmpack.samples import Refusal
    from vlmpack.stages.tokenize import VQADataset

_Item = TypeVar("_Item")


class SpooledSamples:
    """A `VQADataset` whose images wait on disk while it is iterated over; all else is the data set's own.

    Packs and their pixels are the same. Where the disk is full images wait in memory, with a warning.

    Args:
        dataset: The samples.
        folder: For files without a name, on a disk that takes a look-ahead of each worker; the folder for
            temporary files where None, which on some systems is memory.

    Raises:
        ConfigError: If the folder does not exist.
    """

    def __init__(self, dataset: VQADataset, folder: str | Path | None = None) -> None:
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"the folder {str(folder)!r} for waiting images does not exist; make it first")
        self._dataset = dataset
        self._folder = None if folder is None else Path(folder)

    def __iter__(self) -> Iterator[Sample | Refusal]:
        return self._spooled(iter(self._dataset))

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # asked for before it is there, when this is copied or unpickled
            raise AttributeError(name)
        value = getattr(self._dataset, name)
        if name == "samples":  # the other way to iterate, which resuming takes
            return lambda *arguments: self._spooled(value(*arguments))
        return value

    def _spooled(self, items: Iterator[_Item]) -> Iterator[_Item | Sample]:
        spool = Spool(self._folder)
        for item in items:
            yield _on_disk(item, spool) if isinstance(item, Sample) else item

    def __getitem__(self, index: int) -> Sample | Refusal:
        return self._dataset[index]


def _on_disk(sample: Sample, spool: Spool) -> Sample:
    images = tuple(
        replace(image, source=spool.put(image.source)) if isinstance(image.source, bytes) else image
        for image in sample.images
    )
    return replace(sample, images=images)
