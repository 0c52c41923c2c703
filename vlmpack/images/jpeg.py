"""JPEG headers by hand: size, mode and orientation in a few microseconds.

Only the segments before the first scan are walked. Pillow needs about 20 us to open a JPEG, and
warns about odd EXIF blocks on the way; warnings cannot be silenced without touching the state of the
whole process, so `strip_metadata` takes the blocks out before Pillow sees the file.

Source: ITU-T T.81 (JPEG) annex B; CIPA DC-007 (multi-picture format) section 5.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vlmpack.errors import SampleError
from vlmpack.images.orientation import ifd_integer, orientation_of
from vlmpack.images.source import ByteView, StoredHeader, advise, cut_off

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNATURE: Final = b"\xff\xd8\xff"
"""The first bytes of every JPEG file."""

_START_OF_FRAME: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN: Final = 0xDA
_APP1: Final = 0xE1
_APP2: Final = 0xE2
_HAS_LENGTH: Final = frozenset(range(0xC0, 0xFF)) - set(range(0xD0, 0xDA)) - {0xC8} | {_START_OF_SCAN}
_METADATA: Final = frozenset(range(0xE1, 0xF0)) - {0xEE} | {0xFE}
"""APP1 to APP15 and comments; APP14 (Adobe) tells the decoder about colours and stays."""
_MODES: Final = {1: "L", 3: "RGB", 4: "CMYK"}
_XMP: Final = b"http://ns.adobe.com/xap/1.0/\0"
_NUMBER_OF_IMAGES: Final = 0xB001
_head = struct.Struct(">BBH").unpack


class _Unusual(Exception):  # noqa: N818 - not an error: a hint to ask Pillow
    """The file is not laid out as writers lay it out."""


def _segments(data: ByteView) -> Iterator[tuple[int, int, int]]:
    # Yields (marker, start of the payload, end) up to and including the first scan's header.
    position, size, code = 2, len(data), 0
    while code != _START_OF_SCAN:
        head = data[position : position + 4]
        if len(head) < 4:
            raise SampleError("image_truncated", cut_off("in the JPEG header", size), num_bytes=size)
        mark, code, length = _head(head)
        if mark != 0xFF or length < 2 or code not in _HAS_LENGTH:
            raise _Unusual
        end = position + 2 + length
        if end > size:
            raise SampleError("image_truncated", cut_off("in the JPEG header", size), num_bytes=size)
        yield code, position + 4, end
        position = end


def parse_jpeg(data: ByteView) -> StoredHeader | None:
    """Return what the header says, or None if the file is unusual and Pillow has to be asked.

    Args:
        data: The file, beginning with `SIGNATURE`.

    Raises:
        SampleError: image_truncated if the file ends before its first scan; image_unreadable if the
            header describes what no decoder here can read.
    """
    frame = exif = xmp = pictures = b""
    try:
        for code, start, end in _segments(data):
            if code in _START_OF_FRAME:
                frame = data[start : start + 6]
            elif code == _APP1:
                payload = data[start:end]
                if payload.startswith(b"Exif\0\0"):
                    exif += payload[6:]
                elif payload.startswith(_XMP):
                    xmp = payload[len(_XMP) :]
            elif code == _APP2 and data[start : start + 4] == b"MPF\0":
                pictures = data[start + 4 : end]
    except _Unusual:
        return None
    if end == len(data):
        raise SampleError("image_truncated", cut_off("before the first JPEG scan", end), num_bytes=end)
    return _describe(frame, exif, xmp, pictures)


def _describe(frame: bytes, exif: bytes, xmp: bytes, pictures: bytes) -> StoredHeader | None:
    if len(frame) < 6:
        return None
    bits, height, width, layers = struct.unpack(">BHHB", frame)
    if bits != 8 or layers not in _MODES:
        raise SampleError(
            "image_unreadable",
            advise(f"a JPEG with {layers} layers of {bits} bits cannot be decoded, only 1, 3 or 4 of 8"),
            layers=layers,
            bits=bits,
        )
    # Pillow calls a file with several pictures MPO, unless the second one is a gain map.
    several = (ifd_integer(pictures, _NUMBER_OF_IMAGES) or 0) > 1 and b' hdrgm:Version="' not in xmp
    return StoredHeader(
        height, width, _MODES[layers], orientation_of(exif, xmp), "MPO" if several else "JPEG"
    )


def strip_metadata(data: bytes) -> bytes:
    """Return the file without metadata: the same pixels for a decoder, and nothing to stumble over.

    Args:
        data: A whole file; returned as it is where there is nothing to take out.
    """
    pieces, kept_from, view = [], 0, memoryview(data)
    try:
        for code, start, end in _segments(data):
            if code in _METADATA:
                pieces.append(view[kept_from : start - 4])
                kept_from = end
    except _Unusual:
        return data
    return b"".join([*pieces, view[kept_from:]]) if pieces else data
