"""The errors that users meet, and the reasons for which a sample can be refused."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

RefusalReason: TypeAlias = Literal[
    "bad_row",  # a column is missing or has the wrong type
    "source_error",  # the data set raised while it made this row
    "no_text",  # no turn at all
    "empty_turn",  # an assistant turn without content
    "ratings",  # every turn is rated below the asked minimum
    "marker_mismatch",  # image markers in the text and images differ in number
    "template_untraceable",  # the chat template hides where an assistant turn lies
    "no_supervised_token",  # every label would be masked: the sample would teach nothing
    "image_missing",  # None where an image should be
    "image_empty",  # zero bytes
    "image_unreadable",  # no known format, or a broken header
    "image_truncated",  # the header is fine, the body is not
    "image_too_large",  # more pixels than the decompression-bomb limit
    "image_shape",  # sides that the model family cannot take
    "image_outside_root",  # a path from the data leaves the folder that it may read
    "sample_too_long",  # at or over max_sample_length tokens
    "too_many_images",  # over max_images_per_example images
    "over_budget",  # alone over a pack budget
    "row_changed",  # not what it was when it was indexed
]

REASONS: Final[tuple[RefusalReason, ...]] = get_args(RefusalReason)


class VlmpackError(Exception):
    """Base class of every error that vlmpack raises on purpose."""


class ConfigError(VlmpackError, ValueError):
    """A setting is wrong or two settings contradict each other."""


class SourceError(VlmpackError, RuntimeError):
    """The data set itself raised and cannot go on."""


class EmptySourceError(SourceError):
    """The data set, or this worker's or rank's part of it, has no row."""


class RefusalRatioError(SourceError):
    """More rows are refused than the user allows."""


class StorageError(VlmpackError, OSError):
    """Something cannot be written: the disk is full, or a folder does not allow it."""


def why_unwritten(error: OSError, what: str) -> str:
    """Return the message of a `StorageError`.

    Args:
        error: What the system said.
        what: Should have been written.
    """
    reason = error.strerror or str(error)
    return f"{what} cannot be written: {reason}. Make room, or choose another place, and run again"


class BudgetError(VlmpackError, ValueError):
    """A pack or a batch is over its budget."""


class SampleError(VlmpackError):
    """One sample cannot be used; stages turn it into a counted refusal.

    Args:
        reason: The kind of fault, one of `REASONS`.
        message: What is wrong, with the numbers, the limit and the remedy.
        **numbers: The same numbers for machines.
    """

    def __init__(self, reason: RefusalReason, message: str, /, **numbers: float | str) -> None:
        super().__init__(message)
        self.reason: RefusalReason = reason
        self.message = message
        self.numbers = numbers

    def __reduce__(self) -> tuple[object, ...]:
        # An exception that cannot be pickled hangs a process pool.
        return _rebuild, (self.reason, self.message, self.numbers)


def _rebuild(reason: RefusalReason, message: str, numbers: dict[str, float | str]) -> SampleError:
    return SampleError(reason, message, **numbers)


class OversizeError(BudgetError):
    """A sample is too large and the policy says to raise instead of refusing it."""
