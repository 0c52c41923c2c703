"""EXIF orientation: where formats hide it, and how it is undone.

`datasets` turns every image upright when it decodes it, so a planner that took width and height from
the header alone would plan another picture: orientations 5 to 8 swap the two. The rules are Pillow's
(`Image.getexif`): the EXIF block first, then, if it has no orientation, the XMP packet.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Final

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

UPRIGHT: Final[int] = 1
"""The orientation of a picture that needs no turning."""

_ORIENTATION_TAG: Final[int] = 0x0112
_BYTE_ORDERS: Final = {b"II*\0": "<", b"MM\0*": ">", b"MM*\0": ">", b"II\0*": "<"}
"""The first four bytes of a TIFF block; the last two are wrong but found in the wild."""
_INTEGER_CODES: Final = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}
"""TIFF field type -> struct code."""
_XMP_ORIENTATION: Final = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_METHODS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STEPS: Final = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
"""Orientation -> direction of rows and columns, after exchanging them where it asks for that."""


def ifd_integer(tiff: bytes, tag: int) -> int | None:
    """Return a whole number from the first directory of a TIFF block, None if it is not there.

    A broken block has no numbers: EXIF is decoration, and a picture is not refused for it.

    Args:
        tiff: The block, beginning with its byte order.
        tag: Number of the field, of which the first value is taken.
    """
    order = _BYTE_ORDERS.get(tiff[:4])
    if order is None:
        return None
    try:
        (offset,) = struct.unpack_from(order + "L", tiff, 4)
        (num_entries,) = struct.unpack_from(order + "H", tiff, offset)
        for position in range(offset + 2, offset + 2 + 12 * num_entries, 12):
            found, kind, count = struct.unpack_from(order + "HHL", tiff, position)
            if found != tag:
                continue
            code = _INTEGER_CODES.get(kind)
            if code is None or count < 1 or count * struct.calcsize("=" + code) > 4:
                return None
            value: int = struct.unpack_from(order + code, tiff, position + 8)[0]
            return value
    except struct.error:
        return None
    return None


def orientation_of(exif: bytes, xmp: bytes) -> int:
    r"""Return the orientation, 1 to 8, that these metadata ask for; 1 if they are silent or broken.

    Args:
        exif: The EXIF block, with or without its `Exif\0\0` prefix; may be empty.
        xmp: The XMP packet, may be empty.
    """
    value: int | None = None
    if exif:
        for _ in range(2):  # some writers put the prefix twice
            exif = exif.removeprefix(b"Exif\0\0")
        value = ifd_integer(exif, _ORIENTATION_TAG)
    if value is None and xmp:
        match = _XMP_ORIENTATION.search(xmp)
        value = int(match[1]) if match else None
    return value if value in _METHODS else UPRIGHT


def orientation_from_info(info: Mapping[str | tuple[int, int], object]) -> int:
    """Return the orientation that the metadata of an opened Pillow image ask for, without decoding it.

    Args:
        info: The image's `info`.
    """
    exif = info.get("exif")
    if exif is None:
        profile = info.get("Raw profile type exif")
        exif = raw_profile(profile) if isinstance(profile, str) else b""
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    if isinstance(xmp, str):
        xmp = xmp.encode("utf-8", "replace")
    return orientation_of(exif if isinstance(exif, bytes) else b"", xmp if isinstance(xmp, bytes) else b"")


def raw_profile(text: str) -> bytes:
    """Return the EXIF block out of ImageMagick's hexadecimal text form, empty if it is broken.

    Args:
        text: A line break, the word "exif", the length, and lines of hexadecimal digits.
    """
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return b""


def swaps_sides(orientation: int) -> bool:
    """Return whether this orientation exchanges height and width."""
    return orientation >= 5


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return the picture turned upright, itself if it is already.

    Args:
        image: Decoded pixels as stored.
        orientation: EXIF orientation, 1 to 8.
    """
    method = _METHODS.get(orientation)
    return image if method is None else image.transpose(method)


def turn_pixels(pixels: npt.NDArray[np.void], orientation: int) -> npt.NDArray[np.void]:
    """Return a view of a picture [H, W], turned upright.

    Args:
        pixels: As stored, one item a pixel: three bytes in one are turned twice as fast as one by one.
        orientation: EXIF orientation, 1 to 8.
    """
    if swaps_sides(orientation):
        pixels = pixels.T
    down, across = _STEPS.get(orientation, (1, 1))
    return pixels[::down, ::across]
