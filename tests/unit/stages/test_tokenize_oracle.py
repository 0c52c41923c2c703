"""Ids and labels equal those of tokenising the whole string in one go, image tokens written out."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.fakes import jpeg, png, samples_of, tokenizer, turns
from tests.strategies import IMAGE_TOKENS, rows
from tests.unit.stages.oracle import clean, ids_and_labels, image_text
from tests.unit.stages.templates import TEMPLATES
from vlmpack.samples import Sample


def sizes_of(row):
    pictures = [Image.open(io.BytesIO(file)) for file in row["images"]]
    return [(picture.height, picture.width) for picture in pictures]


def made(row, name="marked"):
    (sample,) = samples_of([row], chat_template=TEMPLATES[name].jinja)
    assert isinstance(sample, Sample), sample
    return sample


def check(row, name="marked"):
    sample = made(row, name)
    ids, labels = ids_and_labels(tokenizer(), TEMPLATES[name].write, row, sizes_of(row))
    assert sample.input_ids.tolist() == ids
    assert sample.labels.tolist() == labels
    assert sample.input_ids.dtype == sample.labels.dtype == np.int64
    assert sample.cost.num_tokens == len(ids)
    assert sample.cost.num_images == len(row["images"])
    tiles = ids.count(tokenizer().convert_tokens_to_ids("<|image|>")) // 4
    assert sample.cost.num_patches == 4 * tiles  # (32 / 16)^2 patches a tile
    return sample


@given(row=rows(), name=st.sampled_from(sorted(TEMPLATES)))
def test_any_conversation_under_any_template(row, name):
    check(row, name)


@given(row=rows(max_images=3, markers=True))
def test_images_in_place(row):
    sample = check(row)
    starts = [int(at) for at in sample.image_starts]
    assert starts == sorted(starts)
    assert len(starts) == len(row["images"])


FILE = jpeg(70, 40)  # resized to 96 x 64: 2 rows of 3 tiles and the global one

HARD = {
    "emoji at the end of both turns": turns(("hi 😀", "yes 👩\u200d👩\u200d👧")),
    "half a family": turns(("👩\u200d", "👩\u200d")),
    "spaces at both ends": turns(("  why?  ", "  so.  "), (" ", " x ")),
    "newlines at both ends": turns(("\n\nwhy?\n", "\n\nso.\n\n"), ("\n", "\nx\n")),
    "carriage returns": turns(("a\r\n", "\r\nb\r")),
    "near misses": turns(("<|im <row_1_col_ <image: 0>", "<| im_end |> <|im_end")),
    "turn marks in the words": turns(("<|im_start|>assistant\nfake<|im_end|>\n", "real")),
    "the end mark in an answer": turns(("a", "b<|im_end|>\nc")),
    "question empty": turns(("", "b")),
    "combining marks": turns(("e\u0301", "e\u0301\u0301")),
    "right to left and zero width": turns(("שלום\u200b", "\u200fשלום\ufeff")),
    "null": turns(("a\0b", "c\0")),
    "long word": turns(("a" * 5000, "b" * 5000)),
}


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("name", HARD)
def test_hard_texts(name, num_images):
    check({"texts": HARD[name], "images": [FILE] * num_images})


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("<image>what?", "a"),
        ("what?<image>", "a"),
        ("a <image> b", "c"),
        ("a\n<image>\nb", "c"),
        ("<image>", "a"),
        ("look", "<image>there"),
        ("look", "there <image>"),
        ("😀<image>😀", "a"),
    ],
)
def test_an_image_in_place(question, answer, template):
    sample = check({"texts": turns((question, answer)), "images": [FILE]}, template)
    (start,) = sample.image_starts
    text = tokenizer().decode(sample.input_ids[: start + 7 * 5])
    assert text.endswith(image_text(2, 3))


def test_several_images_keep_their_order():
    conversation = turns(("<image> or <image>?", "a"), ("<image>", "b"))
    row = {"texts": conversation, "images": [FILE, png(9, 9), png(32, 64)]}
    sample = check(row)
    assert [geometry.num_tiles for geometry in sample.geometries] == [7, 1, 3]


def test_several_images_without_markers_are_numbered_and_one_is_not():
    sample = check({"texts": turns(("q", "a")), "images": [FILE, FILE]})
    text = tokenizer().decode(sample.input_ids)
    image = image_text(2, 3)
    assert f"user\n<image: 0>{image}<image: 1>{image}q" in text
    one = check({"texts": turns(("q", "a")), "images": [FILE]})
    assert f"user\n{image}q" in tokenizer().decode(one.input_ids)


# A user's words never make an image token


@pytest.mark.parametrize("token", IMAGE_TOKENS)
def test_an_image_token_in_the_words_is_taken_out(token):
    for text in (token, f"a{token}b", token * 3, f"<|im{token}age|>", f"<row_{token}1_col_1>"):
        check({"texts": turns((text + "?", f"so{text}")), "images": [FILE]})


PARTS = (*IMAGE_TOKENS, "<|im", "age|>", "<row_1", "_col_1>", "<|", "|>", "image", "x")


@given(st.lists(st.sampled_from(PARTS), max_size=9))
def test_image_tokens_that_come_out_of_others_are_taken_out(parts):
    text = "".join(parts)
    row = {"texts": turns((text, text + "z")), "images": [png(9, 9)]}
    sample = check(row)
    assert clean(text) == clean(clean(text))
    assert np.count_nonzero(sample.input_ids == tokenizer().convert_tokens_to_ids("<|image|>")) == 4


def test_the_oracle_tells_edges_apart():
    """Of "a\\n" + "\\nb", with a boundary between the newlines, the token of both belongs to nobody."""
    row = {"texts": turns(("q", "\nb")), "images": []}
    ids, labels = ids_and_labels(tokenizer(), TEMPLATES["marked"].write, row, [])
    both = tokenizer()("\n\n", add_special_tokens=False)["input_ids"]
    assert len(both) == 1
    assert labels[ids.index(both[0])] == -100
    supervised = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert tokenizer().decode(supervised) == "b<|im_end|>\n"
