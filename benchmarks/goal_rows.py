"""A line of a table of goals."""

from __future__ import annotations

from typing import TypedDict


class Row(TypedDict):
    """A goal and what was measured; without a goal it is what the row above is compared to."""

    goal: str
    what: str
    target: str
    measured: str
    met: bool


def row(goal: str, what: str, target: str, measured: str, met: bool) -> Row:
    return Row(goal=goal, what=what, target=target, measured=measured, met=bool(met))
