"""Every column layout becomes the same rows; every fault becomes a refusal with its reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.fakes import jpeg, picture, png, png_promising, row, turns
from tests.strategies import BROKEN
from vlmpack.errors import REASONS, ConfigError, SampleError
from vlmpack.images import MAX_PIXELS
from vlmpack.samples import Message
from vlmpack.stages import RatingMinima, RowParser

QUESTION, ANSWER = Message(role="user", content="Why?"), Message(role="assistant", content="So.")


def parse(raw, **settings):
    return RowParser(**settings)("key", raw)


def fault(raw, **settings):
    with pytest.raises(SampleError) as caught:
        parse(raw, **settings)
    return caught.value


@pytest.mark.parametrize(
    "raw",
    [
        {"texts": [{"user": "Why?", "assistant": "So.", "source": "x"}]},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
        {"messages": [{"role": "human", "content": "Why?"}, {"role": "model", "content": "So."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
            ]
        },
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"texts": None, "messages": [{"role": "user", "content": "Why?"}, {"role": "gpt", "content": "So."}]},
        {"texts": ({"user": "Why?", "assistant": "So."},)},
    ],
)
def test_every_layout_gives_the_same_messages(raw):
    assert parse(raw).messages == (QUESTION, ANSWER)
    assert parse(raw).key == "key"
    assert parse(raw).images == ()


def test_a_system_message_stays():
    raw = {"messages": [{"role": "system", "content": "Be brief."}, *_messages()]}
    assert parse(raw).messages == (Message(role="system", content="Be brief."), QUESTION, ANSWER)


def _messages():
    return [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def test_typed_image_parts_become_markers_in_place():
    parts = [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": " b"}]
    raw = {"messages": [{"role": "user", "content": parts}, _messages()[1]], "images": [jpeg(8, 8)]}
    assert parse(raw).messages[0].content == "a <image> b"
    assert parse(raw, image_marker="[IMG]").messages[0].content == "a [IMG] b"
    assert "unknown type 'image'" in fault(raw, image_marker=None).message


LATER = {"no assistant", "too many images", "JPEG cut in its pixels", "second of two cut"}


@pytest.mark.parametrize("name", sorted(LATER))
def test_what_a_header_does_not_show_is_left_to_later_stages(name):
    raw, _ = BROKEN[name]
    assert len(parse(raw).images) == len(raw.get("images", []))


@pytest.mark.parametrize("name", sorted(set(BROKEN) - LATER))
def test_what_is_broken_is_refused_with_its_reason(name):
    raw, reason = BROKEN[name]
    error = fault(raw)
    assert error.reason == reason
    assert error.reason in REASONS
    assert len(error.message) > 20, "a refusal explains itself"


COLUMNS = ("texts", "messages", "conversations", "images", "image", "relevance_ratings")
FIELDS = ("user", "assistant", "role", "content", "from", "value", "type", "text", "bytes", "path")
LEAVES = st.none() | st.integers() | st.text(max_size=3) | st.binary(max_size=3) | st.floats()


def nested(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=3)


@given(st.dictionaries(st.sampled_from(COLUMNS), st.recursive(LEAVES, nested, max_leaves=8)))
def test_whatever_a_row_holds_is_parsed_or_refused(raw):
    try:
        parsed = parse(raw, image_root="/nowhere")
    except SampleError as error:
        outcome = error.reason
    else:
        outcome = "parsed" if parsed.messages else "parsed to nothing"
    assert outcome in {"parsed", *REASONS}


def image_of(source, **settings):
    return parse(row(images=[source]), **settings).images[0]


@pytest.mark.parametrize(
    "source",
    [
        jpeg(30, 20),
        png(30, 20),
        {"bytes": png(30, 20), "path": None},
        {"bytes": png(30, 20), "path": "/no/such/file"},
        picture(30, 20),
        picture(30, 20, mode="P"),
        Image.open(io.BytesIO(png(30, 20))),
        np.zeros((20, 30), np.uint8),
        np.zeros((20, 30, 3), np.uint8),
        np.zeros((20, 30, 4), np.uint8),
        np.zeros((40, 60, 3), np.uint8)[::2, ::-2],
    ],
)
def test_every_form_of_an_image_has_its_size_read(source):
    image = image_of(source)
    assert (image.height, image.width) == (20, 30)


def test_sides_are_those_of_the_upright_picture():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter turn
    file = io.BytesIO()
    picture(30, 20).save(file, "JPEG", exif=exif)
    image = image_of(file.getvalue())
    assert (image.height, image.width) == (30, 20)


@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("wrap", [lambda image: [image], lambda image: image, lambda image: (image,)])
def test_one_image_may_come_without_a_list(column, wrap):
    raw = {"texts": turns(("Why?", "So.")), column: wrap(jpeg(30, 20))}
    assert len(parse(raw).images) == 1


@pytest.mark.parametrize("empty", [{}, {"images": None}, {"images": []}, {"image": None}])
def test_no_images_in_any_form(empty):
    assert parse({"texts": turns(("Why?", "So.")), **empty}).images == ()


def test_the_column_image_counts_where_images_is_none():
    raw = {"texts": turns(("Why?", "So.")), "images": None, "image": jpeg(30, 20)}
    assert len(parse(raw).images) == 1, "a union of two data sets has both columns"


@pytest.mark.parametrize(
    "shape", [(3, 20, 30), (20, 30, 1), (20, 30, 2), (20, 30, 5), (1, 20, 30, 3), (0, 3, 3), (7,)]
)
def test_an_array_of_another_shape_is_refused(shape):
    error = fault(row(images=[np.zeros(shape, np.uint8)]))
    assert error.reason == "bad_row"
    assert f"got uint8 {list(shape)}" in error.message


def test_the_number_of_the_broken_image_is_named():
    error = fault(row(images=[jpeg(8, 8), jpeg(8, 8), b""]))
    assert error.message.startswith("image 2: ")
    assert error.numbers["image"] == 2


def test_the_pixel_limit_is_read_from_the_header():
    side = 30_000
    error = fault(row(images=[png_promising(side, side)]))
    assert error.reason == "image_too_large"
    assert error.numbers["max_pixels"] == MAX_PIXELS < side * side
    assert fault(row(images=[jpeg(30, 20)]), max_pixels=599).reason == "image_too_large"
    assert image_of(jpeg(30, 20), max_pixels=600).width == 30


# Paths in the data


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(30, 20))
    (tmp_path / "secret.png").write_bytes(png(9, 9))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    return tmp_path / "in"


def test_a_path_inside_the_root_is_read(folder):
    for path in ("a.png", folder / "a.png", str(folder / "a.png"), "../in/a.png"):
        assert image_of(path, image_root=folder).width == 30
    assert image_of({"bytes": None, "path": "a.png"}, image_root=str(folder)).source == folder / "a.png"


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "link.png", "x/../../secret.png"])
def test_a_path_that_leads_out_of_the_root_is_refused(folder, path):
    error = fault(row(images=[path]), image_root=folder)
    assert error.reason == "image_outside_root"
    assert "leads out of" in error.message


def test_a_path_without_a_root_is_refused_and_the_remedy_named():
    error = fault(row(images=["a.png"]))
    assert error.reason == "image_outside_root"
    assert "image_root=" in error.message


@pytest.mark.parametrize("path", ["missing.png", ".", "a\0b", "x" * 5000])
def test_a_path_to_nothing_is_refused(folder, path):
    assert fault(row(images=[path]), image_root=folder).reason == "image_unreadable"


@pytest.mark.parametrize("root", [None, "/nowhere"])
def test_a_picture_in_base64_does_not_fill_the_report(root):
    error = fault(row(images=["iVBORw0KGgo" * 30_000]), image_root=root)
    assert len(error.message) < 1_000
    assert all(len(str(value)) < 1_000 for value in error.numbers.values())


# Ratings


RATED = {
    "texts": turns(("q0", "a0"), ("q1", "a1"), ("q2", "a2")),
    "relevance_ratings": [1, 3, None],
    "formatting_ratings": [5, 5, 5],
}


@pytest.mark.parametrize(
    ("minima", "kept"),
    [
        (RatingMinima(), ["q0", "q1", "q2"]),
        (RatingMinima(relevance=2), ["q1", "q2"]),  # None is never below
        (RatingMinima(relevance=4), ["q2"]),
        (RatingMinima(formatting=5), ["q0", "q1", "q2"]),  # equal is enough
        (RatingMinima(visual_dependency=5, image_correspondence=5), ["q0", "q1", "q2"]),  # no such columns
    ],
)
def test_turns_rated_too_low_are_left_out(minima, kept):
    parsed = parse(RATED, ratings=minima)
    assert [message.content for message in parsed.messages if message.role == "user"] == kept


@pytest.mark.parametrize("column", ["relevance", "image_correspondence", "visual_dependency", "formatting"])
def test_each_kind_of_rating_counts(column):
    raw = {"texts": turns(("q0", "a0"), ("q1", "a1")), f"{column}_ratings": [2, 3]}
    assert len(parse(raw, ratings=RatingMinima(**{column: 3})).messages) == 2
    assert fault(raw, ratings=RatingMinima(**{column: 4})).reason == "ratings"


@pytest.mark.parametrize("odd", [None, 7, "33", ["high", "low"], [None], [], {0: 1}, [float("nan")] * 2])
def test_an_odd_rating_keeps_the_turn(odd):
    assert len(parse({"texts": turns(("q", "a")), "relevance_ratings": odd}).messages) == 2


@pytest.mark.parametrize("kind", [tuple, np.array, lambda ratings: np.array(ratings, np.float32)])
def test_ratings_may_come_as_arrays(kind):
    raw = {"texts": turns(("q0", "a0"), ("q1", "a1")), "relevance_ratings": kind([1, 3])}
    assert [message.content for message in parse(raw, ratings=RatingMinima(relevance=2)).messages] == [
        "q1",
        "a1",
    ]


# Markers


@pytest.mark.parametrize(("markers", "images"), [(0, 0), (0, 2), (1, 1), (2, 2)])
def test_markers_that_match_or_none_at_all_are_fine(markers, images):
    assert len(parse(row("<image>" * markers + "?", images=[jpeg(8, 8)] * images)).images) == images


@pytest.mark.parametrize(("markers", "images"), [(1, 0), (1, 2), (2, 1)])
def test_markers_and_images_that_differ_in_number_are_refused(markers, images):
    error = fault(row("<image>" * markers + "?", images=[jpeg(8, 8)] * images))
    assert error.reason == "marker_mismatch"
    assert error.numbers == {"num_markers": markers, "num_images": images}


def test_markers_are_counted_over_all_messages():
    raw = {"texts": turns(("<image>", "a"), ("b", "see <image>")), "images": [jpeg(8, 8)] * 2}
    assert len(parse(raw).images) == 2


def test_without_a_marker_the_text_is_left_alone():
    assert parse(row("<image><image>"), image_marker=None).messages[0].content == "<image><image>"


def test_an_empty_marker_is_a_wrong_setting():
    with pytest.raises(ConfigError, match="image_marker"):
        RowParser(image_marker="")
