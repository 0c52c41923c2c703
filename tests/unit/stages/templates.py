"""Chat templates of the kinds that are around, each with what it writes, said a second time in Python.

A writer returns (text, whether the assistant wrote it) pieces; it knows nothing of Jinja, spans or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vlmpack.corpus import CHATML

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Pieces = list[tuple[str, bool]]
    Chat = Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template and its writer."""

    jinja: str
    write: Callable[[Chat], Pieces]


def _chatml(chat: Chat) -> Pieces:
    pieces = []
    for role, content in chat:
        pieces += [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>\n", role == "assistant")]
    return pieces


def _stripping(chat: Chat) -> Pieces:
    return _chatml([(role, content.strip()) for role, content in chat])


def _with_default_system(chat: Chat) -> Pieces:
    if chat[0][0] != "system":
        chat = [("system", "You are helpful."), *chat]
    return _chatml(chat)


def _typed(chat: Chat) -> Pieces:
    pieces: Pieces = [("<|im_start|>", False)]
    for role, content in chat:
        # What follows "Assistant:" is what the model has to say, so the space is the assistant's.
        pieces += [(f"{role.capitalize()}:", False), (f" {content}<|im_end|>\n", role == "assistant")]
    return pieces


def _thinking(chat: Chat) -> Pieces:
    """Qwen3's way: thoughts are cut out of all turns but the last, which gets an empty one."""
    pieces: Pieces = []
    for number, (role, content) in enumerate(chat):
        if role != "assistant":
            pieces += _chatml([(role, content)])
            continue
        thought = "<think>\n\n</think>\n\n" if number == len(chat) - 1 else ""
        pieces += [(f"<|im_start|>assistant\n{thought}", False), (f"{content}<|im_end|>\n", True)]
    return pieces


def _with_bos(chat: Chat) -> Pieces:
    pieces: Pieces = [("<｜begin▁of▁sentence｜>", False)]
    for role, content in chat:
        if role == "assistant":
            pieces.append((f"{content}<｜end▁of▁sentence｜>", True))
        else:
            pieces.append((f"[INST]{content}[/INST]", False))
    return pieces


_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_ALL = "{% for m in messages %}" + _TURN + "{% endfor %}"

TEMPLATES: Final[dict[str, Template]] = {
    "marked": Template(jinja=CHATML, write=_chatml),
    "unmarked": Template(jinja=_ALL, write=_chatml),
    "strips": Template(jinja=_ALL.replace("m['content']", "m['content'] | trim"), write=_stripping),
    "default system": Template(
        jinja="{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + _ALL,
        write=_with_default_system,
    ),
    "typed parts": Template(
        jinja="<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
        "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
        "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        write=_typed,
    ),
    "rewrites earlier turns": Template(
        jinja="{% for m in messages %}{% if m['role'] != 'assistant' %}" + _TURN + "{% elif loop.last %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m['content'] + '<|im_end|>\n' }}{% else %}"
        "{{ '<|im_start|>assistant\n' + m['content'].split('</think>')[-1] + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}",
        write=_thinking,
    ),
    "needs a user": Template(
        jinja="{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
        "{{ raise_exception('no user query') }}{% endif %}" + _ALL,
        write=_chatml,
    ),
    "no header": Template(
        jinja="{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ m['content'] + eos_token }}{% else %}{{ '[INST]' + m['content'] + '[/INST]' }}"
        "{% endif %}{% endfor %}",
        write=_with_bos,
    ),
}  # fmt: skip
"""By what is special about them."""

NO_SYSTEM: Final = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + _ALL
)
"""As Gemma's: refuses a system message."""
