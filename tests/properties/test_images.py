"""Headers against Pillow on random files, and damaged files against the one error they may raise."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.unit.images.pictures import chunk, encode, exif, insert_after_soi, picture, png, segment, xmp
from vlmpack.errors import SampleError
from vlmpack.geometry import Tiling
from vlmpack.images import decode, read_header, tile_image

MODES = {
    "JPEG": ["RGB", "L", "CMYK"],
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "WEBP": ["RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"],
    "GIF": ["L", "P"],
    "BMP": ["1", "L", "P", "RGB"],
    "JPEG2000": ["L", "RGB", "RGBA"],
    "PPM": ["L", "RGB"],
}
OPTIONS = {
    "JPEG": st.fixed_dictionaries({
        "progressive": st.booleans(),
        "quality": st.integers(1, 95),
        "comment": st.binary(max_size=40),
    }),
    "PNG": st.fixed_dictionaries({"compress_level": st.integers(0, 9)}),
    "WEBP": st.fixed_dictionaries({"lossless": st.booleans(), "method": st.just(0)}),
    "TIFF": st.fixed_dictionaries({"compression": st.sampled_from([None, "tiff_lzw", "tiff_adobe_deflate"])}),
}
ROTATABLE = {"JPEG", "PNG", "WEBP", "TIFF"}


@st.composite
def files(draw):
    """A random picture in a random format."""
    file_format = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[file_format]))
    image = picture(draw(st.integers(1, 70)), draw(st.integers(1, 70)), mode, seed=draw(st.integers(0, 9)))
    options = draw(OPTIONS.get(file_format, st.just({})))
    legal = (1, 8) if file_format == "TIFF" else (0, 9)  # libtiff writes no others
    orientation = draw(st.none() | st.integers(*legal))
    if orientation is not None and file_format in ROTATABLE:
        tags = Image.Exif()
        tags[0x0112] = orientation
        if draw(st.booleans()):
            tags[0x010F] = "a maker whose name does not fit into an entry"
        options = options | {"exif": tags}
    return encode(image, file_format, **options)


def opened(data):
    """The picture as Pillow stores it, and as `datasets` hands it out."""
    with Image.open(io.BytesIO(data)) as image:
        stored = (image.mode, image.format)
        image.load()
        return stored, ImageOps.exif_transpose(image)


@given(files())
def test_header_is_what_pillow_decodes(data):
    found = read_header(data)
    stored, upright = opened(data)
    assert (found.mode, found.format) == stored
    assert (found.width, found.height) == upright.size == decode(data).size


@given(files())
def test_opaque_colours_are_what_pillow_decodes(data):
    image = decode(data)
    _, upright = opened(data)
    assert image.mode == "RGB"
    if upright.mode in {"RGB", "L", "1", "P", "CMYK"} and not upright.has_transparency_data:
        np.testing.assert_array_equal(image, upright.convert("RGB"))


@given(files(), st.booleans(), st.integers(1, 4))
def test_tiles_are_as_many_as_the_header_alone_promised(data, enlarge, num_sides):
    header = read_header(data)
    tiling = Tiling(tile_size=16, max_side=16 * num_sides, resize_to_max_side=enlarge, patch_size=8)
    geometry = tiling.image(header.height, header.width)
    tiles = tile_image(data, geometry, tile_size=16, expected_size=(header.height, header.width))
    assert tiles.shape == (geometry.num_tiles, 3, 16, 16)
    # Put together again, the tiles are the picture.
    parts = tiles[geometry.has_global_tile :].reshape(geometry.grid.rows, geometry.grid.columns, 3, 16, 16)
    whole = parts.permute(0, 3, 1, 4, 2).reshape(geometry.height, geometry.width, 3)
    expected = decode(data).resize((geometry.width, geometry.height), Image.Resampling.BICUBIC)
    assert torch.equal(whole, torch.from_numpy(np.array(expected)))


METADATA = [chunk(b"eXIf", exif(6)), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(3))]
JPEG = encode(picture(), "JPEG")
VICTIMS = {
    "jpeg": insert_after_soi(JPEG, segment(0xE1, b"Exif\0\0" + exif(6))),
    "progressive": encode(picture(mode="L"), "JPEG", progressive=True),
    "mpo": encode(picture(), "MPO", save_all=True, append_images=[picture(seed=1)]),
    "png": png(before=METADATA),
    "palette": encode(picture(mode="P"), "PNG", transparency=3),
    "webp": encode(picture(), "WEBP", exif=b"Exif\0\0" + exif(6)),
    "lossless webp": encode(picture(mode="RGBA"), "WEBP", lossless=True),
    "gif": encode(picture(mode="P"), "GIF"),
    "bmp": encode(picture(), "BMP"),
    "tiff": encode(picture(), "TIFF"),
    "jpeg2000": encode(picture(), "JPEG2000"),
    "ppm": encode(picture(), "PPM"),
    "ico": encode(picture(), "ICO"),
}


@st.composite
def damaged_files(draw):
    """A real file with bytes changed, mostly in its header, and perhaps cut, doubled or moved."""
    data = bytearray(VICTIMS[draw(st.sampled_from(sorted(VICTIMS)))])
    reach = draw(st.sampled_from([40, 200, len(data)]))
    changes = st.tuples(st.integers(0, min(reach, len(data)) - 1), st.integers(0, 255))
    for position, value in draw(st.lists(changes, max_size=8)):
        data[position] = value
    cut = draw(st.none() | st.integers(0, len(data)))
    if cut is not None:
        data = data[:cut] if draw(st.booleans()) else data[:cut] + data[cut // 2 :]
    return bytes(data)


def check_that_only_sample_errors_come_out(data):
    try:
        header = read_header(data, max_pixels=1_000_000)
    except SampleError as error:
        with pytest.raises(SampleError) as caught:
            decode(data, max_pixels=1_000_000)
        assert caught.value.reason == error.reason  # noqa: PT017 - compares two refusals
        return
    try:
        image = decode(data, max_pixels=1_000_000)
    except SampleError as error:
        assert error.reason in {"image_truncated", "image_unreadable"}  # noqa: PT017 - both are right
        return
    assert image.size == (header.width, header.height)


@given(damaged_files())
def test_damaged_files_raise_nothing_but_sample_errors(data):
    check_that_only_sample_errors_come_out(data)


SIGNATURES = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"II*\0", b"BM"]


@given(st.sampled_from(SIGNATURES), st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_sample_errors(signature, body):
    check_that_only_sample_errors_come_out(signature + body)
