"""Files built for the tests: real ones by Pillow, odd and broken ones byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(height=20, width=30, mode="RGB", seed=0):
    """Smooth colours with a bright corner, so that every orientation looks different."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * y / height, 255 * x / width, 255 * (x + y) / (height + width)], -1)
    pixels += rng.integers(0, 12, pixels.shape)
    pixels[: height // 3, : width // 4] = 250
    rgb = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    if mode in {"LA", "RGBA"}:
        rgb.putalpha(Image.fromarray(np.asarray(rgb.convert("L"))))
    return rgb.convert(mode)


def encode(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def exif(orientation, order="<"):
    """An EXIF block with a maker and an orientation, written by hand."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    maker, entries = b"maker of cameras\0", 2
    data_at = 8 + 2 + 12 * entries + 4
    return (
        head
        + struct.pack(order + "LH", 8, entries)
        + struct.pack(order + "HHLL", 0x010F, 2, len(maker), data_at)
        + struct.pack(order + "HHLHH", 0x0112, 3, 1, orientation, 0)
        + struct.pack(order + "L", 0)
        + maker
    )


def xmp(orientation):
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description '
        b'tiff:Orientation="%d"/></x:xmpmeta>' % orientation
    )


def decoded_size(data):
    """(height, width) of the picture that `datasets` would hand out."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        turned = ImageOps.exif_transpose(image)
        return turned.height, turned.width


def chunk(name, payload):
    return struct.pack(">L", len(payload)) + name + payload + struct.pack(">L", zlib.crc32(name + payload))


def png_header(height, width, bits=8, colour=2):
    return chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, bits, colour, 0, 0, 0))


def png(height=20, width=30, before=(), after=()):
    """A gray PNG with chunks of our own before and after its pixels."""
    rows = b"".join(b"\0" + bytes(range(width)) for _ in range(height))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    parts = [*before, pixels, *after, chunk(b"IEND", b"")]
    return PNG_SIGNATURE + png_header(height, width, colour=0) + b"".join(parts)


def segment(marker, payload):
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def insert_after_soi(jpeg, *segments):
    """A JPEG with more segments before its own."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def jpeg_header(height, width, layers=3, bits=8):
    """A JPEG up to its first scan, of which two bytes are there."""
    components = b"".join(bytes([i + 1, 0x11, 0]) for i in range(layers))
    frame = struct.pack(">BHHB", bits, height, width, layers) + components
    scan = bytes([layers]) + b"".join(bytes([i + 1, 0]) for i in range(layers)) + b"\0\x3f\0"
    return b"\xff\xd8" + segment(0xC0, frame) + segment(0xDA, scan) + b"\0\0"


def webp_header(height, width, flags=0):
    payload = bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<L", len(payload)) + payload
    return b"RIFF" + struct.pack("<L", len(body)) + body
