"""Where an image's bytes are, and what every header parser returns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from PIL import Image

if TYPE_CHECKING:
    from typing_extensions import Self


class OnDisk(Protocol):
    """Bytes that wait on disk until they are needed."""

    def read_bytes(self) -> bytes:
        """Return them."""
        ...


ImageSource: TypeAlias = bytes | Path | Image.Image | OnDisk
"""Compressed bytes, a file, a picture that Pillow has opened or decoded, or bytes that wait on disk."""


class StoredHeader(NamedTuple):
    """What a file's header says, before the orientation is applied."""

    height: int
    """Rows of pixels as stored."""
    width: int
    """Columns of pixels as stored."""
    mode: str
    """Pillow's name of the mode."""
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""
    format: str
    """Pillow's name of the format."""


class ByteView(Protocol):
    """What the header parsers need of a file: its length, and slices of it."""

    def __len__(self) -> int:
        """Return the number of bytes."""
        ...

    def __getitem__(self, span: slice, /) -> bytes:
        """Return the bytes of a slice with a step of 1, cut at the end as `bytes` cuts it."""
        ...


class FileView:
    """A file on disk seen as bytes, of which only the slices asked for are read.

    A header parser touches a few hundred bytes of a file of megabytes. On a network disk, reading
    whole files to plan would cost as much as training on them.

    Args:
        path: The file.

    Raises:
        OSError: If the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        # Small, so that hopping over a PNG's data chunks does not read them.
        self.stream: IO[bytes] = open(path, "rb", buffering=4096)  # noqa: SIM115 - closed by __exit__
        self._size = os.fstat(self.stream.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, span: slice, /) -> bytes:
        start, stop, _ = span.indices(self._size)
        self.stream.seek(start)
        return self.stream.read(max(0, stop - start))


def cut_off(where: str, size: int) -> str:
    """Return the message for a file that ends too early.

    Args:
        where: Where it ends, such as "in the JPEG header".
        size: Bytes that there are.
    """
    return f"the image ends {where}, after {size:,} bytes: it was cut off on its way here. Fetch it again."


def advise(fault: str) -> str:
    """Return the message for a file that no decoder understands.

    Args:
        fault: What is wrong, as a sentence without its full stop.
    """
    return f"{fault}. Open the file in a viewer, repair it or drop the row."
