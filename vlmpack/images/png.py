"""PNG headers by hand: size, mode and orientation without inflating a byte of the picture.

Pillow's `getexif()` decodes a whole PNG, because the EXIF chunk may follow the pixels: 19 ms for a
scanned page. Hopping from chunk to chunk finds it in microseconds.

Source: W3C PNG (third edition) sections 5, 11.2 and 11.3.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from vlmpack.errors import SampleError
from vlmpack.images.orientation import orientation_of, raw_profile
from vlmpack.images.source import ByteView, StoredHeader, advise, cut_off

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
"""The first bytes of every PNG file."""

_MODES: Final = {
    (1, 0): "1",
    (2, 0): "L",
    (4, 0): "L",
    (8, 0): "L",
    (16, 0): "I;16",
    (8, 2): "RGB",
    (16, 2): "RGB",
    (1, 3): "P",
    (2, 3): "P",
    (4, 3): "P",
    (8, 3): "P",
    (8, 4): "LA",
    (16, 4): "RGBA",
    (8, 6): "RGBA",
    (16, 6): "RGBA",
}
"""(bits, colour type) -> Pillow's mode."""

_NEEDED_TO_DECODE: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_TEXT: Final = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_EXIF_PROFILE: Final = b"Raw profile type exif"
_XMP: Final = b"XML:com.adobe.xmp"
_MAX_TEXT_BYTES: Final = 1 << 20
"""Text is inflated up to here: Pillow's own limit, so that a text chunk cannot be a bomb."""
_TAIL_BYTES: Final = 8
"""The end of the last data chunk holds a checksum and padding, no pixels. Pillow does without them, so
a file that lacks no more than this is for the decoder to judge."""
_is_name = re.compile(rb"\w\w\w\w").match
_head = struct.Struct(">L4s").unpack


def parse_png(data: ByteView) -> StoredHeader | None:
    """Return what the header says, or None if the file is unusual and Pillow has to be asked.

    Args:
        data: The file, beginning with `SIGNATURE`.

    Raises:
        SampleError: image_truncated if the file ends inside its header or its pixels;
            image_unreadable if a checksum or a field of the header is wrong.
    """
    size = len(data)
    start = data[8:33]
    if len(start) < 25:
        raise SampleError("image_truncated", cut_off("in the PNG header", size), num_bytes=size)
    length, name, width, height, bits, colour, _, method, _, checksum = struct.unpack(">L4sLL5BL", start)
    if length != 13 or name != b"IHDR":
        return None
    if zlib.crc32(start[4:21]) != checksum:
        raise SampleError("image_unreadable", advise("the checksum of the PNG header is wrong"))
    mode = _MODES.get((bits, colour))
    if mode is None or method != 0:
        fault = f"no PNG has colour type {colour} with {bits} bits and filter method {method}"
        raise SampleError("image_unreadable", advise(fault))
    return StoredHeader(height, width, mode, _orientation(data), "PNG")


def _chunks(data: ByteView) -> Iterator[tuple[bytes, int, int]]:
    # Yields (name, start of the payload, end) of every chunk between the header and the last one.
    position, size, pixels = 33, len(data), False
    while len(head := data[position : position + 8]) == 8:
        length, name = _head(head)
        end = position + 8 + length
        if name == b"IEND":
            return
        if name == b"IDAT":
            pixels = True
            if end > size + _TAIL_BYTES:
                raise SampleError("image_truncated", cut_off("in the PNG pixels", size), num_bytes=size)
        elif not _is_name(name):
            break
        yield name, position + 8, end
        position = end + 4
    if pixels:
        return  # What follows the pixels is broken or missing, which does not harm them.
    if position + 8 > size:
        raise SampleError("image_truncated", cut_off("before the PNG pixels", size), num_bytes=size)
    raise SampleError("image_unreadable", advise(f"the PNG has a chunk named {name!r}, which is no name"))


def _orientation(data: ByteView) -> int:
    """Return the orientation, which may stand in any chunk, also behind the pixels."""
    exif: bytes | None = None
    profile = xmp = b""
    for name, start, end in _chunks(data):
        if name == b"eXIf":
            exif = data[start:end]
        elif name in _TEXT:
            keyword, text = _text(data, name, start, end)
            profile = text if keyword == _EXIF_PROFILE else profile
            xmp = text if keyword == _XMP else xmp
    if exif is None:
        exif = raw_profile(profile.decode("latin-1")) if profile else b""
    return orientation_of(exif, xmp)


def _text(data: ByteView, name: bytes, start: int, end: int) -> tuple[bytes, bytes]:
    """Return the keyword and the text of a chunk, both empty where neither can hold an orientation."""
    keyword = next((k for k in (_EXIF_PROFILE, _XMP) if data[start : start + len(k) + 1] == k + b"\0"), None)
    if keyword is None:
        return b"", b""
    text, packed = data[start + len(keyword) + 1 : end], name == b"zTXt"
    if packed:
        text = text[1:]  # the compression method
    elif name == b"iTXt":
        fields = text[2:].split(b"\0", 2)  # language, translated keyword, text
        if len(text) < 2 or len(fields) < 3:
            return b"", b""
        packed, text = text[0] != 0, fields[2]
    if packed:
        try:
            text = zlib.decompressobj().decompress(text, _MAX_TEXT_BYTES)
        except zlib.error:
            return b"", b""
    return keyword, text


def strip_metadata(data: bytes) -> bytes:
    """Return the file without text, colour profiles, EXIF and animation: the same first picture.

    Pillow refuses a whole PNG for a large text chunk, and warns about animations that are not quite
    legal. None of that touches the pixels.

    Args:
        data: A whole file; returned as it is where there is nothing to take out.
    """
    pieces, kept_from, view = [], 0, memoryview(data)
    position, size = 8, len(data)
    while position + 8 <= size:
        length, name = _head(data[position : position + 8])
        end = position + 12 + length
        if name not in _NEEDED_TO_DECODE and _is_name(name):
            pieces.append(view[kept_from:position])
            kept_from = min(end, size)
        position = end
        if name == b"IEND":
            break
    return b"".join([*pieces, view[kept_from:]]) if pieces else data


class PlainPixels(NamedTuple):
    """The compressed pixels of a PNG without anything unusual about it."""

    data: bytes
    """A zlib stream of filtered rows."""
    depth: int
    """Bytes of a pixel: 3, or 4 with opacity."""
    window: int
    """How far back the stream says that it reaches, in bytes."""


def plain_pixels(data: bytes) -> PlainPixels | None:
    """Return the pixels of a PNG of 8 bits, RGB or RGBA, not interlaced; None for all others.

    None as well for what a decoder might take exception to, such as a palette or chunks out of order.

    Args:
        data: A whole file that `parse_png` has understood.
    """
    depth = {2: 3, 6: 4}.get(data[25])
    if depth is None or data[24] != 8 or data[26:29] != b"\0\0\0":
        return None
    pieces: list[memoryview] = []
    view, position, previous, name = memoryview(data), 33, b"", b""
    while name != b"IEND":
        if position + 8 > len(data):
            return None
        length, name = _head(data[position : position + 8])
        if name == b"IDAT" and (previous == name or not pieces):
            pieces.append(view[position + 8 : position + 8 + length])
        elif (
            name in _NEEDED_TO_DECODE - {b"IEND"}
            or not _is_name(name)
            or not (name[0] & 32 or name == b"IEND")
        ):
            return None
        position, previous = position + 12 + length, name
    stream = b"".join(pieces)
    return PlainPixels(stream, depth, 1 << ((stream[0] >> 4) + 8)) if stream else None
