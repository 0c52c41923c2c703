"""Compressed images on disk until they are decoded, for look-aheads that would not fit into memory.

    segment 0  [ a | b | c ]   all read and gone: its file is closed, and with that gone
    segment 1  [ d | . | f ]   b, e were decoded; d and f still wait
    segment 2  [ g | h |         being written

Files have no name in their folder: they end with the process, however it ends.
"""

from __future__ import annotations

import logging
import os
import tempfile
import weakref
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

SEGMENT_BYTES: Final = 64 << 20
"""A file takes this much; one straggler keeps no more than this on disk."""
MIN_BYTES: Final = 16 << 10
"""Smaller images stay in memory."""


class _Segment:
    """A file without a name, closed when nothing refers to it any more."""

    def __init__(self, folder: Path | None) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            self.file = os.dup(file.fileno())
        self.num_bytes = 0
        weakref.finalize(self, os.close, self.file)


class SpooledBytes:
    """Where one image lies; reading is safe from many threads."""

    __slots__ = ("_num_bytes", "_segment", "_start")

    def __init__(self, segment: _Segment, start: int, num_bytes: int) -> None:
        self._segment, self._start, self._num_bytes = segment, start, num_bytes

    def __len__(self) -> int:
        return self._num_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (self.read_bytes(),)  # another process has no such file

    def read_bytes(self) -> bytes:
        """Return the image.

        Raises:
            OSError: If the disk fails.
        """
        data = os.pread(self._segment.file, self._num_bytes, self._start)
        if len(data) != self._num_bytes:
            raise OSError(f"{len(data)} of {self._num_bytes} spooled bytes could be read")
        return data


class Spool:
    """Writes images to disk one behind the other. For one thread.

    Args:
        folder: On a disk that takes the look-ahead's images; the system's folder for temporary files where
            None, which on some systems is memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._segment: _Segment | None = None
        self._is_full = False

    def put(self, data: bytes) -> bytes | SpooledBytes:
        """Return where the image lies now, or the image itself if it is small or the disk is full.

        Args:
            data: Compressed.
        """
        if len(data) < MIN_BYTES:
            return data
        try:
            return self._write(data)
        except OSError as error:
            if not self._is_full:
                logger.warning(
                    "images stay in memory while they wait, as they cannot be written to %s: %s",
                    self._folder or tempfile.gettempdir(),
                    error,
                )
            self._is_full, self._segment = True, None
            return data

    def _write(self, data: bytes) -> SpooledBytes:
        segment = self._segment
        if segment is None or segment.num_bytes >= SEGMENT_BYTES:
            segment = self._segment = _Segment(self._folder)
        start, written = segment.num_bytes, 0
        while written < len(data):  # a signal may cut a write short
            written += os.pwrite(segment.file, memoryview(data)[written:], start + written)
        segment.num_bytes = start + written
        self._is_full = False
        return SpooledBytes(segment, start, written)
