"""Every other format, through Pillow's lazy open.

`PIL.Image.open` itself is not called: above its pixel limit it warns or raises, and the limit as well
as the warning filters belong to the process, not to us. The plugins behind it are the same.
"""

from __future__ import annotations

import struct
from typing import IO, Final

from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from vlmpack.images.orientation import UPRIGHT, orientation_from_info
from vlmpack.images.source import StoredHeader

_ORIENTATION_TAG: Final[int] = 0x0112

FORMATS: Final = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF",
    "PPM", "ICO", "ICNS", "PSD", "DDS", "QOI", "SGI", "PCX", "TGA",
)  # fmt: skip
"""What is read, by Pillow's names. Left out are formats that run a program (EPS) or need a plug-in of
the user's (WMF, GRIB); TGA, which has no signature, comes last."""


def open_lazily(stream: IO[bytes]) -> ImageFile:
    """Return the picture as Pillow opens it: header read, pixels not decoded.

    Args:
        stream: The file; it has to stay open until the pixels are decoded.

    Raises:
        UnidentifiedImageError: If no format of `FORMATS` claims the file.
    """
    prefix = stream.read(16)
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN.get(name, (None, None))
        # An acceptor that returns a text says why it cannot, such as a missing library.
        if factory is None or (accept is not None and accept(prefix) is not True):
            continue
        stream.seek(0)
        try:
            # JPEG's registered factory warns about multi-picture files; the class takes the first.
            image = JpegImageFile(stream, "") if name == "JPEG" else factory(stream, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue
        if isinstance(image, ImageFile):
            return image
    raise UnidentifiedImageError(f"it is none of {', '.join(FORMATS)}")


def describe(image: Image.Image) -> StoredHeader:
    """Return what Pillow knows about a picture without decoding it.

    Args:
        image: Opened or decoded by Pillow.
    """
    width, height = image.size
    orientation = UPRIGHT
    if not isinstance(image, TiffImageFile):
        orientation = orientation_from_info(image.info)
    elif image.tile:
        # Pillow turns a TIFF when it loads it, and newer versions swap `size` already on opening.
        found = image.tag_v2.get(_ORIENTATION_TAG)
        orientation = found if isinstance(found, int) else orientation_from_info(image.info)
        orientation = orientation if orientation in range(1, 9) else UPRIGHT
        width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    return StoredHeader(height, width, image.mode, orientation, image.format or "memory")
