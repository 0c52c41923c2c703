"""Compressed bytes -> upright RGB pixels in a warm buffer, by the fastest decoder that is sure of the file.

    plain JPEG --simplejpeg--+
    plain PNG ----deflate----+--> uint8 [H, W, 3]
    everything else, or ---Pillow
    any doubt

A fast decoder never refuses: what it does not take goes to Pillow, whose word on broken files is final. So
the same files are refused for the same reasons whatever is installed, and the pixels are the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from vlmpack.images import accelerate, png
from vlmpack.images.decode import load_picture, read_bytes
from vlmpack.images.header import MAX_PIXELS, ImageHeader, read_header
from vlmpack.images.orientation import UPRIGHT, swaps_sides, turn_pixels
from vlmpack.images.scratch import SCRATCH
from vlmpack.kernels.png_unfilter import unfilter_png

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL import Image

    from vlmpack.images.source import ImageSource

    Pixels = npt.NDArray[np.uint8]

_STRIP_ROWS: Final = 64
"""Rows that are fetched from Pillow at a time, so that what they pass through stays warm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """Decoded pixels, perhaps at a fraction of the picture's size."""

    pixels: Pixels
    """uint8 [H, W, 3], C-contiguous; in this thread's scratch memory until the next picture."""
    height: int
    """Rows of the picture itself."""
    width: int
    """Columns of the picture itself."""
    fraction: int = 1
    """1, 2, 4 or 8: H is height / fraction, rounded up."""


def read_picture(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, at_least: tuple[int, int] | None = None
) -> Picture:
    """Return the upright picture. Frees the interpreter lock while it decodes.

    Args:
        source: Compressed bytes, a file, or a Pillow image.
        max_pixels: Largest height x width that is decoded.
        at_least: (height, width) that suffice: a JPEG that has twice, four or eight times as much is
            decoded at a fraction of its size. None for every pixel.

    Raises:
        SampleError: As `vlmpack.images.decode`.
    """
    source = read_bytes(source)
    header = read_header(source, max_pixels=max_pixels)
    size = (header.height, header.width)
    fraction = _fraction(header, at_least) if isinstance(source, bytes) and at_least else 1
    pixels = None
    if isinstance(source, bytes):
        stored = size[::-1] if swaps_sides(header.orientation) else size
        pixels = _decode_fast(source, header, stored, fraction)
    if pixels is not None:
        pixels = _upright(pixels, header.orientation)
    else:
        pixels = _copy_out(load_picture(source, header, fraction=fraction))
    return Picture(pixels=pixels, height=size[0], width=size[1], fraction=fraction)


def _fraction(header: ImageHeader, at_least: tuple[int, int]) -> int:
    """Return the largest of 1, 2, 4, 8 by which both sides can be divided and still suffice."""
    if header.format not in {"JPEG", "MPO"}:
        return 1
    spare = min(header.height // at_least[0], header.width // at_least[1])
    # Other eighths have no vector code in libjpeg-turbo: 5/8 takes longer than the whole picture.
    return next((fraction for fraction in (8, 4, 2) if spare >= fraction), 1)


def _decode_fast(data: bytes, header: ImageHeader, stored: tuple[int, int], fraction: int) -> Pixels | None:
    if header.format in {"JPEG", "MPO"} and header.mode in {"RGB", "L"}:
        return _decode_jpeg(data, stored, fraction)
    if header.format == "PNG" and header.mode in {"RGB", "RGBA"}:
        return _decode_png(data, stored)
    return None


def _decode_jpeg(data: bytes, stored: tuple[int, int], fraction: int) -> Pixels | None:
    """Return the pixels as stored, None if there is any doubt about the file."""
    simplejpeg = accelerate.module("simplejpeg")
    if simplejpeg is None:
        return None
    height, width = (-(-side // fraction) for side in stored)
    buffer = SCRATCH.take("pixels", height * width * 3)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width, min_factor=fraction, buffer=buffer
        )
    except (ValueError, RuntimeError):  # damaged or unusual, it does not say which
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _decode_png(data: bytes, stored: tuple[int, int]) -> Pixels | None:
    """Return the pixels, None if there is any doubt about the file."""
    deflate = accelerate.module("deflate")
    if deflate is None or accelerate.module("numba") is None:
        return None
    plain = png.plain_pixels(data)
    if plain is None:
        return None
    height, width = stored
    row = width * plain.depth
    if plain.window < min(height * (1 + row), 1 << 15):
        return None  # Pillow's inflate would refuse what reaches behind the window, this one does not ask
    try:
        filtered = deflate.zlib_decompress(plain.data, height * (1 + row))
    except deflate.DeflateError:
        return None
    if len(filtered) != height * (1 + row):
        return None
    pixels = SCRATCH.take("pixels", height * width * 3)
    known = unfilter_png(
        np.frombuffer(filtered, np.uint8).reshape(height, 1 + row),
        plain.depth,
        SCRATCH.take("lines", 2 * row).reshape(2, row),
        pixels.reshape(height, 3 * width),
    )
    return pixels.reshape(height, width, 3) if known else None


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation == UPRIGHT:
        return pixels
    turned = turn_pixels(pixels.view("V3")[..., 0], orientation)
    out = SCRATCH.take("upright", pixels.size).view("V3").reshape(turned.shape)
    np.copyto(out, turned)
    return out.view(np.uint8).reshape(*turned.shape, 3)


def _copy_out(image: Image.Image) -> Pixels:
    """Return the pixels of an RGB picture."""
    pixels = SCRATCH.take("pixels", image.height * image.width * 3).reshape(image.height, image.width, 3)
    for top in range(0, image.height, _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, image.height)
        strip = image.crop((0, top, image.width, bottom))
        pixels[top:bottom] = np.frombuffer(strip.tobytes(), np.uint8).reshape(bottom - top, image.width, 3)
    return pixels
