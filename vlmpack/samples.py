"""The records that stages hand on: Row -> Sample, or Refusal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

    from vlmpack.budget import SampleCost
    from vlmpack.errors import RefusalReason, SampleError
    from vlmpack.geometry import ImageGeometry


class OnDisk(Protocol):
    """Bytes that wait on disk until they are needed."""

    def read_bytes(self) -> bytes:
        """Return them."""
        ...


ImageSource: TypeAlias = "bytes | Path | Image | OnDisk"
"""Compressed bytes, a file, a picture that somebody decoded before us, or bytes that wait on disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """An image that is not decoded yet: where its bytes are, and what its header says."""

    source: ImageSource = field(repr=False)
    """What the decoder reads."""
    height: int
    """Pixels, upright: after the EXIF orientation is applied."""
    width: int
    """Pixels, upright: after the EXIF orientation is applied."""
    mode: str
    """Pillow's name of the stored mode, for reports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str
    """The text; an image marker stands where an image belongs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of the data set in one form, whatever its columns were called."""

    key: str
    """Names the row in every report and error."""
    messages: tuple[Message, ...]
    """The conversation, at least one message."""
    images: tuple[ImageRef, ...]
    """In the order in which the conversation takes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One conversation, tokenised, with images known by size only."""

    key: str
    """Names the row in every report and error."""
    input_ids: npt.NDArray[np.int64] = field(repr=False)
    """[T] token ids, image tokens expanded."""
    labels: npt.NDArray[np.int64] = field(repr=False)
    """[T] the token itself where it is supervised, else -100; not shifted."""
    images: tuple[ImageRef, ...] = field(repr=False)
    """The images to decode when the sample is chosen for a pack."""
    geometries: tuple[ImageGeometry, ...] = field(repr=False)
    """How each image is cut."""
    image_starts: tuple[int, ...] = field(repr=False)
    """Position in `input_ids` at which each image's tokens begin."""
    cost: SampleCost
    """What it uses of a pack's budgets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """One row that does not reach a pack, and why."""

    key: str
    """Names the row."""
    reason: RefusalReason
    """The kind of fault, for counting."""
    message: str
    """The whole story, with the remedy, for people."""
    numbers: Mapping[str, float | str] = field(default_factory=dict)
    """The figures in it, for machines."""

    @classmethod
    def of(cls, key: str, error: SampleError) -> Refusal:
        """Return the refusal of row `key` for this error."""
        return cls(key=key, reason=error.reason, message=error.message, numbers=dict(error.numbers))
