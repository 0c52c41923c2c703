"""An image's size, mode and orientation from its first bytes: planning needs no pixels.

JPEG, PNG and WebP are read by hand in 1 to 20 us; everything else costs Pillow's lazy open.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from PIL import Image

from vlmpack.errors import SampleError
from vlmpack.images import jpeg, png, webp
from vlmpack.images.formats import describe, open_lazily
from vlmpack.images.orientation import swaps_sides
from vlmpack.images.source import ByteView, FileView, ImageSource, StoredHeader, advise

MAX_PIXELS: Final[int] = 178_956_970
"""Twice Pillow's `MAX_IMAGE_PIXELS` as shipped, the size at which Pillow itself refuses to open a file:
13,377 x 13,377 pixels, which decode to 0.5 GiB of RGB."""


_CHECKED_BY_PILLOW: Final = {"TIFF": 1, "WEBP": 2}
"""Formats whose plug-in asks `PIL.Image.MAX_IMAGE_PIXELS` while it decodes, and how often it lets the
limit be exceeded. A TIFF above it would warn the whole process; planned for, it would be missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """What can be known about an image without decoding it."""

    height: int
    """Pixels, upright: after the EXIF orientation is applied."""
    width: int
    """Pixels, upright: after the EXIF orientation is applied."""
    mode: str
    """Pillow's name of the stored mode, such as "RGB", "P" or "I;16"."""
    orientation: int
    """EXIF orientation as stored, 1 (upright) to 8."""
    format: str
    """Pillow's name of the format, "memory" for a picture that was never a file."""


def read_header(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Return an image's upright size, mode and format without decoding a pixel.

    Height and width are those of the picture after `datasets` has decoded and turned it. O(number of
    chunks in the file), whatever the size of the picture. Safe to call from many threads.

    Args:
        source: Compressed bytes, a file, or a Pillow image, which is not loaded by this.
        max_pixels: Largest height x width that is let through; for TIFF no more than Pillow's
            `MAX_IMAGE_PIXELS`, for WebP twice that, as their plug-ins do not go further.

    Raises:
        SampleError: image_empty for no bytes; image_truncated if the file ends too early, as far as
            the header tells; image_too_large above `max_pixels`; image_unreadable for everything else
            that is wrong, a missing file among it.
    """
    stored = _stored(source)
    height, width = stored.height, stored.width
    if swaps_sides(stored.orientation):
        height, width = width, height
    if height < 1 or width < 1:
        fault = f"the header promises {height} x {width} pixels (height x width)"
        raise SampleError("image_unreadable", advise(fault), height=height, width=width)
    max_pixels = min(max_pixels, _pillows_limit(stored.format))
    if height * width > max_pixels:
        raise SampleError(
            "image_too_large",
            f"{height} x {width} (height x width) are {height * width:,} pixels, over the limit of "
            f"{max_pixels:,}. Scale the image down, or raise max_pixels if you trust the data.",
            height=height,
            width=width,
            max_pixels=max_pixels,
        )
    return ImageHeader(
        height=height, width=width, mode=stored.mode, orientation=stored.orientation, format=stored.format
    )


def _pillows_limit(image_format: str) -> int:
    """Return the pixels above which Pillow's plug-in for this format itself warns or refuses."""
    own, times = Image.MAX_IMAGE_PIXELS, _CHECKED_BY_PILLOW.get(image_format)
    return sys.maxsize if own is None or times is None else own * times


def _stored(source: ImageSource) -> StoredHeader:
    if isinstance(source, bytes):
        return _parse(source)
    if isinstance(source, Path):
        try:
            with FileView(source) as view:
                return _parse(view)
        except OSError as error:
            raise SampleError("image_unreadable", no_file(source, error)) from error
    if isinstance(source, Image.Image):
        return describe(source)
    raise SampleError(
        "image_unreadable",
        f"an image must be bytes, a pathlib.Path or a Pillow image, got {type(source).__name__}",
    )


def no_file(path: Path, error: OSError) -> str:
    """Return the message for a file that cannot be read at all.

    Args:
        path: The file.
        error: What the system said.
    """
    return f"{path} cannot be read ({error.strerror or error}). Check the path and its permissions."


def _parse(data: ByteView) -> StoredHeader:
    start = data[:12]
    if not start:
        raise SampleError(
            "image_empty", "the image has 0 bytes. Fetch it again or drop the row.", num_bytes=0
        )
    stored: StoredHeader | None = None
    if start.startswith(jpeg.SIGNATURE):
        stored = jpeg.parse_jpeg(data)
    elif start.startswith(png.SIGNATURE):
        stored = png.parse_png(data)
    elif webp.is_webp(start):
        stored = webp.parse_webp(data)
    return stored or _ask_pillow(data)


def _ask_pillow(data: ByteView) -> StoredHeader:
    stream: IO[bytes] = data.stream if isinstance(data, FileView) else io.BytesIO(data[:])
    stream.seek(0)
    try:
        return describe(open_lazily(stream))
    except Exception as error:
        # Pillow's plugins raise a dozen kinds of exception on damaged files, none documented.
        raise explain(error, len(data)) from error


def explain(error: Exception, size: int | None) -> SampleError:
    """Return our error for what Pillow raised: truncated if it says so, else unreadable.

    Args:
        error: What Pillow raised.
        size: Length of the file in bytes, None for a picture that came without one.
    """
    said = str(error) or type(error).__name__
    where = "the image" if size is None else f"the image of {size:,} bytes"
    numbers = {} if size is None else {"num_bytes": size}
    if isinstance(error, Image.DecompressionBombError):
        return SampleError("image_too_large", f"{where} is too large for Pillow: {said}", **numbers)
    if isinstance(error, EOFError) or "truncated" in said.lower():
        return SampleError("image_truncated", f"{where} ends too early ({said}). Fetch it again.", **numbers)
    return SampleError("image_unreadable", advise(f"{where} cannot be decoded ({said})"), **numbers)
