"""Compressed bytes -> upright RGB pixels.

The result is a Pillow image and not an array: Pillow's own resize then works on it as it is, which
keeps the resized pixels bit-equal to the reference pipeline's and saves two copies.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from vlmpack.errors import SampleError
from vlmpack.images import jpeg, png
from vlmpack.images.formats import open_lazily
from vlmpack.images.header import MAX_PIXELS, ImageHeader, explain, no_file, read_header
from vlmpack.images.orientation import turn_upright

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.images.source import ImageSource

_WHITE: Final = (255, 255, 255)


def decode(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the picture, or the first frame of an animation, in mode RGB and upright.

    Pixels that the file lacks are never invented: a truncated body is an error. Safe to call from
    many threads, except with one and the same Pillow image, which is loaded in place.

    Args:
        source: Compressed bytes, a file, or a Pillow image.
        max_pixels: Largest height x width that is decoded.

    Raises:
        SampleError: As `read_header`; image_truncated if the body ends early; image_unreadable if it
            cannot be decoded or has another size than its header promised.
    """
    data = read_bytes(source)
    return load_picture(data, read_header(data, max_pixels=max_pixels))


def read_bytes(source: ImageSource) -> bytes | Image.Image:
    """Return the bytes of what is on disk, anything else as it is.

    Args:
        source: Compressed bytes, a file, spooled bytes, or a Pillow image.

    Raises:
        SampleError: image_unreadable if the file cannot be read.
    """
    if not hasattr(source, "read_bytes"):
        return source  # also what is no image at all: whoever parses it says what it should be
    try:
        return source.read_bytes()
    except OSError as error:
        if isinstance(source, Path):
            raise SampleError("image_unreadable", no_file(source, error)) from error
        raise SampleError("image_unreadable", f"the image cannot be read from the spool: {error}") from error


def load_picture(source: bytes | Image.Image, header: ImageHeader, *, fraction: int = 1) -> Image.Image:
    """Return the picture by Pillow, in mode RGB and upright.

    Args:
        source: Compressed bytes, or a Pillow image.
        header: What `read_header` says of them.
        fraction: 2, 4 or 8 to decode a JPEG file at this fraction of its size, rounded up.

    Raises:
        SampleError: image_truncated or image_unreadable, as `decode`.
    """
    image = _upright_rgb(source, header, fraction)
    promised = (-(-header.height // fraction), -(-header.width // fraction))
    check_size("the header promises", promised, (image.height, image.width))
    return image


def _upright_rgb(source: bytes | Image.Image, header: ImageHeader, fraction: int) -> Image.Image:
    try:
        image = _open(source, header) if isinstance(source, bytes) else source
        if fraction > 1:
            image.draft(None, (image.width // fraction, image.height // fraction))
        image.load()
        if not isinstance(image, TiffImageFile):  # which Pillow has turned upright by now
            image = turn_upright(image, header.orientation)
        return to_rgb(image)
    except Exception as error:
        # Pillow's decoders raise a dozen kinds of exception on damaged files, none documented.
        raise explain(error, len(source) if isinstance(source, bytes) else None) from error


def _open(data: bytes, header: ImageHeader) -> Image.Image:
    if header.format in {"JPEG", "MPO"}:
        data = jpeg.strip_metadata(data)
    elif header.format == "PNG":
        data = png.strip_metadata(data)
    return open_lazily(io.BytesIO(data))


def check_size(who: str, promised: tuple[int, int], found: tuple[int, int]) -> None:
    """Refuse a picture of another size than was planned with: its tiles would not fit their tokens.

    Args:
        who: Who promised the size, such as "the header promises".
        promised: Height and width.
        found: Height and width.

    Raises:
        SampleError: image_unreadable if the two differ.
    """
    if tuple(promised) != found:
        raise SampleError(
            "image_unreadable",
            f"{who} {promised[0]} x {promised[1]} pixels (height x width), but the decoded image has "
            f"{found[0]} x {found[1]}: the file is damaged, or was changed after it was planned. "
            "Restore it, or plan again.",
            promised_height=promised[0],
            promised_width=promised[1],
            height=found[0],
            width=found[1],
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture in mode RGB, itself if it already is.

    * Transparency, in whatever form, is laid over white: hidden pixels are mostly black, and black
      text on a transparent page would vanish.
    * Integers of 16 bits lose their low byte, which is what 8-bit viewers show.
    * Mode "I" (32 bits) holds 16-bit data as a rule: with every value below 256 it is taken as it
      is, else as 16 bits, clipped to 65,535, low byte dropped.
    * Mode "F" with no value above 1 is scaled by 255; both ways it is then clipped to 0..255 and
      rounded. What is not finite becomes 0.
    * Everything else (1, L, P, CMYK, YCbCr, HSV, LAB) goes by Pillow's conversion.

    Args:
        image: A picture in any mode.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return Image.fromarray(_to_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    # "La" has no direct way to RGBA.
    seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    page = Image.new("RGB", seen.size, _WHITE)
    page.paste(seen, mask=seen.getchannel("A"))
    return page


def _to_eight_bits(values: npt.NDArray[np.generic], mode: str) -> npt.NDArray[np.uint8]:
    """Return uint8 [H, W] for int32, uint16 or float32 [H, W]."""
    if mode == "F":
        finite = np.where(np.isfinite(values), values, 0).astype(np.float32)
        scale = 255.0 if finite.max(initial=0.0) <= 1.0 else 1.0
        levels: npt.NDArray[np.float32] = np.rint(np.clip(finite * scale, 0.0, 255.0))
        return levels.astype(np.uint8)
    whole = np.clip(values.astype(np.int32), 0, 0xFFFF)
    narrow = mode == "I" and whole.max(initial=0) < 256
    return np.right_shift(whole, 0 if narrow else 8).astype(np.uint8)
