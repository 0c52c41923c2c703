"""Rows: a raw row, whatever its columns are called -> `Row`.

Three column layouts are understood:

* `texts`: [{"user": ..., "assistant": ...}, ...], as the Cauldron and FineVision have it;
* `messages`: [{"role": ..., "content": str or typed parts}, ...], as TRL and chat APIs have it;
* `conversations`: [{"from": "human" | "gpt", "value": ...}, ...], as LLaVA has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from vlmpack.errors import ConfigError, SampleError
from vlmpack.images import MAX_PIXELS, read_header
from vlmpack.samples import ImageRef, ImageSource, Message, Row

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.stages.source import RawRow

_ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


_MAX_PATH: Final = 4096
"""Longer paths cannot be opened on any system; they are something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RatingMinima:
    """Least rating of a turn, for data sets that rate turns (FineVision); None is never below."""

    relevance: int = 1
    """Column `relevance_ratings`."""
    image_correspondence: int = 1
    """Column `image_correspondence_ratings`."""
    visual_dependency: int = 1
    """Column `visual_dependency_ratings`."""
    formatting: int = 1
    """Column `formatting_ratings`."""

    def keeps(self, raw: RawRow, turn: int) -> bool:
        """Return whether no rating of this turn is below its minimum; a missing rating keeps it."""
        for column, least in (
            ("relevance_ratings", self.relevance),
            ("image_correspondence_ratings", self.image_correspondence),
            ("visual_dependency_ratings", self.visual_dependency),
            ("formatting_ratings", self.formatting),
        ):
            ratings = raw.get(column)
            if not isinstance(ratings, Sequence | np.ndarray) or turn >= len(ratings):
                continue
            rating = ratings[turn]
            if isinstance(rating, Real) and rating < least:
                return False
        return True


class RowParser:
    """Turns raw rows into `Row`s; reads image headers, never pixels.

    Args:
        image_marker: The text that stands for an image, `<image>` in most data sets; None if texts have
            none and all images belong before the first turn.
        image_root: The folder that image paths in the data may lead into; without it a row that names
            an image by path is refused.
        ratings: Least ratings of a turn.
        max_pixels: Images with more pixels are refused from their header.

    Raises:
        ConfigError: If the image marker is empty.
    """

    def __init__(
        self,
        *,
        image_marker: str | None = "<image>",
        image_root: str | Path | None = None,
        ratings: RatingMinima | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if image_marker is not None and not image_marker:  # it would stand between any two letters
            raise ConfigError("image_marker must not be empty; pass None if texts have no marker")
        self.image_marker = image_marker
        self._root = None if image_root is None else Path(image_root).resolve()
        self._ratings = ratings or RatingMinima()
        self._max_pixels = max_pixels

    def __call__(self, key: str, raw: object) -> Row:
        """Return the row.

        Args:
            key: Names the row.
            raw: A mapping with images and one of the three text layouts.

        Raises:
            SampleError: With the reason for which the row must be refused.
        """
        if not isinstance(raw, Mapping):
            raise SampleError("bad_row", f"a row must be a mapping of columns, got {type(raw).__name__}")
        messages = self._messages(raw)
        images = tuple(self._image(number, image) for number, image in enumerate(_images(raw)))
        self._check_markers(messages, len(images))
        return Row(key=key, messages=messages, images=images)

    def _messages(self, raw: RawRow) -> tuple[Message, ...]:
        layouts: dict[str, Callable[[RawRow, Sequence[object]], list[Message]]] = {
            "texts": self._from_texts,
            "messages": self._from_messages,
            "conversations": self._from_conversations,
        }
        column = next((name for name in layouts if raw.get(name) is not None), None)
        if column is None:
            raise SampleError(
                "no_text" if layouts.keys() & raw.keys() else "bad_row",
                "a row needs a column texts, messages or conversations that is not None; this one has "
                f"{', '.join(map(repr, raw)) or 'no column':.500}",
            )
        turns = raw[column]
        if isinstance(turns, str) or not isinstance(turns, Sequence):
            raise SampleError(
                "bad_row", f"column {column} must be a list of turns, got {type(turns).__name__}"
            )
        if not turns:
            raise SampleError("no_text", f"column {column} is an empty list: there is nothing to learn")
        messages = layouts[column](raw, turns)
        if not messages:
            raise SampleError("ratings", f"all {len(turns)} turns are rated below the asked minimum")
        for number, message in enumerate(messages):
            if message.role == "assistant" and not message.content.strip():
                raise SampleError("empty_turn", f"message {number}, an assistant turn, has no content")
        return tuple(messages)

    def _from_texts(self, raw: RawRow, turns: Sequence[object]) -> list[Message]:
        messages = []
        for number, turn in enumerate(turns):
            if not isinstance(turn, Mapping):
                raise SampleError("bad_row", f"turn {number} must be a mapping, got {type(turn).__name__}")
            if self._ratings.keeps(raw, number):
                for role in ("user", "assistant"):
                    messages.append(
                        Message(role=role, content=_text(turn.get(role), f"{role} turn {number}"))
                    )
        return messages

    def _from_messages(self, _raw: RawRow, turns: Sequence[object]) -> list[Message]:
        return [
            Message(role=_role(turn, "role", number), content=self._content(turn, number))
            for number, turn in enumerate(turns)
        ]

    def _from_conversations(self, _raw: RawRow, turns: Sequence[object]) -> list[Message]:
        return [
            Message(
                role=_role(turn, "from", number),
                content=_text(turn.get("value") if isinstance(turn, Mapping) else None, f"turn {number}"),
            )
            for number, turn in enumerate(turns)
        ]

    def _content(self, turn: object, number: int) -> str:
        """Return a message's text; typed parts are joined, images become markers.

        Raises:
            SampleError: If a part is neither text nor an image.
        """
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if isinstance(content, str) or not isinstance(content, Sequence):
            return _text(content, f"message {number}")
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if not isinstance(kind, str):  # comparing an array would give an array
                raise SampleError("bad_row", f"message {number} has a part of unknown type {kind!r:.100}")
            if kind == "text":
                parts.append(_text(part.get("text"), f"message {number}"))
            elif kind == "image" and self.image_marker is not None:
                parts.append(self.image_marker)
            else:
                raise SampleError("bad_row", f"message {number} has a part of unknown type {kind!r:.100}")
        return "".join(parts)

    def _check_markers(self, messages: tuple[Message, ...], num_images: int) -> None:
        if self.image_marker is None:
            return
        num_markers = sum(message.content.count(self.image_marker) for message in messages)
        if num_markers not in {0, num_images}:
            raise SampleError(
                "marker_mismatch",
                f"the text has {num_markers} markers {self.image_marker!r} but the row has {num_images} "
                "images; make them equal, or use no marker to put all images first",
                num_markers=num_markers,
                num_images=num_images,
            )

    def _image(self, number: int, image: object) -> ImageRef:
        source = self._image_source(number, image)
        try:
            header = read_header(source, max_pixels=self._max_pixels)
        except SampleError as error:
            raise SampleError(
                error.reason, f"image {number}: {error.message}", image=number, **error.numbers
            ) from error
        return ImageRef(source=source, height=header.height, width=header.width, mode=header.mode)

    def _image_source(self, number: int, image: object) -> ImageSource:
        if isinstance(image, Mapping):
            image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if image is None:
            fault = f"image {number} is None, or has neither bytes nor a path"
            raise SampleError("image_missing", fault, image=number)
        if isinstance(image, Image.Image | bytes):
            return image
        if isinstance(image, str | Path):
            return self._inside_root(number, image)
        if isinstance(image, np.ndarray) and _is_picture(image):
            return Image.fromarray(image)
        raise SampleError(
            "bad_row",
            f"image {number} must be a PIL image, bytes, a path, a mapping with bytes or path, or a uint8 "
            f"array [H, W], [H, W, 3] or [H, W, 4], got {_kind(image)}",
            image=number,
        )

    def _inside_root(self, number: int, path: str | Path) -> Path:
        if len(str(path)) > _MAX_PATH:
            raise SampleError(
                "image_unreadable",
                f"image {number} is a path of {len(str(path)):,} characters, {_brief(path)}; if it is a "
                "picture in base64, decode it to bytes",
                image=number,
            )
        if self._root is None:
            raise SampleError(
                "image_outside_root",
                f"image {number} is the path {_brief(path)}; pass image_root= to say which folder may be "
                "read",
                image=number,
                path=_brief(path),
            )
        try:
            resolved = (self._root / path).resolve()
        except (OSError, ValueError) as error:  # a null byte, a loop of links
            raise SampleError(
                "image_unreadable", f"image {number} has a path that cannot be resolved: {error!s:.300}"
            ) from error
        if not resolved.is_relative_to(self._root):
            raise SampleError(
                "image_outside_root",
                f"image {number} is the path {_brief(path)}, which leads out of {self._root}",
                image=number,
                path=_brief(path),
            )
        return resolved


def _images(raw: RawRow) -> Sequence[object]:
    """Return the row's images as a sequence; a single image counts as one, None as none."""
    images = raw.get("images")
    if images is None:
        images = raw.get("image")
    if images is None:
        return ()
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return images
    return (images,)


def _is_picture(array: npt.NDArray[np.generic]) -> bool:
    shape = array.shape
    grey_or_colour = len(shape) == 2 or (len(shape) == 3 and shape[2] in {3, 4})
    return array.dtype == np.uint8 and array.size > 0 and grey_or_colour


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _brief(path: str | Path) -> str:
    """Return the path in quotes, cut: whole pictures have been found where a path should be."""
    return f"{str(path)!r:.200}"


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise SampleError("bad_row", f"{where} must be text, got {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            fault = f"{where} holds half a character at {error.start}, which no tokenizer takes"
            raise SampleError("bad_row", f"{fault}: {error.reason}") from error
    return value


def _role(turn: object, column: str, number: int) -> str:
    role = turn.get(column) if isinstance(turn, Mapping) else None
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError(
            "bad_row", f"message {number} has the role {role!r:.100}; known are {', '.join(sorted(_ROLES))}"
        )
    return _ROLES[role]
