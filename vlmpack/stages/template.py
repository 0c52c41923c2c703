"""Template: messages -> one text, and the spans of it that an assistant wrote.

The spans come from the chat template's own generation marks where it has them. Otherwise the
template is rendered for each prefix of the conversation, as text: where each prefix continues the
one before, the last piece is the last message. Nothing is tokenised apart, so nothing can merge
differently at a boundary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from vlmpack.errors import ConfigError, SampleError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from vlmpack.samples import Message

Span: TypeAlias = tuple[int, int]
"""[start, stop) in characters of the rendered text."""

_GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: Final = ("qzkwv", "xzyvd", "wkqvz", "vdzxy")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """What a template writes around an assistant turn."""

    header: str
    end: str


class ChatTemplate:
    """A tokenizer's chat template, and how it frames an assistant turn.

    Args:
        tokenizer: Its chat template is used unless another is given.
        template: A Jinja chat template.
        options: Variables for the template, such as {"enable_thinking": False}.
        image: What stands for an image in a message, and the token that a template of the model's own makes
            of an image part. A template that knows image parts is then given images as such, since it may
            trim or space the text around them; another finds what stands for them in its text.

    Raises:
        ConfigError: If there is no template, or it cannot render a user and an assistant turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        options: Mapping[str, object] | None = None,
        image: tuple[str, str] | None = None,
    ) -> None:
        if template is None and not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template; pass chat_template=, for example the one of the model "
                "that you train"
            )
        self._template: str = template if template is not None else tokenizer.get_chat_template()
        self._variables: dict[str, Any] = {**tokenizer.special_tokens_map, **(options or {})}
        self.has_generation_marks = bool(_GENERATION.search(self._template))
        """Whether the template itself says what the assistant wrote."""
        self._typed_parts = False
        self._image: str | None = None  # what becomes an image part
        self._last = self._probe_last()
        self._earlier = self._probe_earlier()
        if image is not None and self._shows_images(image[1]):
            self._image = image[0]

    def render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Return the text and the spans that an assistant wrote, its end-of-turn mark included.

        Args:
            messages: At least one.

        Raises:
            SampleError: If the template refuses the conversation or rewrites an assistant turn beyond
                recognition.
        """
        chat = [self._message(message.role, message.content) for message in messages]
        try:
            if self.has_generation_marks:
                texts, spans = render_jinja_template(
                    [chat], chat_template=self._template, return_assistant_tokens_mask=True, **self._variables
                )
                return texts[0], [(start, stop) for start, stop in spans[0]]
            text = self._render(chat)
        except Exception as error:  # a template is a program, and may fail like one
            fault = f"the chat template refuses this row: {type(error).__name__}: {error!s:.500}"
            raise SampleError("template_untraceable", fault) from error
        prefixes = [self._prefix(chat[:count]) for count in range(1, len(chat))]
        return text, self._spans(messages, text, [*prefixes, text])

    def _prefix(self, chat: list[dict[str, object]]) -> str | None:
        """Return the beginning of a conversation, None if the template takes whole ones only."""
        try:
            return self._render(chat)
        except TemplateError:  # such as "no user message" for a system message alone
            return None

    def _spans(self, messages: Sequence[Message], text: str, prefixes: list[str | None]) -> list[Span]:
        exact = all(prefix is None or text.startswith(prefix) for prefix in prefixes)
        spans, cursor = [], 0
        for number, (message, prefix) in enumerate(zip(messages, prefixes, strict=True)):
            end = len(prefix) if exact and prefix is not None else None
            if message.role == "assistant":
                frame = self._last if number == len(messages) - 1 else self._earlier
                span = _find(text, message.content, frame, cursor, end)
                if span is None:
                    raise SampleError(
                        "template_untraceable",
                        f"the chat template rewrites assistant message {number}, so its tokens cannot be "
                        "told apart; use a template with generation marks",
                        turn=number,
                    )
                spans.append(span)
                cursor = span[1]
            elif end is not None:
                cursor = end
            else:  # so that nothing inside a user's words is taken for an assistant turn
                at = text.find(message.content.strip(), cursor)
                cursor = at + len(message.content.strip()) if at >= 0 else cursor
        return spans

    def _probe_last(self) -> _Frame:
        """Return what stands around a last assistant turn; finds out whether contents must be typed parts.

        Raises:
            ConfigError: If neither plain nor typed contents can be rendered.
        """
        user, assistant = _PROBE[:2]
        failure = "it leaves the contents out"
        for self._typed_parts in (False, True):
            try:
                before = self._render([self._message("user", user)])
                both = self._render([self._message("user", user), self._message("assistant", assistant)])
            except Exception as error:  # a template is a program, and may fail like one
                failure = f"{type(error).__name__}: {error}"
                continue
            if user in before and assistant in both:
                start = len(before) if both.startswith(before) else both.index(user) + len(user)
                header, _, end = both[start:].partition(assistant)
                return _Frame(header=header, end=end)
        raise ConfigError(f"the chat template cannot render a user turn and an assistant turn: {failure}")

    def _probe_earlier(self) -> _Frame:
        """Return what stands around an assistant turn that is not the last; some templates differ there."""
        roles = ("user", "assistant", "user", "assistant")
        chat = [self._message(role, content) for role, content in zip(roles, _PROBE, strict=True)]
        try:
            before, text = self._render(chat[:1]), self._render(chat)
        except Exception:  # a template of one turn only; it says so again when a row has more
            return self._last
        first_user, first_assistant, second_user = (text.find(content) for content in _PROBE[:3])
        if min(first_user, first_assistant, second_user) < 0:
            return self._last
        header_start = len(before) if text.startswith(before) else first_user + len(_PROBE[0])
        between = text[first_assistant + len(_PROBE[1]) : second_user]
        if between.startswith(self._last.end):
            end = self._last.end
        else:  # what is left when the header of a user turn is taken away
            end = between[: len(between) - _common_suffix(between, before[: before.find(_PROBE[0])])]
        return _Frame(header=text[header_start:first_assistant], end=end)

    def _shows_images(self, token: str) -> bool:
        """Return whether an image part becomes one image token."""
        user, assistant = _PROBE[:2]
        parts = [{"type": "image"}, {"type": "text", "text": user}]
        try:
            text = self._render([{"role": "user", "content": parts}, self._message("assistant", assistant)])
        except Exception:  # a template is a program, and may fail like one
            return False
        return text.count(token) == 1 and user in text

    def _message(self, role: str, content: str) -> dict[str, object]:
        if self._image is None or self._image not in content:
            return {
                "role": role,
                "content": [{"type": "text", "text": content}] if self._typed_parts else content,
            }
        parts: list[dict[str, str]] = []
        for number, text in enumerate(content.split(self._image)):
            parts += [{"type": "image"}] * (number > 0)
            parts += [{"type": "text", "text": text}] * bool(text)
        return {"role": role, "content": parts}

    def _render(self, chat: list[dict[str, object]]) -> str:
        texts, _ = render_jinja_template([chat], chat_template=self._template, **self._variables)
        return str(texts[0])


def _find(text: str, content: str, frame: _Frame, cursor: int, end: int | None) -> Span | None:
    """Return the span of an assistant turn behind `cursor`, None if it is not to be found.

    Args:
        text: The whole conversation.
        content: The turn.
        frame: What stands around it.
        cursor: Where the message before it ends, or earlier.
        end: Where it ends, if that is known.
    """
    # What follows "Assistant:" is the model's to say, the space before its first word too: tokenizers
    # make one token of the two.
    spaces = len(frame.header) - len(frame.header.rstrip(" "))
    if end is not None and text.startswith(frame.header, cursor):
        return cursor + len(frame.header) - spaces, end
    for variant in (content, content.strip()):
        at = text.find(frame.header + variant, cursor, end)
        if at >= 0:
            start = at + len(frame.header)
            stop = start + len(variant)
            if text.startswith(frame.end, stop):
                stop += len(frame.end)
            return start - spaces, stop if end is None else end
    return None


def _common_suffix(first: str, second: str) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return length
