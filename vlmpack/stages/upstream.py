"""Upstream: what a streaming data set can say of where it stands, and how it is put back there.

    Hugging Face stream        its own state_dict: exact, except behind a shuffle buffer, which is refused
    anything with state_dict   its own state_dict
    any other iterable         nothing: rows that were read are read again and thrown away

Hugging Face's streams have two traps, both avoided by opening a copy for each pass: a position of epoch 3
is ignored without a word unless the stream was told of epoch 3 first, and a stream that was put at a
position begins there again in every later pass.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

UpstreamState: TypeAlias = "dict[str, Any] | None"
"""What the data set says of where it stands; None if it cannot."""


class Upstream:
    """One pass at a time over a streaming data set.

    Args:
        dataset: An iterable.
        is_hugging_face: Whether it is a Hugging Face `IterableDataset`.
    """

    def __init__(self, dataset: Any, *, is_hugging_face: bool) -> None:
        self._dataset = dataset
        self._is_hugging_face = is_hugging_face
        self._keeps_place = _has(dataset, "state_dict") and _has(dataset, "load_state_dict")
        self._open: Any = None
        self.fault = _shuffle_fault(dataset) if is_hugging_face else ""
        """Why a position in it would not be exact; empty if it is."""

    def rows(self, *, epoch: int, num_read: int = 0, state: UpstreamState = None) -> Iterator[object]:
        """Return the rows of a pass, or the rest of them.

        Args:
            epoch: The pass, from 0; told to the data set if it wants to know.
            num_read: Rows before the first that is returned.
            state: What the data set said of itself there.
        """
        self._open = self._copy(epoch) if self._is_hugging_face else self._dataset
        if not self._is_hugging_face and _has(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
        if not num_read:
            return iter(self._open)
        if state is None:
            return islice(iter(self._open), num_read, None)
        self._open.load_state_dict(state)
        return iter(self._open)

    def state(self) -> UpstreamState:
        """Return what the data set says of where it stands, behind the row that it gave last.

        Raises:
            ConfigError: If that would not be exact.
        """
        if self.fault:
            raise ConfigError(self.fault)
        if not self._keeps_place or self._open is None:
            return None
        try:
            return dict(self._open.state_dict())
        except NotImplementedError as error:
            raise ConfigError(f"the data set cannot say where it stands: {error!s:.300}") from error

    def _copy(self, epoch: int) -> Any:
        """Return another stream over the same data, which knows its epoch and no position."""
        # copy.copy would share the instance's dictionary, which its __getstate__ returns as it is.
        twin = object.__new__(type(self._dataset))
        twin.__dict__.update(self._dataset.__dict__)
        if hasattr(twin, "_epoch"):  # a tensor that all workers share, which may be at different passes
            twin._epoch = self._dataset.epoch
            twin._starting_state_dict = None
        twin.set_epoch(epoch)
        return twin


def _has(dataset: object, method: str) -> bool:
    return callable(getattr(dataset, method, None))


def _shuffle_fault(dataset: Any) -> str:
    """Return what is wrong if rows wait in a shuffle buffer of the stream, which no state holds."""
    waiting = [getattr(dataset, "_ex_iterable", None)]
    while waiting:
        stage = waiting.pop()
        if stage is None:
            continue
        size = getattr(stage, "buffer_size", 1)
        if "Shuffle" in type(stage).__name__ and isinstance(size, int) and size > 1:
            return (
                f"the data set is shuffled by .shuffle(buffer_size={size}), where a position is not exact: "
                "its state leaves out the rows in the buffer, which would be lost or come twice. Shuffle "
                f"with VQADataset(..., shuffle_seed=0, shuffle_window={size}) instead, which is exact; "
                ".shuffle(buffer_size=1) of the shards' order may stay"
            )
        waiting.append(getattr(stage, "ex_iterable", None))
        waiting.extend(getattr(stage, "ex_iterables", None) or ())
    return ""
