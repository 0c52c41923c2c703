"""What a sample says, what is refused, and which traps of tokenizers do not matter."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.fakes import (
    SMALL,
    Rows,
    Stream,
    broken_at,
    jpeg,
    only,
    png,
    refusal_of,
    row,
    samples_of,
    tokenizer,
    turns,
)
from tests.strategies import BROKEN
from tests.unit.stages.templates import NO_SYSTEM, TEMPLATES
from vlmpack.corpus import CHATML
from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling
from vlmpack.samples import Refusal, Sample
from vlmpack.stages import RatingMinima, VQADataset, add_image_tokens
from vlmpack.stages.tokenize import surround


def supervised(sample):
    return tokenizer().decode(sample.labels[sample.labels != -100])


def sample_of(row, **settings):
    sample = only(samples_of([row], **settings))
    assert isinstance(sample, Sample), sample
    return sample


def test_only_the_assistant_is_supervised():
    sample = sample_of({"texts": turns(("Why?", "So."), ("And?", "Yes."))})
    assert supervised(sample) == "So.<|im_end|>\nYes.<|im_end|>\n"
    assert np.array_equal(sample.input_ids[sample.labels != -100], sample.labels[sample.labels != -100])


def test_a_system_message_is_not_supervised():
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    assert supervised(sample_of({"messages": messages})) == "assistant<|im_end|>\n"


def test_an_image_in_an_answer_is_not_supervised():
    sample = sample_of({"texts": turns(("Draw.", "Here <image> it is.")), "images": [jpeg(40, 20)]})
    assert supervised(sample) == "Here  it is.<|im_end|>\n"


def test_the_first_word_after_a_header_that_ends_with_a_space_is_supervised():
    sample = sample_of(row(answer="Paris"), chat_template=TEMPLATES["typed parts"].jinja)
    assert supervised(sample) == " Paris<|im_end|>\n"
    marked = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    assert supervised(sample_of(row(answer="Paris"), chat_template=marked)) == " Paris<|im_end|>"


def test_the_cost_is_known_without_pixels():
    # 70 x 40 grows to 96 x 64: 2 rows of 3 tiles and the global one, each 4 image tokens and 1 position
    # token, and (32 / 16)^2 = 4 patches.
    with_image, without = sample_of(row(images=[jpeg(70, 40)])), sample_of(row())
    assert with_image.cost.num_tokens == without.cost.num_tokens + 7 * 5
    assert with_image.cost.num_images == 1
    assert with_image.cost.num_patches == 7 * 4
    assert with_image.cost.num_tokens == len(with_image.input_ids) == len(with_image.labels)


def test_a_single_tile_has_the_global_token_and_no_second_copy():
    sample = sample_of(row(images=[png(32, 32)]))
    start = sample.image_starts[0]
    assert tokenizer().decode(sample.input_ids[start : start + 5]) == "<|global_image|>" + "<|image|>" * 4
    assert sample.cost.num_patches == 4


LATER = {"too many images", "JPEG cut in its pixels", "second of two cut"}


@pytest.mark.parametrize("name", sorted(set(BROKEN) - LATER))
def test_a_broken_row_is_a_refusal_and_the_rows_around_it_are_samples(name):
    raw, reason = BROKEN[name]
    before, refusal, after = samples_of([row(), raw, row()])
    assert isinstance(before, Sample)
    assert isinstance(after, Sample)
    assert isinstance(refusal, Refusal)
    assert (refusal.key, refusal.reason) == ("1", reason)
    json.dumps(dict(refusal.numbers))


def test_a_row_by_index_equals_the_row_in_order():
    dataset = samples_of([row(images=[png(9, 9)]), {}, row("b")])
    for index, item in enumerate(dataset):
        twin = dataset[index]
        assert twin.key == item.key == str(index)
        if isinstance(item, Sample):
            assert np.array_equal(twin.input_ids, item.input_ids)
        else:
            assert twin == item
    with pytest.raises(IndexError):
        dataset[3]
    with pytest.raises(ConfigError, match="stream"):
        samples_of(Stream(broken_at(), 2))[0]
    assert dataset.num_rows == 3
    assert samples_of(Stream(broken_at(), 2)).num_rows is None


def test_a_row_that_the_data_set_cannot_make_is_refused_by_index_too():
    assert samples_of(Rows(broken_at(1), 2))[1].reason == "source_error"


# Labels that would teach nothing


def test_a_template_that_marks_nothing_is_a_refusal_not_an_empty_lesson():
    marks_user = CHATML.replace("== 'assistant'", "== 'critic'")
    refusal = refusal_of(row(), chat_template=marks_user)
    assert refusal.reason == "no_supervised_token"
    assert "template marks none" in refusal.message


def test_a_target_at_position_0_alone_teaches_nothing():
    bare = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% endif %}{% endfor %}<|im_end|>{{ messages[0]['content'] }}"
    )
    assert refusal_of(row(answer="A"), chat_template=bare).reason == "no_supervised_token"


def test_a_template_that_leaves_out_a_message_with_an_image_is_a_refusal():
    last_only = CHATML.replace("in messages %}", "in messages[-2:] %}")
    raw = {"texts": turns(("<image>", "a"), ("b", "c")), "images": [png(9, 9)]}
    refusal = refusal_of(raw, chat_template=last_only)
    assert refusal.reason == "template_untraceable"


def test_a_template_without_system_messages_refuses_rows_that_have_one():
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    items = list(samples_of([{"messages": messages}, {"messages": messages[1:]}], chat_template=NO_SYSTEM))
    assert items[0].reason == "template_untraceable"
    assert isinstance(items[1], Sample)


def test_ratings_reach_the_stage():
    raw = {"texts": turns(("a", "b")), "visual_dependency_ratings": [2]}
    assert refusal_of(raw, ratings=RatingMinima(visual_dependency=3)).reason == "ratings"


# Image tokens in the words


def test_an_image_token_in_the_words_is_removed_counted_and_warned_of_once(caplog):
    dirty = [row("a<|image|>b"), row("c", "d<row_1_col_1>"), row("fine"), row("<|im<|image|>age|>")]
    dataset = samples_of(dirty)
    with caplog.at_level(logging.WARNING):
        first, second, _, fourth = dataset
    assert "ab<|im_end|>" in tokenizer().decode(first.input_ids)
    assert supervised(second) == "d<|im_end|>\n"
    assert "user\n<|im_end|>" in tokenizer().decode(fourth.input_ids), "what removal joins is removed too"
    assert dataset.num_texts_with_image_token == 3
    (record,) = caplog.records
    assert "row 0 has an image token" in record.getMessage()


def test_many_nested_image_tokens_are_removed_in_time():
    depth = 20_000
    sample = sample_of(row("<|im" * depth + "age|>" * depth + "?"))
    assert len(sample.input_ids) < 20


# Traps that an earlier call to the tokenizer leaves behind


@pytest.fixture
def own_tokenizer():
    return copy.deepcopy(tokenizer())


def ids_with(own, **settings):
    raw = {"texts": turns(("What is it? " * 20, "A cat. " * 20)), "images": [png(40, 70)]}
    return only(VQADataset([raw], own, tiling=SMALL, **settings)).input_ids.tolist()


def test_truncation_left_on_does_not_cut_a_sample(own_tokenizer):
    expected = ids_with(own_tokenizer)
    own_tokenizer("a b c d e f", truncation=True, max_length=4)
    assert own_tokenizer.backend_tokenizer.truncation is not None, "the trap is set"
    assert ids_with(own_tokenizer) == expected


def test_padding_left_on_does_not_pad_a_sample(own_tokenizer):
    expected = ids_with(own_tokenizer)
    own_tokenizer(["a"], padding="max_length", max_length=4096)
    assert own_tokenizer.backend_tokenizer.padding is not None, "the trap is set"
    assert ids_with(own_tokenizer) == expected


def test_special_tokens_left_switched_off_do_not_hide_images(own_tokenizer):
    expected = ids_with(own_tokenizer)
    own_tokenizer("<|image|>", split_special_tokens=True)
    assert own_tokenizer.backend_tokenizer.encode_special_tokens, "the trap is set"
    assert ids_with(own_tokenizer) == expected


def test_a_post_processor_that_adds_tokens_is_not_asked(own_tokenizer):
    expected = ids_with(own_tokenizer)
    bos = own_tokenizer.bos_token
    own_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, own_tokenizer.bos_token_id)]
    )
    assert ids_with(own_tokenizer) == expected


def byte_level_tokenizer(*, trim_offsets):
    """A tokenizer that makes a token of each run of letters or of spaces: the worst case for offsets."""
    words = ["Ġ", "ĠĠ", "ĠĠĠ", "Ċ", "a", "b", "c", "user", "assistant", "Ġa", "Ġb", "Ġc"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(letters + words))}
    merges = [("Ġ", "Ġ"), ("ĠĠ", "Ġ"), ("Ġ", "a"), ("Ġ", "b")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.add_tokens(["<|im_start|>"], special_tokens=True)
    add_image_tokens(made, SMALL)
    made.chat_template = CHATML
    return made


@pytest.mark.parametrize("answer", ["a", " a", "a ", "  a  ", "a   b", "   a b   c   "])
def test_trimmed_offsets_change_no_label(answer):
    results = []
    for trim_offsets in (False, True):
        own = byte_level_tokenizer(trim_offsets=trim_offsets)
        sample = only(VQADataset([row("a  ", answer)], own, tiling=SMALL))
        results.append(sample.labels.tolist())
        assert own.decode(sample.labels[sample.labels != -100]) == f"{answer}<|im_end|>\n"
    assert results[0] == results[1]


# Construction


def test_a_tokenizer_without_image_tokens_is_refused_and_the_remedy_named():
    from vlmpack.corpus import load_tokenizer

    bare = load_tokenizer()
    with pytest.raises(ConfigError, match=r"no special token '<\|image\|>'; call add_image_tokens"):
        VQADataset([row()], bare, tiling=SMALL)
    add_image_tokens(bare, SMALL)
    with pytest.raises(ConfigError, match=r"no special token '<row_1_col_5>'"):
        VQADataset([row()], bare, tiling=Tiling(tile_size=32, max_side=160))


def test_a_slow_tokenizer_is_refused(own_tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="fast tokenizer"):
        VQADataset([row()], Slow(), tiling=SMALL)


def test_a_pickled_stage_makes_the_same_samples():
    dataset = samples_of([row(images=[png(40, 70)]), {}])
    twin = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own
    for item, other in zip(dataset, twin, strict=True):
        if isinstance(item, Sample):
            assert np.array_equal(item.input_ids, other.input_ids)
            assert np.array_equal(item.labels, other.labels)
        else:
            assert item == other


@pytest.mark.parametrize(
    ("text", "spans", "expected", "moved"),
    [
        # "[" and "]]" go around each <i>: what lies behind one such token moves by 3.
        ("a<i>b", [(0, 1), (4, 5)], "a[<i>]]b", [(0, 1), (7, 8)]),
        ("<i>ab", [(0, 5)], "[<i>]]ab", [(0, 8)]),  # a span that begins with the image holds all of it
        ("ab<i>", [(0, 2)], "ab[<i>]]", [(0, 2)]),  # one that ends before it does not reach into it
        ("x<i><i>y", [(1, 7), (7, 8)], "x[<i>]][<i>]]y", [(1, 13), (13, 14)]),
        ("none", [(1, 3)], "none", [(1, 3)]),
    ],
)
def test_what_an_assistant_wrote_moves_with_what_is_put_around_images(text, spans, expected, moved):
    assert surround(text, spans, "<i>", ("[", "]]")) == (expected, moved)
