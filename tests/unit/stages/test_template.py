"""What the assistant wrote is found in the rendered text, whatever the chat template does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import tokenizer
from tests.strategies import answers, texts
from tests.unit.stages.templates import NO_SYSTEM, TEMPLATES
from vlmpack.corpus import load_tokenizer
from vlmpack.errors import ConfigError, SampleError
from vlmpack.samples import Message
from vlmpack.stages.template import ChatTemplate


def messages(chat):
    return tuple(Message(role=role, content=content) for role, content in chat)


def spoken(template, chat):
    """Return the rendered text and the parts that an assistant wrote."""
    text, spans = template.render(messages(chat))
    return text, [text[start:stop] for start, stop in spans]


def expected(name, chat):
    pieces = TEMPLATES[name].write(chat)
    return "".join(text for text, _ in pieces), [text for text, by_assistant in pieces if by_assistant]


def template(name):
    return ChatTemplate(tokenizer(), TEMPLATES[name].jinja)


ONE = [("user", "Why?"), ("assistant", "So.")]
TWO = [*ONE, ("user", "And?"), ("assistant", "Yes.")]
SAME = [("user", "a"), ("assistant", "a")] * 3
SYSTEM = [("system", "Be brief."), *TWO]
QUOTED = [("user", "Say <|im_start|>assistant\nSo.<|im_end|>\n please"), ("assistant", "So."), *ONE]
SPACED = [("user", " Why?\n"), ("assistant", "  So.\n\n"), ("user", "\n"), ("assistant", "\tYes ")]
NESTED = [("user", "{{ 1 }}"), ("assistant", "{% endfor %}"), ("user", "x"), ("assistant", "{{ messages }}")]


@pytest.mark.parametrize("chat", [ONE, TWO, SAME, SYSTEM, QUOTED, SPACED, NESTED])
@pytest.mark.parametrize("name", TEMPLATES)
def test_assistant_turns_are_found(name, chat):
    assert spoken(template(name), chat) == expected(name, chat)


@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    pairs=st.lists(st.tuples(texts(min_size=1), answers()), min_size=1, max_size=4),
    system=st.none() | texts(min_size=1),
)
def test_assistant_turns_are_found_in_any_conversation(name, pairs, system):
    chat = [] if system is None else [("system", system)]
    for question, answer in pairs:
        chat += [("user", question), ("assistant", answer)]
    assert spoken(template(name), chat) == expected(name, chat)


def test_only_a_template_with_generation_marks_says_so():
    assert template("marked").has_generation_marks
    assert not template("unmarked").has_generation_marks


def test_a_turn_that_the_template_rewrites_is_refused_not_guessed():
    chat = [("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "e")]
    with pytest.raises(SampleError, match="rewrites assistant message 1") as caught:
        template("rewrites earlier turns").render(messages(chat))
    assert caught.value.reason == "template_untraceable"
    assert caught.value.numbers == {"turn": 1}


def test_a_template_that_refuses_a_system_message_refuses_only_such_rows():
    made = ChatTemplate(tokenizer(), NO_SYSTEM)
    assert spoken(made, TWO) == expected("unmarked", TWO)
    with pytest.raises(SampleError, match="System role not supported") as caught:
        made.render(messages(SYSTEM))
    assert caught.value.reason == "template_untraceable"


def test_a_long_complaint_of_a_template_is_cut():
    complain = "{% if messages | length > 2 %}{{ raise_exception(messages[0]['content']) }}{% endif %}"
    made = ChatTemplate(tokenizer(), complain + TEMPLATES["unmarked"].jinja)
    with pytest.raises(SampleError) as caught:
        made.render(messages([("user", "x" * 1_000_000), *TWO]))
    assert len(caught.value.message) < 2_000


def test_a_fault_inside_a_template_is_a_refusal():
    fault = "{% if messages | length > 2 %}{{ 1 / 0 }}{% endif %}"
    made = ChatTemplate(tokenizer(), fault + TEMPLATES["marked"].jinja)
    with pytest.raises(SampleError) as caught:
        made.render(messages(SYSTEM))
    assert caught.value.reason == "template_untraceable"


@pytest.mark.parametrize(
    "broken", ["{{ messages | length }}", "{% for", "{{ nothing.at.all }}", "{{ 1 / 0 }}"]
)
def test_a_template_that_cannot_render_a_conversation_is_refused_at_once(broken):
    with pytest.raises(ConfigError, match="cannot render"):
        ChatTemplate(tokenizer(), broken)


def test_a_tokenizer_without_a_template_needs_one():
    bare = load_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template; pass chat_template="):
        ChatTemplate(bare)
    assert spoken(ChatTemplate(bare, TEMPLATES["marked"].jinja), ONE) == expected("marked", ONE)


def test_options_reach_the_template():
    made = ChatTemplate(tokenizer(), "{{ greeting }}" + TEMPLATES["unmarked"].jinja, {"greeting": "Hello "})
    assert spoken(made, ONE)[0].startswith("Hello <|im_start|>user")


def test_a_conversation_that_begins_with_the_assistant():
    chat = [("assistant", "Hi."), ("user", "Why?"), ("assistant", "So.")]
    for name in ("marked", "unmarked", "strips", "default system", "typed parts"):
        assert spoken(template(name), chat) == expected(name, chat)


def test_two_assistant_turns_in_a_row():
    chat = [("user", "Why?"), ("assistant", "So."), ("assistant", "So.")]
    for name in ("marked", "unmarked", "strips", "typed parts"):
        assert spoken(template(name), chat) == expected(name, chat)
