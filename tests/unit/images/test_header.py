from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from tests.unit.images.pictures import (
    PNG_SIGNATURE,
    chunk,
    decoded_size,
    encode,
    exif,
    insert_after_soi,
    jpeg_header,
    picture,
    png,
    png_header,
    segment,
    webp_header,
    xmp,
)
from vlmpack.errors import SampleError
from vlmpack.images import MAX_PIXELS, ImageHeader, read_header

ORIENTATIONS = range(1, 9)
JPEG = encode(picture(), "JPEG")


def refused(source, reason, **limits):
    with pytest.raises(SampleError) as caught:
        read_header(source, **limits)
    assert caught.value.reason == reason
    return caught.value


class TestFormatsAndModes:
    @pytest.mark.parametrize(
        ("file_format", "mode", "options"),
        [
            ("JPEG", "RGB", {}),
            ("JPEG", "L", {}),
            ("JPEG", "CMYK", {}),
            ("JPEG", "RGB", {"progressive": True}),
            ("JPEG", "RGB", {"subsampling": "4:4:4", "optimize": True}),
            ("PNG", "1", {}),
            ("PNG", "L", {}),
            ("PNG", "LA", {}),
            ("PNG", "P", {}),
            ("PNG", "P", {"bits": 4, "transparency": 0}),
            ("PNG", "RGB", {}),
            ("PNG", "RGB", {"transparency": (1, 2, 3)}),
            ("PNG", "RGBA", {}),
            ("PNG", "I;16", {}),
            ("WEBP", "RGB", {}),
            ("WEBP", "RGBA", {}),
            ("WEBP", "RGB", {"lossless": True}),
            ("WEBP", "RGBA", {"lossless": True}),
            ("GIF", "P", {}),
            ("GIF", "L", {}),
            ("BMP", "RGB", {}),
            ("BMP", "1", {}),
            ("TIFF", "RGB", {}),
            ("TIFF", "CMYK", {}),
            ("TIFF", "I;16", {}),
            ("TIFF", "F", {}),
            ("TIFF", "LA", {}),
            ("JPEG2000", "RGB", {}),
            ("PPM", "L", {}),
            ("ICO", "RGB", {}),
            ("TGA", "RGB", {}),
        ],
    )
    def test_header_says_what_pillow_says(self, file_format, mode, options):
        data = encode(picture(20, 30, mode), file_format, **options)
        found = read_header(data)
        with Image.open(io.BytesIO(data)) as opened:
            assert (found.mode, found.format) == (opened.mode, opened.format)
            size = (opened.height, opened.width)
        assert (found.height, found.width) == size
        # Icons are stored in squares of their own choice; everything else as it was drawn.
        assert size == (20, 30) or file_format == "ICO"
        assert found.orientation == 1

    @pytest.mark.parametrize(
        ("bits", "colour", "mode"), [(16, 2, "RGB"), (16, 4, "RGBA"), (16, 6, "RGBA"), (2, 3, "P")]
    )
    def test_depths_that_pillow_does_not_write_are_known(self, bits, colour, mode):
        data = (
            PNG_SIGNATURE + png_header(3, 5, bits, colour) + chunk(b"PLTE", bytes(12)) + chunk(b"IDAT", b"")
        )
        assert read_header(data) == ImageHeader(height=3, width=5, mode=mode, orientation=1, format="PNG")
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.mode == mode

    def test_several_pictures_in_a_jpeg_are_mpo(self):
        data = encode(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
        assert read_header(data).format == "MPO"
        assert (read_header(data).height, read_header(data).width) == (20, 30)

    def test_an_animation_has_the_size_of_its_first_frame(self):
        frames = [picture(20, 30, "P"), picture(20, 30, "P", seed=1)]
        for file_format in ("GIF", "PNG", "WEBP"):
            data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
            assert (read_header(data).height, read_header(data).width) == (20, 30)

    @pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 65_000)])
    def test_extreme_shapes(self, size):
        for file_format in ("JPEG", "PNG"):
            found = read_header(encode(Image.new("L", (size[1], size[0])), file_format))
            assert (found.height, found.width) == size


class TestOrientation:
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_size_is_that_of_the_upright_picture(self, file_format, orientation):
        tags = Image.Exif()
        tags[0x0112] = orientation
        data = encode(picture(20, 30), file_format, exif=tags)
        found = read_header(data)
        expected = (30, 20) if orientation >= 5 else (20, 30)
        assert (found.height, found.width) == expected == decoded_size(data)
        assert found.orientation == orientation

    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("prefix", [b"Exif\0\0", b"Exif\0\0Exif\0\0"])
    def test_both_byte_orders_and_a_doubled_prefix(self, order, prefix):
        data = insert_after_soi(JPEG, segment(0xE1, prefix + exif(6, order)))
        assert read_header(data).orientation == 6
        assert decoded_size(data) == (30, 20)

    @pytest.mark.parametrize("orientation", [0, 9, 300])
    def test_orientations_that_do_not_exist_mean_upright(self, orientation):
        data = insert_after_soi(JPEG, segment(0xE1, b"Exif\0\0" + exif(orientation)))
        assert read_header(data).orientation == 1
        assert decoded_size(data) == (20, 30)

    def test_xmp_speaks_where_exif_is_silent(self):
        packet = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(6))
        assert read_header(insert_after_soi(JPEG, packet)).orientation == 6
        both = insert_after_soi(JPEG, packet, segment(0xE1, b"Exif\0\0" + exif(3)))
        assert read_header(both).orientation == 3
        assert decoded_size(both) == (20, 30)

    def test_a_thumbnail_inside_exif_is_not_the_picture(self):
        thumbnail = encode(picture(7, 9), "JPEG")
        data = insert_after_soi(JPEG, segment(0xE1, b"Exif\0\0" + exif(8) + thumbnail))
        found = read_header(data)
        assert (found.height, found.width, found.orientation) == (30, 20, 8)

    @pytest.mark.parametrize("place", ["before", "after"])
    def test_png_keeps_it_before_or_after_the_pixels(self, place):
        data = png(**{place: [chunk(b"eXIf", exif(6))]})
        assert read_header(data).orientation == 6
        assert decoded_size(data) == (30, 20)

    @pytest.mark.parametrize("place", ["before", "after"])
    def test_png_keeps_it_in_a_text_as_imagemagick_does(self, place):
        block = b"Exif\0\0" + exif(6)
        lines = b"\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n"
        plain = chunk(b"tEXt", b"Raw profile type exif\0" + lines)
        packed = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(lines))
        for text in (plain, packed):
            data = png(**{place: [text]})
            assert read_header(data).orientation == 6
            assert decoded_size(data) == (30, 20)

    def test_png_keeps_it_in_xmp(self):
        plain = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6))
        packed = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0title\0" + zlib.compress(xmp(6)))
        for text in (plain, packed):
            data = png(before=[text])
            assert read_header(data).orientation == 6
            assert decoded_size(data) == (30, 20)

    def test_webp_keeps_it_in_exif_or_xmp(self):
        for options in ({"exif": b"Exif\0\0" + exif(6)}, {"xmp": xmp(6)}):
            data = encode(picture(20, 30), "WEBP", **options)
            assert read_header(data).orientation == 6
            assert decoded_size(data) == (30, 20)

    @pytest.mark.parametrize(
        "block",
        [
            b"",
            b"II*\0",
            b"II*\0\xff\xff\xff\xff",
            b"XX*\0" + bytes(20),
            exif(6)[:20],  # cut inside the first entry
            exif(6)[:10] + b"\0" * 12,
            b"II*\0" + struct.pack("<LHHHLL", 8, 1, 0x0112, 3, 0, 6),  # no value
            b"II*\0" + struct.pack("<LHHHLL", 8, 1, 0x0112, 2, 1, 6),  # a text
        ],
    )
    def test_broken_exif_means_upright_and_warns_nobody(self, block):
        for data in (
            insert_after_soi(JPEG, segment(0xE1, b"Exif\0\0" + block)),
            png(before=[chunk(b"eXIf", block)]),
        ):
            assert read_header(data).orientation == 1

    @pytest.mark.parametrize(
        "text",
        [
            chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 8\nzz"),
            chunk(b"zTXt", b"Raw profile type exif\0\0not deflated"),
            chunk(b"iTXt", b"XML:com.adobe.xmp\0"),
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0en"),
            chunk(b"tEXt", b"Raw profile type exif\0"),
        ],
    )
    def test_broken_texts_in_a_png_mean_upright(self, text):
        assert read_header(png(before=[text])).orientation == 1


class TestUnusualFiles:
    def test_fill_bytes_and_junk_between_jpeg_segments_are_left_to_pillow(self):
        for data in (JPEG[:2] + b"\xff\xff" + JPEG[2:], JPEG[:20] + b"\0\0" + JPEG[20:]):
            with Image.open(io.BytesIO(data)) as opened:
                assert opened.size == (30, 20)
            assert (read_header(data).height, read_header(data).width) == (20, 30)

    @pytest.mark.parametrize(("layers", "bits"), [(2, 8), (3, 12), (1, 16)])
    def test_jpegs_that_nobody_decodes_are_refused(self, layers, bits):
        error = refused(jpeg_header(5, 5, layers, bits), "image_unreadable")
        assert f"{layers} layers of {bits} bits" in error.message

    def test_a_wrong_checksum_in_the_png_header_is_refused(self):
        data = bytearray(png())
        data[19] ^= 1  # the width
        assert "checksum" in refused(bytes(data), "image_unreadable").message

    @pytest.mark.parametrize(("bits", "colour"), [(3, 2), (8, 5), (16, 3)])
    def test_pngs_of_no_legal_kind_are_refused(self, bits, colour):
        data = PNG_SIGNATURE + png_header(3, 5, bits, colour) + chunk(b"IDAT", b"")
        assert f"colour type {colour} with {bits} bits" in refused(data, "image_unreadable").message

    def test_a_chunk_without_a_name_is_refused(self):
        assert "no name" in refused(png(before=[chunk(b"\0\1\2\3", b"")]), "image_unreadable").message

    @pytest.mark.parametrize("size", [(0, 5), (5, 0)])
    def test_pictures_without_pixels_are_refused(self, size):
        assert refused(jpeg_header(*size), "image_unreadable").numbers == {
            "height": size[0],
            "width": size[1],
        }
        refused(PNG_SIGNATURE + png_header(*size) + chunk(b"IDAT", b""), "image_unreadable")


class TestLimits:
    def test_no_bytes(self):
        refused(b"", "image_empty")

    @pytest.mark.parametrize(
        "data", [b"\0", b"no image at all", bytes(5000), b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0"]
    )
    def test_what_is_no_image(self, data):
        error = refused(data, "image_unreadable")
        assert f"{len(data):,} bytes" in error.message
        assert error.numbers["num_bytes"] == len(data)

    @pytest.mark.parametrize(
        "data",
        [
            jpeg_header(30_000, 30_000),
            PNG_SIGNATURE + png_header(30_000, 30_000) + chunk(b"IDAT", b""),
            PNG_SIGNATURE + png_header(0xFFFFFFFF, 0xFFFFFFFF) + chunk(b"IDAT", b""),
            webp_header(16_383, 16_383),
            b"BM"
            + struct.pack("<LHHLLllHHLLllLL", 54, 0, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
            b"GIF89a"
            + struct.pack("<HHBBB", 30_000, 30_000, 0, 0, 0)
            + b",\0\0\0\0"
            + struct.pack("<HHBB", 9, 9, 0, 8),
        ],
        ids=["jpeg", "png", "png at the limit", "webp", "bmp", "gif"],
    )
    def test_bombs_are_refused_from_the_header_alone(self, data):
        # Warnings are errors in these tests: Pillow's own would fail this one.
        error = refused(data, "image_too_large")
        assert error.numbers["height"] >= 16_383
        assert error.numbers["max_pixels"] == MAX_PIXELS
        assert f"{MAX_PIXELS:,}" in error.message

    def test_the_limit_is_the_last_size_that_passes(self):
        for data in (JPEG, encode(picture(), "BMP")):
            assert read_header(data, max_pixels=600).height == 20
            refused(data, "image_too_large", max_pixels=599)

    def test_the_limit_is_the_one_at_which_pillow_refuses(self):
        # As shipped: a quarter of a GiB of pixels of three bytes.
        assert MAX_PIXELS == 2 * (1024 * 1024 * 1024 // 4 // 3)
        assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS

    def test_a_picture_between_pillows_warning_and_its_limit_passes_in_silence(self):
        data = PNG_SIGNATURE + png_header(10_000, 10_000) + chunk(b"IDAT", b"")
        assert read_header(data).height == 10_000
        with pytest.warns(Image.DecompressionBombWarning), Image.open(io.BytesIO(data)):
            pass

    def test_pillows_own_limit_is_neither_needed_nor_changed(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        for file_format in ("JPEG", "PNG", "GIF", "BMP"):
            assert read_header(encode(picture(20, 30), file_format)).height == 20
        assert Image.MAX_IMAGE_PIXELS == 100


class TestSources:
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
    def test_a_file_is_read_as_its_bytes_are(self, tmp_path, file_format):
        tags = Image.Exif()
        tags[0x0112] = 6
        data = encode(picture(200, 300), file_format, exif=tags)
        path = tmp_path / "no_suffix"
        path.write_bytes(data)
        assert read_header(path) == read_header(data)
        if file_format == "TIFF":
            return  # Pillow writes its header first: what is left of it is a header still.
        path.write_bytes(data[: len(data) // 50])
        with pytest.raises(SampleError) as of_file:
            read_header(path)
        with pytest.raises(SampleError) as of_bytes:
            read_header(data[: len(data) // 50])
        assert of_file.value.reason == of_bytes.value.reason

    def test_a_missing_file_is_named(self, tmp_path):
        path = tmp_path / "not there.jpg"
        assert str(path) in refused(path, "image_unreadable").message
        assert str(tmp_path) in refused(tmp_path, "image_unreadable").message

    def test_an_empty_file(self, tmp_path):
        path = tmp_path / "empty.png"
        path.touch()
        refused(path, "image_empty")

    @pytest.mark.parametrize("source", [None, 3, "picture.png", {"bytes": b""}])
    def test_other_types_are_named(self, source):
        assert type(source).__name__ in refused(source, "image_unreadable").message

    def test_a_picture_in_memory_knows_its_size(self):
        found = read_header(picture(20, 30, "LA"))
        assert found == ImageHeader(height=20, width=30, mode="LA", orientation=1, format="memory")
        refused(picture(20, 30), "image_too_large", max_pixels=599)

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_an_opened_file_is_turned_and_not_loaded(self, file_format, monkeypatch):
        tags = Image.Exif()
        tags[0x0112] = 6
        data = encode(picture(20, 30), file_format, exif=tags)
        with Image.open(io.BytesIO(data)) as opened:
            monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
            monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", lambda self: pytest.fail("decoded"))
            found = read_header(opened)
            assert read_header(data) == found
        assert (found.height, found.width, found.orientation, found.format) == (30, 20, 6, file_format)

    def test_what_datasets_hands_out_is_upright_already(self):
        from datasets import Image as ImageFeature

        tags = Image.Exif()
        tags[0x0112] = 6
        for file_format in ("JPEG", "PNG", "WEBP", "TIFF"):
            data = encode(picture(20, 30), file_format, exif=tags)
            handed_out = ImageFeature().decode_example({"bytes": data, "path": None})
            found = read_header(handed_out)
            assert (found.height, found.width, found.orientation) == (30, 20, 1)
            assert np.asarray(handed_out).shape[:2] == (30, 20)
