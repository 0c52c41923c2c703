"""Stretch: where packing began anew in a stream, in memory and as plain values."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Where a stretch begins, and all that its packs follow from, apart from the rows themselves."""

    number: int
    """Stretches before it."""
    epoch: int
    """The pass over the data in which `first_row` is read."""
    source: Any = field(repr=False)
    """The source's own state before `first_row`; None if it keeps no place."""
    first_row: int
    """Rows before the first that must be read again."""
    row: int
    """Rows that were read when the stretch began."""
    carried: tuple[int, ...] = field(repr=False)
    """Rows that waited then, ascending, from `first_row` on."""
    counts: dict[str, Any] = field(repr=False)
    """What had been counted of rows by then."""


class StretchState(TypedDict):
    """A `Stretch` as plain values, fit for JSON."""

    number: int
    epoch: int
    source: Any
    rows: list[int]
    carried: str
    counts: dict[str, Any]


def stretch_state(stretch: Stretch) -> StretchState:
    """Return the stretch as plain values. O(rows between the oldest carried one and its beginning).

    Args:
        stretch: Any.
    """
    waited = np.zeros(stretch.row - stretch.first_row, np.uint8)
    waited[np.array(stretch.carried, np.int64) - stretch.first_row] = 1
    packed = zlib.compress(np.packbits(waited).tobytes(), 9) if stretch.carried else b""
    return StretchState(
        number=stretch.number,
        epoch=stretch.epoch,
        source=stretch.source,
        rows=[stretch.first_row, stretch.row],
        carried=base64.b85encode(packed).decode(),
        counts=stretch.counts,
    )


def stretch_of(state: StretchState) -> Stretch:
    """Return the stretch that `stretch_state` described.

    Args:
        state: Plain values.
    """
    first_row, row = state["rows"]
    carried: tuple[int, ...] = ()
    if state["carried"]:
        packed = np.frombuffer(zlib.decompress(base64.b85decode(state["carried"])), np.uint8)
        carried = tuple((np.flatnonzero(np.unpackbits(packed)) + first_row).tolist())
    return Stretch(
        number=state["number"],
        epoch=state["epoch"],
        source=state["source"],
        first_row=first_row,
        row=row,
        carried=carried,
        counts=dict(state["counts"]),
    )
