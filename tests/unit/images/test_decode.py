from __future__ import annotations

import io
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from tests.unit.images.pictures import (
    PNG_SIGNATURE,
    chunk,
    encode,
    exif,
    insert_after_soi,
    jpeg_header,
    picture,
    png,
    png_header,
    segment,
)
from vlmpack.errors import SampleError
from vlmpack.images import decode, read_header, to_rgb


def pixels(*values, mode):
    """One row of pixels."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def outcome(read, data):
    """What `read` returns, or the reason for which it refuses."""
    try:
        return read(data)
    except SampleError as error:
        return error.reason


def rgb_row(image):
    found = to_rgb(image)
    assert found.mode == "RGB"
    return [tuple(int(level) for level in pixel) for pixel in np.asarray(found)[0]]


def gray(*levels):
    return [(level, level, level) for level in levels]


class TestToRgb:
    def test_rgb_is_handed_back_untouched(self):
        image = picture()
        assert to_rgb(image) is image

    def test_gray_and_black_and_white(self):
        assert rgb_row(pixels(0, 77, 255, mode="L")) == gray(0, 77, 255)
        assert rgb_row(pixels(0, 255, mode="1")) == gray(0, 255)

    def test_transparent_gray_is_laid_over_white(self):
        # 100 x 128/255 + 255 x 127/255 = 50.2 + 127 = 177.2
        assert rgb_row(pixels((100, 255), (100, 0), (100, 128), mode="LA")) == gray(100, 255, 177)

    def test_transparent_colours_are_laid_over_white(self):
        found = rgb_row(pixels((10, 20, 30, 255), (10, 20, 30, 0), (10, 20, 30, 51), mode="RGBA"))
        # At 51/255 = 0.2: 0.2 x 10 + 0.8 x 255 = 206; + 2 = 208; + 4 = 210
        assert found == [(10, 20, 30), (255, 255, 255), (206, 208, 210)]

    def test_premultiplied_alpha_is_undone_first(self):
        # (51, 51, 51) at alpha 51 stands for white: 51 / 0.2 = 255
        assert rgb_row(pixels((51, 51, 51, 51), (9, 9, 9, 255), mode="RGBa")) == gray(255, 9)
        premultiplied = pixels((100, 255), (7, 0), mode="LA").convert("La")
        assert rgb_row(premultiplied) == gray(100, 255)

    def palette(self, transparency=None):
        image = Image.new("P", (3, 1))
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        image.putdata([0, 1, 2])
        if transparency is not None:
            image.info["transparency"] = transparency
        return image

    def test_palette(self):
        assert rgb_row(self.palette()) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]

    def test_palette_with_one_transparent_colour(self):
        assert rgb_row(self.palette(transparency=1)) == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]

    def test_palette_with_an_alpha_for_each_colour(self):
        # Pillow would warn about a direct conversion, and warnings are errors here.
        found = rgb_row(self.palette(transparency=bytes([255, 0, 51])))
        assert found == [(255, 0, 0), (255, 255, 255), (204, 204, 255)]

    def test_palette_with_alpha_in_the_pixels(self):
        image = Image.merge("PA", (self.palette().convert("L"), pixels(255, 0, 51, mode="L")))
        image.putpalette([200, 200, 200] * 256)
        # 0.2 x 200 + 0.8 x 255 = 244
        assert rgb_row(image) == gray(200, 255, 244)

    def test_one_colour_of_an_rgb_picture_can_be_transparent(self):
        image = pixels((1, 2, 3), (4, 5, 6), mode="RGB")
        image.info["transparency"] = (1, 2, 3)
        assert rgb_row(image) == [(255, 255, 255), (4, 5, 6)]
        level = pixels(7, 8, mode="L")
        level.info["transparency"] = 7
        assert rgb_row(level) == gray(255, 8)

    def test_cmyk(self):
        inks = [(0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0), (255, 0, 0, 0)]
        assert rgb_row(pixels(*inks, mode="CMYK")) == [(255, 0, 0), (0, 0, 0), (255, 255, 255), (0, 255, 255)]

    def test_ycbcr_and_hsv(self):
        assert rgb_row(pixels((90, 128, 128), mode="YCbCr")) == gray(90)
        assert rgb_row(pixels((0, 255, 255), mode="HSV")) == [(255, 0, 0)]

    @pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
    def test_sixteen_bits_lose_their_low_byte(self, mode):
        order = ">" if mode.endswith("B") else "<"
        values = np.array([[0, 0x00FF, 0x1234, 0xFFFF]], order + "u2")
        assert rgb_row(Image.frombytes(mode, (4, 1), values.tobytes())) == gray(0, 0, 0x12, 255)

    def test_integers_below_256_are_taken_as_they_are(self):
        assert rgb_row(pixels(0, 5, 255, mode="I")) == gray(0, 5, 255)

    def test_larger_integers_are_taken_as_sixteen_bits(self):
        assert rgb_row(pixels(-7, 255, 0x1234, 100_000, mode="I")) == gray(0, 0, 0x12, 255)

    def test_floats_up_to_one_are_scaled(self):
        # 0.2 x 255 = 51
        assert rgb_row(pixels(0.0, 0.2, 1.0, -3.0, mode="F")) == gray(0, 51, 255, 0)

    def test_larger_floats_are_levels(self):
        values = (0.4, 100.6, 300.0, float("nan"), float("inf"))
        assert rgb_row(pixels(*values, mode="F")) == gray(0, 101, 255, 0, 0)


class TestDecode:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_the_picture_comes_out_upright(self, file_format, orientation):
        tags = Image.Exif()
        tags[0x0112] = orientation
        data = encode(picture(20, 30), file_format, exif=tags)
        with Image.open(io.BytesIO(data)) as opened:
            expected = ImageOps.exif_transpose(opened)
        found = decode(data)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(found, expected)
        # The bright corner is where the orientation puts it: top left only in an upright file.
        assert (np.asarray(found)[:5, :5].min() > 200) == (orientation in {1, 5})

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
    def test_modes_go_through_to_rgb(self, mode):
        image = picture(20, 30, mode)
        np.testing.assert_array_equal(decode(encode(image, "PNG")), to_rgb(image))

    def test_adobe_cmyk_is_not_a_negative(self):
        ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
        found = np.asarray(decode(encode(ink, "JPEG", quality=95))).reshape(-1, 3)
        assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 4

    def test_progressive_and_gray_jpegs(self):
        for image, options in ((picture(), {"progressive": True}), (picture(mode="L"), {})):
            data = encode(image, "JPEG", **options)
            with Image.open(io.BytesIO(data)) as opened:
                np.testing.assert_array_equal(decode(data), opened.convert("RGB"))

    @pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
    def test_an_animation_gives_its_first_frame(self, file_format):
        frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
        data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
        red, green, blue = np.asarray(decode(data)).reshape(-1, 3).mean(0)
        assert red > 250
        assert max(green, blue) < 5

    def test_files_and_pictures_decode_like_bytes(self, tmp_path):
        tags = Image.Exif()
        tags[0x0112] = 6
        for file_format in ("JPEG", "PNG", "WEBP", "TIFF"):
            data = encode(picture(20, 30), file_format, exif=tags)
            path = tmp_path / "file"
            path.write_bytes(data)
            expected = decode(data)
            np.testing.assert_array_equal(decode(path), expected)
            with Image.open(path) as opened:
                np.testing.assert_array_equal(decode(opened), expected)
                # Decoded once, it stays the same picture.
                np.testing.assert_array_equal(decode(opened), expected)

    def test_metadata_that_pillow_stumbles_over_does_no_harm(self):
        jpeg = insert_after_soi(
            encode(picture(), "JPEG"),
            segment(0xE1, b"Exif\0\0" + exif(3)[:30]),
            segment(0xE2, b"MPF\0" + bytes(40)),
            segment(0xFE, b"a comment"),
        )
        with Image.open(io.BytesIO(encode(picture(), "JPEG"))) as opened:
            np.testing.assert_array_equal(decode(jpeg), opened)
        text = chunk(b"zTXt", b"Comment\0\0" + b"not deflated")
        broken_animation = chunk(b"acTL", bytes(8))
        for data in (png(before=[text, broken_animation]), png(after=[text])):
            assert decode(data).size == (30, 20)

    def test_a_text_too_large_for_pillow_is_not_inflated(self):
        bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 << 20)))
        with pytest.raises(ValueError, match="too large"), Image.open(io.BytesIO(png(before=[bomb]))):
            pass
        np.testing.assert_array_equal(decode(png(before=[bomb])), decode(png()))

    def test_the_limit_holds_for_decoding(self):
        data = encode(picture(20, 30), "JPEG")
        assert decode(data, max_pixels=600).size == (30, 20)
        with pytest.raises(SampleError) as caught:
            decode(data, max_pixels=599)
        assert caught.value.reason == "image_too_large"

    def test_pillows_limit_and_the_warning_filters_stay_as_they_are(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
        before = list(warnings.filters)
        for file_format in ("JPEG", "PNG", "GIF", "BMP", "WEBP"):
            assert decode(encode(picture(20, 30), file_format)).size == (30, 20)
        assert warnings.filters == before
        assert not ImageFile.LOAD_TRUNCATED_IMAGES

    @pytest.mark.parametrize(("file_format", "own_limit", "limit"), [("TIFF", 599, 599), ("WEBP", 299, 598)])
    def test_where_the_plugin_asks_pillows_limit_planning_asks_it_first(
        self, file_format, own_limit, limit, monkeypatch
    ):
        data = encode(picture(20, 30), file_format)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", own_limit)
        for read in (read_header, decode):
            with pytest.raises(SampleError) as caught:
                read(data)
            assert caught.value.reason == "image_too_large"
            assert caught.value.numbers["max_pixels"] == limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", own_limit + 1)
        assert decode(data).size == (30, 20)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert decode(data).size == (30, 20)

    def test_many_threads_decode_the_same_bytes(self):
        data = {f: encode(picture(60, 90), f) for f in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")}
        expected = {f: np.asarray(decode(d)) for f, d in data.items()}
        wrong = []

        def work():
            for file_format, file in list(data.items()) * 5:
                if not np.array_equal(decode(file), expected[file_format]):
                    wrong.append(file_format)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


class TestDamage:
    @pytest.mark.parametrize(
        ("file_format", "mode", "options"),
        [
            ("JPEG", "RGB", {}),
            ("JPEG", "L", {"progressive": True}),
            ("PNG", "RGB", {}),
            ("PNG", "P", {}),
            ("WEBP", "RGB", {}),
            ("WEBP", "RGBA", {"lossless": True}),
            ("GIF", "P", {}),
            ("BMP", "RGB", {}),
            ("TIFF", "RGB", {}),
            ("PPM", "RGB", {}),
        ],
    )
    def test_a_file_cut_anywhere_gives_an_error_or_the_whole_picture(self, file_format, mode, options):
        data = encode(picture(9, 13, mode), file_format, **options)
        whole = np.asarray(decode(data))
        reasons, whole_pictures = set(), 0
        for length in range(len(data)):
            header, image = (outcome(read, data[:length]) for read in (read_header, decode))
            if isinstance(header, str):
                assert image == header
            else:
                assert (header.height, header.width) == (9, 13)
            if isinstance(image, str):
                reasons.add(image)
            else:
                np.testing.assert_array_equal(image, whole)
                whole_pictures += 1
        assert reasons <= {"image_empty", "image_truncated", "image_unreadable"}
        assert "image_truncated" in reasons
        # Checksums and end marks after the pixels may be missing, nothing more.
        assert whole_pictures <= 24

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
    def test_a_cut_body_is_called_truncated(self, file_format):
        data = encode(picture(60, 90), file_format)
        for share in (0.5, 0.7, 0.9):
            cut = data[: int(len(data) * share)]
            with pytest.raises(SampleError, match="ends") as caught:
                decode(cut)
            assert caught.value.reason == "image_truncated"
            assert caught.value.numbers["num_bytes"] == len(cut)

    @pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
    def test_the_header_alone_finds_a_cut_body(self, file_format):
        data = encode(picture(60, 90), file_format)
        with pytest.raises(SampleError) as caught:
            read_header(data[: len(data) // 2])
        assert caught.value.reason == "image_truncated"

    def test_bodies_that_hold_nothing_sensible_are_unreadable(self):
        before_the_header = PNG_SIGNATURE + chunk(b"IDAT", b"") + png_header(3, 5) + chunk(b"IEND", b"")
        garbled = (
            PNG_SIGNATURE + png_header(3, 5) + chunk(b"IDAT", b"no deflate stream") + chunk(b"IEND", b"")
        )
        for data in (
            before_the_header,
            garbled,
            jpeg_header(16, 16) + bytes(500) + b"\xff\xd9",
            b"GIF89a nothing",
        ):
            with pytest.raises(SampleError) as caught:
                decode(data)
            assert caught.value.reason in {"image_unreadable", "image_truncated"}
            assert caught.value.__cause__ is not None or "header" in caught.value.message

    def test_a_picture_that_cannot_be_loaded_any_more(self, tmp_path):
        path = tmp_path / "picture.png"
        path.write_bytes(encode(picture(), "PNG"))
        image = Image.open(path)
        image.close()
        with pytest.raises(SampleError) as caught:
            decode(image)
        assert caught.value.reason == "image_unreadable"
        assert "the image cannot be decoded" in caught.value.message

    def test_missing_files_and_wrong_types(self, tmp_path):
        path = tmp_path / "gone.jpg"
        with pytest.raises(SampleError, match=r"gone\.jpg") as caught:
            decode(path)
        assert caught.value.reason == "image_unreadable"
        with pytest.raises(SampleError, match="got str"):
            decode("gone.jpg")

    def test_a_body_of_another_size_than_its_header_is_refused(self):
        # An icon that promises 16 x 16 and holds 20 x 30: Pillow takes the size of what it finds.
        image = encode(picture(20, 30), "PNG")
        icon = b"\0\0\1\0\1\0" + bytes([16, 16, 0, 0, 1, 0, 32, 0]) + len(image).to_bytes(4, "little")
        icon += (22).to_bytes(4, "little") + image
        with pytest.raises(SampleError) as caught:
            decode(icon)
        assert caught.value.reason == "image_unreadable"
