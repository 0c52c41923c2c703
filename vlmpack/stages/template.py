"""Template: messages -> one text, and the spans of it that an assistant wrote.

The spans come from the chat template's own generation marks where it has them. Otherwise the
template is rendered for each prefix of the conversation, as text: where each prefix continues the
one before, the last piece is the last message. Nothing is tokenised apart, so nothing can merge
differently at a boundary.
"""

from __future__ import annotations

import re
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
_PROBE_USER: Final = "qzkwv"
_PROBE_ASSISTANT: Final = "xzyvd"


class ChatTemplate:
    """A tokenizer's chat template, and how it frames an assistant turn.

    Args:
        tokenizer: Its chat template is used unless another is given.
        template: A Jinja chat template.
        options: Variables for the template, such as {"enable_thinking": False}.

    Raises:
        ConfigError: If there is no template, or it cannot render a user and an assistant turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        options: Mapping[str, object] | None = None,
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
        self._typed_parts, self._header, self._end_of_turn = self._probe()

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
            prefixes = [self._render(chat[:count]) for count in range(1, len(chat) + 1)]
        except TemplateError as error:
            raise SampleError(
                "template_untraceable", f"the chat template refuses this row: {error}"
            ) from error
        return prefixes[-1], self._spans(messages, prefixes)

    def _spans(self, messages: Sequence[Message], prefixes: list[str]) -> list[Span]:
        text, spans, cursor = prefixes[-1], [], 0
        exact = all(text.startswith(prefix) for prefix in prefixes)
        for number, message in enumerate(messages):
            end = len(prefixes[number]) if exact else len(text)
            if message.role == "assistant":
                span = self._find(text, message.content, cursor, end, exact)
                if span is None:
                    raise SampleError(
                        "template_untraceable",
                        f"the chat template rewrites assistant message {number}, so its tokens cannot be "
                        "told apart; use a template with generation marks",
                        turn=number,
                    )
                spans.append(span)
                cursor = span[1]
            elif exact:
                cursor = end
            else:  # so that nothing inside a user's words is taken for an assistant turn
                at = text.find(message.content.strip(), cursor)
                cursor = at + len(message.content.strip()) if at >= 0 else cursor
        return spans

    def _find(self, text: str, content: str, cursor: int, end: int, exact: bool) -> Span | None:
        """Return the span of an assistant turn in text[cursor:end], None if it is not to be found."""
        if exact and text.startswith(self._header, cursor):
            return cursor + len(self._header), end
        for variant in (content, content.strip()):
            at = text.find(self._header + variant, cursor, end)
            if at >= 0:
                start = at + len(self._header)
                stop = start + len(variant)
                if exact:
                    stop = end
                elif text.startswith(self._end_of_turn, stop):
                    stop += len(self._end_of_turn)
                return start, stop
        return None

    def _probe(self) -> tuple[bool, str, str]:
        """Return whether contents must be typed parts, and what stands around an assistant turn.

        Raises:
            ConfigError: If neither plain nor typed contents can be rendered.
        """
        failure = "it leaves the contents out"
        for typed_parts in (False, True):
            self._typed_parts = typed_parts
            user = self._message("user", _PROBE_USER)
            try:
                before = self._render([user])
                both = self._render([user, self._message("assistant", _PROBE_ASSISTANT)])
            except (TemplateError, TypeError, AttributeError, KeyError) as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if _PROBE_USER in before and _PROBE_ASSISTANT in both:
                common = (
                    before if both.startswith(before) else both[: both.index(_PROBE_USER) + len(_PROBE_USER)]
                )
                header, _, end_of_turn = both[len(common) :].partition(_PROBE_ASSISTANT)
                return typed_parts, header, end_of_turn
        raise ConfigError(f"the chat template cannot render a user turn and an assistant turn: {failure}")

    def _message(self, role: str, content: str) -> dict[str, object]:
        return {
            "role": role,
            "content": [{"type": "text", "text": content}] if self._typed_parts else content,
        }

    def _render(self, chat: list[dict[str, object]]) -> str:
        texts, _ = render_jinja_template([chat], chat_template=self._template, **self._variables)
        return str(texts[0])
