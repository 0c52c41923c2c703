from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.unit.images.pictures import (
    PNG_SIGNATURE,
    chunk,
    encode,
    exif,
    insert_after_soi,
    picture,
    png_header,
    segment,
)
from tests.unit.images.without import INSTALLED, hide
from vlmpack.errors import SampleError
from vlmpack.images import decode, pixels
from vlmpack.images.pixels import read_picture
from vlmpack.images.png import plain_pixels

WAYS = [(), *((name,) for name in INSTALLED), *([tuple(INSTALLED)] if len(INSTALLED) > 1 else [])]


@pytest.fixture(params=WAYS, ids=lambda hidden: "without " + " and ".join(hidden) if hidden else "all")
def way(request, monkeypatch):
    """With every extra that is installed, and without each of them."""
    hide(monkeypatch, *request.param)


@pytest.fixture
def by_pillow(monkeypatch):
    """How many pictures Pillow had to decode."""
    asked = []
    real = pixels.load_picture
    monkeypatch.setattr(
        pixels, "load_picture", lambda *args, **options: asked.append(args) or real(*args, **options)
    )
    return asked


def check_equal_to_decode(source):
    found = read_picture(source)
    expected = np.asarray(decode(source))
    assert (found.height, found.width) == expected.shape[:2]
    assert found.fraction == 1
    assert found.pixels.flags.c_contiguous
    np.testing.assert_array_equal(found.pixels, expected)


def png_of(rows, colour=2, *, chunks=(), stream=None, interlaced=0, tail=()):
    """A PNG of bytes [H, W x D], unfiltered, with chunks of our own."""
    height, num_bytes = rows.shape
    width = num_bytes // {2: 3, 6: 4}[colour]
    header = struct.pack(">LLBBBBB", width, height, 8, colour, 0, 0, interlaced)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
    packed = chunk(b"IDAT", zlib.compress(lines) if stream is None else stream)
    return PNG_SIGNATURE + chunk(b"IHDR", header) + b"".join([*chunks, packed, *tail, chunk(b"IEND", b"")])


ROWS = np.random.default_rng(0).integers(0, 256, (6, 24), dtype=np.uint8)


@pytest.mark.usefixtures("way")
class TestEqualToDecode:
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    @pytest.mark.parametrize("subsampling", [0, 1, 2])
    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("size", [(1, 1), (17, 31), (64, 48)])
    def test_jpeg(self, mode, subsampling, progressive, size):
        options = {"subsampling": subsampling, "progressive": progressive, "quality": 85}
        check_equal_to_decode(encode(picture(*size, mode), "JPEG", **options))

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
    @pytest.mark.parametrize("size", [(1, 1), (17, 31)])
    def test_png(self, mode, size):
        check_equal_to_decode(encode(picture(*size, mode), "PNG"))

    @pytest.mark.parametrize("file_format", ["WEBP", "GIF", "BMP", "TIFF", "JPEG2000"])
    def test_other_formats(self, file_format):
        check_equal_to_decode(encode(picture(), file_format))

    def test_cmyk(self):
        check_equal_to_decode(encode(picture(mode="CMYK"), "JPEG"))

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
    def test_rotated_files(self, orientation, file_format):
        tags = Image.Exif()
        tags[0x0112] = orientation
        check_equal_to_decode(encode(picture(20, 50), file_format, exif=tags))

    def test_paths_and_opened_pictures(self, tmp_path):
        path = tmp_path / "picture.jpeg"
        path.write_bytes(encode(picture(), "JPEG"))
        check_equal_to_decode(path)
        check_equal_to_decode(picture(200, 70))
        check_equal_to_decode(picture(mode="RGBA"))

    def test_more_rows_than_are_fetched_at_a_time(self):
        check_equal_to_decode(encode(picture(3 * pixels._STRIP_ROWS + 5, 40), "WEBP"))


@pytest.mark.usefixtures("way")
class TestRefusals:
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
    def test_cut_off_files(self, file_format, share):
        data = encode(picture(90, 60, seed=1), file_format)
        data = data[: int(len(data) * share)]
        with pytest.raises(SampleError) as expected:
            decode(data)
        with pytest.raises(SampleError) as caught:
            read_picture(data)
        assert caught.value.reason == expected.value.reason == "image_truncated"
        assert caught.value.message == expected.value.message

    def test_too_many_pixels(self):
        with pytest.raises(SampleError) as caught:
            read_picture(encode(picture(90, 60), "JPEG"), max_pixels=5399)
        assert caught.value.reason == "image_too_large"

    def test_no_file(self, tmp_path):
        with pytest.raises(SampleError) as caught:
            read_picture(tmp_path / "nothing.png")
        assert caught.value.reason == "image_unreadable"


class TestWhoDecodes:
    def test_fast_decoders_take_what_is_plain(self, by_pillow):
        if "simplejpeg" in INSTALLED:
            read_picture(encode(picture(), "JPEG"))
        if "deflate" in INSTALLED:
            read_picture(encode(picture(), "PNG"))
            read_picture(encode(picture(mode="RGBA"), "PNG"))
        assert not by_pillow

    @pytest.mark.parametrize(
        "data",
        [
            encode(picture(mode="CMYK"), "JPEG"),
            encode(picture(mode="P"), "PNG"),
            encode(picture(mode="I;16"), "PNG"),
            encode(picture(), "PNG", transparency=(250, 250, 250)),
            encode(picture(), "WEBP"),
        ],
        ids=["cmyk", "palette", "16 bits", "a transparent colour", "webp"],
    )
    def test_pillow_takes_what_is_not(self, data, by_pillow):
        check_equal_to_decode(data)
        assert len(by_pillow) == 1

    def test_without_extras_pillow_takes_all(self, monkeypatch, by_pillow):
        hide(monkeypatch, "simplejpeg", "deflate")
        read_picture(encode(picture(), "JPEG"))
        read_picture(encode(picture(), "PNG"))
        assert len(by_pillow) == 2

    def test_without_kernels_pillow_takes_png(self, monkeypatch, by_pillow):
        hide(monkeypatch, "numba")
        check_equal_to_decode(encode(picture(), "PNG"))
        assert len(by_pillow) == 1

    def test_a_jpeg_that_libjpeg_warns_about_goes_to_pillow(self, by_pillow):
        data = encode(picture(64, 64), "JPEG", quality=95)
        damaged = data[:-40] + b"\xff\xd9"  # the last blocks are missing, the end is not
        check_equal_to_decode(damaged)
        assert len(by_pillow) == 1

    def test_metadata_do_not_matter(self, by_pillow):
        data = insert_after_soi(encode(picture(), "JPEG"), segment(0xE1, b"Exif\0\0" + exif(6)))
        check_equal_to_decode(data)
        assert len(by_pillow) == ("simplejpeg" not in INSTALLED)


class TestDoubtfulPng:
    """What the fast decoder must leave to Pillow, whose word is final."""

    def test_a_plain_file_is_plain(self):
        plain = plain_pixels(png_of(ROWS))
        assert plain is not None
        assert plain.depth == 3
        assert plain.window == 1 << 15
        assert zlib.decompress(plain.data)[1:25] == ROWS[0].tobytes()

    def test_data_in_several_chunks_are_joined(self):
        stream = zlib.compress(b"".join(b"\0" + row.tobytes() for row in ROWS))
        parts = [chunk(b"IDAT", stream[:10]), chunk(b"tEXt", b"a\0b")]
        data = png_of(ROWS, stream=stream[10:], chunks=parts[:1])
        plain = plain_pixels(data)
        assert plain is not None
        assert plain.data == stream
        check_equal_to_decode(data)
        assert plain_pixels(png_of(ROWS, stream=stream[10:], chunks=parts)) is None, "not in a row"

    @pytest.mark.parametrize(
        "data",
        [
            png_of(ROWS, interlaced=1),
            png_of(ROWS, chunks=[chunk(b"tRNS", b"\0\1\0\2\0\3")]),
            png_of(ROWS, chunks=[chunk(b"PLTE", b"abc")]),
            png_of(ROWS, chunks=[chunk(b"QUIT", b"")]),
            png_of(ROWS, tail=[chunk(b"IHDR", b"")]),
            png_of(ROWS)[:-12],
            PNG_SIGNATURE + png_header(6, 8) + chunk(b"IEND", b""),
            encode(picture(mode="L"), "PNG"),
            encode(picture(mode="I;16"), "PNG"),
        ],
        ids=[
            "interlaced", "transparent colour", "palette", "unknown and critical", "second header",
            "no end", "no data", "gray", "16 bits",
        ],
    )  # fmt: skip
    def test_what_is_not_plain(self, data):
        assert plain_pixels(data) is None

    @pytest.mark.parametrize(
        "stream",
        [
            zlib.compress(b"".join(b"\0" + row.tobytes() for row in ROWS))[:-4] + bytes(4),
            zlib.compress(b"".join(b"\7" + row.tobytes() for row in ROWS)),
            zlib.compress(b"".join(b"\0" + row.tobytes() for row in ROWS) + b"more"),
            zlib.compress(b"\0" * 20),
            b"\x78",
            b"",
        ],
        ids=["checksum", "unknown filter", "too long", "too short", "one byte", "nothing"],
    )
    def test_a_stream_in_doubt_ends_as_pillow_says(self, stream, by_pillow):
        data = png_of(ROWS, stream=stream)
        try:
            expected = np.asarray(decode(data))
        except SampleError as error:
            with pytest.raises(SampleError) as caught:
                read_picture(data)
            assert caught.value.reason == error.reason  # noqa: PT017 - compares two refusals
        else:
            np.testing.assert_array_equal(read_picture(data).pixels, expected)
        assert len(by_pillow) == 1

    def test_a_window_smaller_than_the_picture_is_left_to_pillow(self, by_pillow):
        rows = np.random.default_rng(1).integers(0, 256, (40, 60), dtype=np.uint8)
        lines = b"".join(b"\0" + row.tobytes() for row in rows)
        packer = zlib.compressobj(wbits=9)
        data = png_of(rows, stream=packer.compress(lines) + packer.flush())
        assert plain_pixels(data).window in {256, 512}
        check_equal_to_decode(data)
        assert len(by_pillow) == 1


@pytest.mark.usefixtures("way")
class TestFractions:
    @pytest.mark.parametrize(
        ("at_least", "fraction"),
        [((80, 90), 1), ((40, 45), 2), ((40, 46), 1), ((20, 22), 4), ((10, 11), 8), ((1, 1), 8)],
    )
    def test_the_smallest_that_suffices(self, at_least, fraction):
        found = read_picture(encode(picture(80, 91), "JPEG"), at_least=at_least)
        assert (found.height, found.width, found.fraction) == (80, 91, fraction)
        assert found.pixels.shape == (-(-80 // fraction), -(-91 // fraction), 3)

    def test_it_shows_the_same_picture(self):
        image = Image.fromarray(
            np.kron(np.arange(0, 256, 32, dtype=np.uint8).reshape(2, 4), np.ones((32, 32), np.uint8))
        )
        data = encode(image.convert("RGB"), "JPEG", quality=100)
        small = read_picture(data, at_least=(8, 16)).pixels
        assert small.shape == (8, 16, 3)
        assert np.abs(small[::4, ::4, 0].astype(int) - np.arange(0, 256, 32).reshape(2, 4)).max() <= 2

    def test_sides_are_counted_upright(self):
        tags = Image.Exif()
        tags[0x0112] = 6
        found = read_picture(encode(picture(40, 90), "JPEG", exif=tags), at_least=(40, 20))
        assert (found.height, found.width, found.fraction) == (90, 40, 2)
        assert found.pixels.shape == (45, 20, 3)

    def test_other_formats_are_decoded_whole(self):
        assert read_picture(encode(picture(80, 80), "PNG"), at_least=(8, 8)).fraction == 1

    def test_who_decodes_does_not_matter(self, monkeypatch):
        data = encode(picture(123, 91), "JPEG", quality=85)
        found = read_picture(data, at_least=(30, 22)).pixels.copy()
        hide(monkeypatch, "simplejpeg")
        np.testing.assert_array_equal(found, read_picture(data, at_least=(30, 22)).pixels)

    def test_cut_off_files_are_refused(self):
        data = encode(picture(123, 91), "JPEG")
        with pytest.raises(SampleError) as caught:
            read_picture(data[: len(data) // 2], at_least=(10, 10))
        assert caught.value.reason == "image_truncated"

    def test_cmyk(self):
        found = read_picture(encode(picture(80, 90, "CMYK"), "JPEG"), at_least=(40, 45))
        assert found.pixels.shape == (40, 45, 3)


def test_the_pixels_lie_in_memory_that_is_used_again():
    first = read_picture(encode(picture(40, 60), "JPEG")).pixels
    place = first.__array_interface__["data"][0]
    assert read_picture(encode(picture(30, 60), "WEBP")).pixels.__array_interface__["data"][0] == place


def test_a_wrong_size_from_a_decoder_is_not_believed(monkeypatch, by_pillow):
    class Wrong:
        @staticmethod
        def decode_jpeg(data, colorspace, **options):
            return np.zeros((3, 3, 3), np.uint8)

    monkeypatch.setattr(pixels.accelerate, "module", lambda name: Wrong if name == "simplejpeg" else None)
    data = encode(picture(), "JPEG")
    np.testing.assert_array_equal(read_picture(data).pixels, np.asarray(Image.open(io.BytesIO(data))))
    assert len(by_pillow) == 1
