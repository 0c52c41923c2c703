"""The tokens that stand for images: added once, found by name, spliced in without touching the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import SMALL, drop_in_tokenizer, only, png, row, samples_of, tokenizer
from tests.unit.stages.oracle import image_text
from vlmpack.corpus import CHATML, load_tokenizer
from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling
from vlmpack.stages import ImageTokens, add_image_tokens
from vlmpack.stages.placeholders import retile, splice


def test_added_tokens_are_counted_and_adding_twice_adds_none():
    fresh = load_tokenizer()
    before = max(fresh.get_vocab().values()) + 1
    growth = add_image_tokens(fresh, SMALL)
    # <|image|>, <|global_image|> and 4 x 4 positions
    assert growth.num_added == 2 + 16
    assert growth.num_embeddings == before + 18
    again = add_image_tokens(fresh, SMALL)
    assert (again.num_added, again.num_embeddings) == (0, before + 18)


@pytest.mark.parametrize(
    ("tiling", "number"),
    [
        (Tiling(), 2 + 16),
        (Tiling(max_side=4096), 2 + 64),
        (Tiling(global_tile=False), 1 + 16),
        (Tiling(position_tokens=0), 1),
    ],
)
def test_only_the_tokens_that_a_tiling_can_use_are_added(tiling, number):
    fresh = load_tokenizer()
    assert add_image_tokens(fresh, tiling).num_added == number
    ImageTokens.of(fresh, tiling)


def test_an_embedding_of_the_said_size_takes_every_id():
    fresh = load_tokenizer()
    growth = add_image_tokens(fresh, SMALL)
    ids = fresh("<|image|><row_4_col_4>A", add_special_tokens=False)["input_ids"]
    assert max(ids) < growth.num_embeddings
    assert max(fresh.get_vocab().values()) == growth.num_embeddings - 1


def test_added_tokens_stay_whole_between_letters():
    ids = tokenizer()("a<|image|>b<row_1_col_1>c", add_special_tokens=False)["input_ids"]
    assert [tokenizer().decode([number]) for number in ids] == ["a", "<|image|>", "b", "<row_1_col_1>", "c"]


def test_tokens_are_found_by_attribute_before_their_usual_text():
    named = load_tokenizer()
    named.add_tokens(["<IMG>", "<GLOB>"], special_tokens=True)
    add_image_tokens(named, SMALL)
    named.image_token, named.global_image_token = "<IMG>", "<GLOB>"
    found = ImageTokens.of(named, SMALL)
    assert (found.text, found.image) == ("<IMG>", named.convert_tokens_to_ids("<IMG>"))
    assert found.global_image == named.convert_tokens_to_ids("<GLOB>")
    assert found.positions[3][2] == named.convert_tokens_to_ids("<row_4_col_3>")
    assert ImageTokens.of(drop_in_tokenizer(CHATML), SMALL).text == "<|image|>"


@pytest.mark.parametrize("missing", ["<|image|>", "<|global_image|>", "<row_4_col_4>"])
def test_each_missing_token_is_named(missing):
    fresh = load_tokenizer()
    tokens = ["<|image|>", "<|global_image|>"]
    tokens += [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    fresh.add_tokens([token for token in tokens if token != missing], special_tokens=True)
    with pytest.raises(ConfigError, match=missing.replace("|", r"\|")):
        ImageTokens.of(fresh, SMALL)


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    global_tile=st.booleans(),
    position_tokens=st.integers(0, 1),
)
def test_a_block_has_as_many_tokens_as_the_geometry_counts(height, width, global_tile, position_tokens):
    tiling = Tiling(tile_size=32, max_side=128, global_tile=global_tile, position_tokens=position_tokens)
    tokens, geometry = ImageTokens.of(tokenizer(), tiling), tiling.image(height, width)
    block = tokens.block(geometry)
    assert len(block) == geometry.num_tokens
    assert np.count_nonzero(block == tokens.image) == geometry.num_image_tokens
    assert block.dtype == np.int64


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 32), (40, 100), (128, 128)])
def test_a_block_reads_global_tile_first_then_row_by_row(height, width):
    geometry = SMALL.image(height, width)
    block = ImageTokens.of(tokenizer(), SMALL).block(geometry)
    assert tokenizer().decode(block) == image_text(geometry.grid.rows, geometry.grid.columns)


def test_a_block_without_a_global_tile_or_marks():
    bare = Tiling(tile_size=32, max_side=128, tokens_per_tile=2, global_tile=False)
    block = ImageTokens.of(tokenizer(), bare).block(bare.image(32, 64))
    assert tokenizer().decode(block) == "<row_1_col_1><|image|><|image|><row_1_col_2><|image|><|image|>"
    unmarked = Tiling(tile_size=32, max_side=128, tokens_per_tile=2, position_tokens=0)
    block = ImageTokens.of(tokenizer(), unmarked).block(unmarked.image(32, 64))
    assert tokenizer().decode(block) == "<|image|>" * 6  # the global tile and two more


def test_a_shared_block_cannot_be_changed():
    block = ImageTokens.of(tokenizer(), SMALL).block(SMALL.image(32, 32))
    with pytest.raises(ValueError, match="read-only"):
        block[0] = 0


@given(st.data())
def test_splice_replaces_each_cut_and_nothing_else(data):
    array = data.draw(st.lists(st.integers(0, 9), max_size=12))
    edges = sorted(data.draw(st.lists(st.integers(0, len(array)), max_size=6)))
    cuts = list(zip(edges[::2], edges[1::2], strict=False))
    blocks = [data.draw(st.lists(st.integers(100, 109), max_size=3)) for _ in cuts]
    made, starts = splice(np.array(array, np.int64), [np.array(block, np.int64) for block in blocks], cuts)
    expected, end, expected_starts = [], 0, []
    for block, (start, stop) in zip(blocks, cuts, strict=True):
        expected += array[end:start]
        expected_starts.append(len(expected))
        expected += block
        end = stop
    assert made.tolist() == expected + array[end:]
    assert list(starts) == expected_starts


SIDES = st.integers(1, 128)


@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3),
    max_side=st.sampled_from((32, 64, 96)),
)
def test_retiling_equals_tiling_that_way_from_the_start(sizes, max_side):
    smaller = Tiling(tile_size=32, max_side=max_side, tokens_per_tile=4)
    raw = row("a<image>" * len(sizes) + "b", images=[png(width, height) for height, width in sizes])
    sample, expected = only(samples_of([raw])), only(samples_of([raw], tiling=smaller))
    made = retile(sample, ImageTokens.of(tokenizer(), SMALL), smaller)
    assert made.input_ids.tolist() == expected.input_ids.tolist()
    assert made.labels.tolist() == expected.labels.tolist()
    for name in ("geometries", "image_starts", "cost", "key", "images"):
        assert getattr(made, name) == getattr(expected, name), name
    back = retile(made, ImageTokens.of(tokenizer(), SMALL), SMALL)
    assert back.input_ids.tolist() == sample.input_ids.tolist()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("plain <b> text", "plain <b> text"),
        ("<|image|>", ""),
        ("a<|image|>b<row_1_col_1>c", "abc"),
        ("<|im<|image|>age|>", ""),
        ("<|im<row_<|image|>1_col_1>age|>x", "x"),
        ("<|<|image|>image|><|image|>", ""),
        ("<|image<|image|>", "<|image"),
        ("<row_9_col_9>", "<row_9_col_9>"),  # not in this grid, so no token of this tiling
    ],
)
def test_image_tokens_are_removed_until_none_is_left(text, left):
    assert ImageTokens.of(tokenizer(), SMALL).removed_from(text) == left
