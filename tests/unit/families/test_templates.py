"""The families with the chat templates of published models: the token ids of the processor's own."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fakes import picture
from tests.family_models import CASES
from tests.family_processors import processor_of, processor_tokenizer
from vlmpack.stages import VQADataset

ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
)
"""Of a shape that LLaVA-OneVision's has: typed parts only, images first."""
TEMPLATES = {
    "idefics3": "idefics3",
    "smolvlm": "smolvlm",
    "qwen2_vl": "qwen2_5_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "llava": "llava_next",
    "gemma3": "gemma3",
}
"""Of each family, the template that TRL carries."""


def template_of(name: str, suffix: str) -> str:
    package = find_spec("trl")
    assert package is not None
    folder = Path(package.submodule_search_locations[0]) / "chat_templates"
    return (folder / f"{TEMPLATES[name]}{suffix}.jinja").read_text(encoding="utf-8")


def check(name: str, template: str) -> None:
    family = CASES[name].family
    processor = processor_of(family)  # first: Idefics3's adds a token to its tokenizer
    pictures = [picture(60, 40, 1), picture(30, 50, 2)]
    turns = (
        ("user", "<image>What is it? "),
        ("assistant", "A cat."),
        ("user", "And <image>\n this one?"),
        ("assistant", "A dog, <b>not</b> a cat."),
    )
    row = {"images": pictures, "messages": [{"role": role, "content": text} for role, text in turns]}
    ours = VQADataset([row], processor_tokenizer(family), family=family, chat_template=template)[0]
    images = iter(pictures)
    chat = []
    for role, text in turns:
        parts = []
        for number, words in enumerate(text.split("<image>")):
            parts += [{"type": "image", "image": next(images)}] if number else []
            parts += [{"type": "text", "text": words}] if words else []
        chat.append({"role": role, "content": parts})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the videos that nobody has
        theirs = processor.apply_chat_template(
            [chat], chat_template=template, tokenize=True, return_dict=True
        )
    assert ours.input_ids.tolist() == [int(token) for token in theirs["input_ids"][0]]
    learnt = processor_tokenizer(family).decode([token for token in ours.labels if token >= 0])
    assert "A cat." in learnt
    assert "What is it?" not in learnt
    assert family.image_token not in learnt


@pytest.mark.parametrize("suffix", ["", "_training"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_token_ids_are_the_processors_with_a_published_template(name, suffix):
    check(name, template_of(name, suffix))


def test_images_are_given_as_parts_to_a_template_that_takes_nothing_else():
    check("llava_onevision", ONEVISION)
