"""WebP headers by hand: Pillow's opener allocates the whole canvas, twice, before it knows its size.

Source: RFC 9649 (WebP) sections 2.3 to 2.7; RFC 6386 (VP8) section 9.1.
"""

from __future__ import annotations

import struct
from typing import Final

from vlmpack.errors import SampleError
from vlmpack.images.orientation import orientation_of
from vlmpack.images.source import ByteView, StoredHeader, cut_off

_ALPHA: Final = 0x10
_EXIF: Final = 0x08
_XMP: Final = 0x04
_head = struct.Struct("<4sL").unpack


def is_webp(start: bytes) -> bool:
    """Return whether a file that begins with these bytes is a WebP file.

    Args:
        start: At least the first 12 bytes.
    """
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP"


def parse_webp(data: ByteView) -> StoredHeader | None:
    """Return what the header says, or None if the file is unusual and Pillow has to be asked.

    Args:
        data: The file, for which `is_webp` holds.

    Raises:
        SampleError: image_truncated if the file is shorter than its header says.
    """
    start, size = data[:30], len(data)
    if size < 30 or int.from_bytes(start[4:8], "little") + 8 > size:
        raise SampleError(
            "image_truncated",
            cut_off("before the length that its WebP header promises", size),
            num_bytes=size,
        )
    kind, orientation = start[12:16], 1
    if kind == b"VP8X":
        flags = start[20]
        width = 1 + int.from_bytes(start[24:27], "little")
        height = 1 + int.from_bytes(start[27:30], "little")
        alpha = bool(flags & _ALPHA)
        if flags & (_EXIF | _XMP):
            orientation = _orientation(data)
    elif kind == b"VP8L" and start[20] == 0x2F:
        bits = int.from_bytes(start[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        alpha = bool(bits >> 28 & 1)
    elif kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", start[26:30]))
        alpha = False
    else:
        return None
    return StoredHeader(height, width, "RGBA" if alpha else "RGB", orientation, "WEBP")


def _orientation(data: ByteView) -> int:
    """Return the orientation, having hopped over the chunks of an extended file."""
    exif = xmp = b""
    position = 12
    while len(head := data[position : position + 8]) == 8:
        name, length = _head(head)
        if name == b"EXIF":
            exif = data[position + 8 : position + 8 + length]
        elif name == b"XMP ":
            xmp = data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
    return orientation_of(exif, xmp)
