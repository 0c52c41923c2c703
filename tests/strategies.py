"""Hypothesis strategies that build values, good ones and broken ones; nothing is filtered away."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from hypothesis import strategies as st

from tests.fakes import SMALL, jpeg, picture, png, png_promising, turns
from vlmpack.budget import SampleCost
from vlmpack.samples import ImageRef, Sample
from vlmpack.stages.placeholders import cost_of

MARKER: Final = "<image>"

_FRAGMENTS: Final = (
    "What is it?", "A cat", " and", " a dog.", "42", " 3.14", "don't", "\n", "\n\n", " ", "  ", "\t",
    "é", "e\u0301", "你好", "世界", "שלום", "नमस्ते", "\u00a0", "\u200b", "\ufeff", "\r\n", "😀", "🇫🇷",
    "👩\u200d👩\u200d👧", "<", "<|", "|>", "<|im", "<|im_", "im_end|>", "<row_", "<image: 0>",
    "assistant\n", "user\n", "system", "{{ x }}", "{% y %}",
)  # fmt: skip
"""What texts are made of: merges across every boundary, several bytes a character, and near misses of
the tokens that stand for turns and images, of which two can join to the end of a turn."""

IMAGE_TOKENS: Final = ("<|image|>", "<|global_image|>", "<row_1_col_1>", "<row_4_col_4>")


def texts(min_size: int = 0) -> st.SearchStrategy[str]:
    """Texts without special tokens."""
    return st.lists(st.sampled_from(_FRAGMENTS), min_size=min_size, max_size=8).map("".join)


def answers() -> st.SearchStrategy[str]:
    """Texts with at least one character that is not a space."""
    return st.builds(lambda start, core, end: start + core + end, texts(), st.sampled_from("aé你😀"), texts())


@lru_cache
def _file(width: int, height: int, kind: str) -> bytes:
    return jpeg(width, height) if kind == "jpeg" else png(width, height, mode=kind)


def image_files() -> st.SearchStrategy[bytes]:
    """Small JPEG and PNG files of one tile and more, up to the largest grid of `SMALL`."""
    return st.builds(
        _file,
        st.sampled_from((1, 31, 32, 33, 70, 128, 200)),
        st.sampled_from((1, 32, 40, 129)),
        st.sampled_from(("jpeg", "RGB", "L", "RGBA", "P")),
    )


@st.composite
def rows(draw: st.DrawFn, *, max_images: int = 3, markers: bool | None = None) -> dict:
    """A row that becomes a sample: up to three turns, images before the text or where markers stand."""
    images = draw(st.lists(image_files(), max_size=max_images))
    pairs = draw(st.lists(st.tuples(texts(), answers()), min_size=1, max_size=3))
    if images and (markers if markers is not None else draw(st.booleans())):
        for _ in images:
            turn = draw(st.integers(0, len(pairs) - 1))
            question, answer = pairs[turn]
            at = draw(st.integers(0, len(question)))
            pairs[turn] = (_insert(question, at), answer)
    return {"images": images, "texts": turns(*pairs)}


def _insert(text: str, at: int) -> str:
    """Insert a marker, but never inside one."""
    for start in range(max(0, at - len(MARKER) + 1), at):
        if text.startswith(MARKER, start):
            at = start
    return text[:at] + MARKER + text[at:]


def _broken() -> dict[str, tuple[object, str]]:
    good = turns(("What is it?", "A cat."))
    file = jpeg(64, 64)
    two = [file, file]
    planes = np.zeros((3, 8, 9), np.uint8)
    many_markers = turns((MARKER * 2, "b"))
    cases: dict[str, tuple[object, str]] = {
        "no columns": ({}, "bad_row"),
        "not a mapping": (["images", "texts"], "bad_row"),
        "None for a row": (None, "bad_row"),
        "only images": ({"images": [file]}, "bad_row"),
        "texts None": ({"texts": None}, "no_text"),
        "texts empty": ({"texts": [], "images": [file]}, "no_text"),
        "texts a string": ({"texts": "hello"}, "bad_row"),
        "texts a number": ({"texts": 7}, "bad_row"),
        "turn None": ({"texts": [None]}, "bad_row"),
        "turn without an answer": ({"texts": [{"user": "a"}]}, "bad_row"),
        "answer a number": ({"texts": [{"user": "a", "assistant": 7}]}, "bad_row"),
        "answer None": ({"texts": [{"user": "a", "assistant": None}]}, "bad_row"),
        "answer bytes": ({"texts": [{"user": "a", "assistant": b"b"}]}, "bad_row"),
        "question with half a surrogate pair": ({"texts": turns(("a\ud83d", "b"))}, "bad_row"),
        "answer empty": ({"texts": turns(("a", ""))}, "empty_turn"),
        "answer of spaces": ({"texts": turns(("a", "b"), ("c", " \n"))}, "empty_turn"),
        "all rated low": ({"texts": good, "relevance_ratings": [0]}, "ratings"),
        "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, "no_supervised_token"),
        "unknown role": ({"messages": [{"role": "judge", "content": "a"}]}, "bad_row"),
        "role a list": ({"messages": [{"role": ["user"], "content": "a"}]}, "bad_row"),
        "content None": ({"messages": [{"role": "user", "content": None}]}, "bad_row"),
        "part of a video": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "bad_row"),
        "part of type array": (
            {"messages": [{"role": "user", "content": [{"type": np.zeros(2)}]}]}, "bad_row"
        ),
        "speaker unknown": ({"conversations": [{"from": "alien", "value": "a"}]}, "bad_row"),
        "conversation without a value": ({"conversations": [{"from": "gpt"}]}, "bad_row"),
        "conversation of None": ({"conversations": [None]}, "bad_row"),
        "more markers than images": ({"texts": many_markers, "images": [file]}, "marker_mismatch"),
        "marker without image": ({"texts": turns((MARKER, "b")), "images": []}, "marker_mismatch"),
        "more images than markers": ({"texts": turns((MARKER, "b")), "images": two}, "marker_mismatch"),
        "None among the images": ({"texts": good, "images": [file, None]}, "image_missing"),
        "image without bytes": ({"texts": good, "images": [{"bytes": None, "path": None}]}, "image_missing"),
        "image a number": ({"texts": good, "images": [3]}, "bad_row"),
        "image a list": ({"texts": good, "images": [[file]]}, "bad_row"),
        "image with the channels first": ({"texts": good, "images": [planes]}, "bad_row"),
        "image of floats": ({"texts": good, "images": [np.zeros((8, 9, 3))]}, "bad_row"),
        "image of no size": ({"texts": good, "images": [np.zeros((0, 9, 3), np.uint8)]}, "bad_row"),
        "image of 0 bytes": ({"texts": good, "images": [b""]}, "image_empty"),
        "image of text": ({"texts": good, "images": [b"<html>404</html>"]}, "image_unreadable"),
        "header cut": ({"texts": good, "images": [file[:100]]}, "image_truncated"),
        "PNG cut in its pixels": ({"texts": good, "images": [png(64, 64)[:-400]]}, "image_truncated"),
        "JPEG cut in its pixels": ({"texts": good, "images": [file[: len(file) // 2]]}, "image_truncated"),
        "second of two cut": ({"texts": good, "images": [file, file[: len(file) // 2]]}, "image_truncated"),
        "a bomb": ({"texts": good, "images": [png_promising(30_000, 30_000)]}, "image_too_large"),
        "a path": ({"texts": good, "images": ["/etc/passwd"]}, "image_outside_root"),
        "too many images": ({"texts": good, "images": [png(8, 8)] * 5}, "too_many_images"),
    }  # fmt: skip
    return cases


BROKEN: Final = _broken()
"""Rows that must be refused, by what is wrong, with the reason that must be counted."""


def broken_rows() -> st.SearchStrategy[object]:
    """A row that must be refused."""
    return st.sampled_from(sorted(BROKEN)).map(lambda name: BROKEN[name][0])


def any_rows(max_size: int = 12) -> st.SearchStrategy[list]:
    """Good and broken rows."""
    return st.lists(st.one_of(rows(), rows(), broken_rows()), max_size=max_size)


def mixed_rows() -> list:
    """Return each broken row once, and as many good ones between them."""
    mixed: list = []
    for number, name in enumerate(sorted(BROKEN)):
        image = [picture(20 + number, 40)] if number % 2 else [png(8 * number + 1, 33)] * (number % 3)
        mixed += [
            {"images": image, "texts": turns((f"Question {number}?", f"Answer {number}."))},
            BROKEN[name][0],
        ]
    return mixed


@st.composite
def made_samples(draw: st.DrawFn, *, max_text: int = 60, key: str = "made") -> Sample:
    """A sample as `VQADataset` makes it, without a tokenizer: texts of ids from 1000, images of id 7."""
    grids = draw(st.lists(st.tuples(st.integers(1, 128), st.integers(1, 128)), max_size=3))
    geometries = tuple(SMALL.image(height, width) for height, width in grids)
    pieces, starts, length = [], [], 0
    for geometry in geometries:
        text = draw(st.integers(0, 5))
        starts.append(length + text)
        pieces += [np.arange(1000, 1000 + text), np.full(geometry.num_tokens, 7)]
        length += text + geometry.num_tokens
    answer = draw(st.integers(2, max_text))
    pieces.append(np.arange(1000, 1000 + answer))
    input_ids = np.concatenate(pieces).astype(np.int64)
    labels = np.full(len(input_ids), -100, np.int64)
    supervised = draw(st.integers(1, answer - 1))
    labels[-supervised:] = input_ids[-supervised:]
    return Sample(
        key=key,
        input_ids=input_ids,
        labels=labels,
        images=tuple(ImageRef(source=b"", height=height, width=width, mode="RGB") for height, width in grids),
        geometries=geometries,
        image_starts=tuple(starts),
        cost=cost_of(input_ids, geometries),
    )


def costs(max_tokens: int, max_images: int, max_patches: int) -> st.SearchStrategy[SampleCost]:
    """Costs of at most these sizes."""
    return st.builds(
        SampleCost,
        num_tokens=st.integers(1, max_tokens),
        num_images=st.integers(0, max_images),
        num_patches=st.integers(0, max_patches),
    )
