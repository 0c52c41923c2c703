"""A block's program as a list of moves: what it allocates and frees, in order, forward and backward.

The tape writes it while it runs; `replay` sends the moves of a whole step through the allocator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vlmpack.memory.tape import Bytes, Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Moves of one block. A move is a storage's number: n allocates it, ~n frees it."""

    sizes: tuple[Bytes, ...]
    """Bytes of each storage."""
    forward: tuple[int, ...]
    """Up to the block's output."""
    after: tuple[int, ...]
    """What is let go when the block has returned."""
    backward: tuple[int, ...]
    """From the incoming gradient on, which is the first move; empty where nothing is tracked."""
    input: int | None
    """The block's input; None where it comes from outside and is counted there."""
    output: int
    """Its output."""
    copies: frozenset[int]
    """Autocast's copies of weights."""
    cached: frozenset[int]
    """Those of them that autocast holds to the end of the forward pass."""
    input_gradient: int | None
    """What backward hands to the block before."""
    weight_gradients: tuple[int, ...]
    """What backward leaves for the optimizer."""


class Recorder:
    """Writes moves down while a tape runs."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._storages: list[Storage] = []  # held, so that no two of them have one identity
        self._moves: list[int] = []
        self._copies: list[Storage] = []

    @property
    def length(self) -> int:
        """Moves so far."""
        return len(self._moves)

    def allocates(self, storage: Storage) -> None:
        """Note that a storage begins."""
        self._numbers[id(storage)] = len(self._storages)
        self._moves.append(len(self._storages))
        self._storages.append(storage)

    def frees(self, storage: Storage) -> None:
        """Note that it ends; one that came from outside is left out."""
        number = self._numbers.get(id(storage))
        if number is not None:
            self._moves.append(~number)

    def copies(self, storage: Storage) -> None:
        """Note that it is autocast's copy of a weight."""
        self._copies.append(storage)

    def program(
        self,
        *,
        returned: int,
        turned: int,
        source: Storage,
        output: Storage,
        cached: Sequence[Storage],
        gradient: Storage | None,
    ) -> Program:
        """Return the program of a block whose forward pass and backward pass are done.

        Args:
            returned: Moves up to the block's output.
            turned: Moves up to the backward pass.
            source: The block's input.
            output: Its output.
            cached: Copies of weights that autocast holds.
            gradient: What backward hands to the block before.
        """
        backward = self._moves[turned:]
        left = {n for n in backward if n >= 0} - {~n for n in backward if n < 0}
        handed = self._number(gradient) if gradient is not None else None
        return Program(
            sizes=tuple(storage.size for storage in self._storages),
            forward=tuple(self._moves[:returned]),
            after=tuple(self._moves[returned:turned]),
            backward=tuple(backward),
            input=self._number(source),
            output=self._numbers[id(output)],
            copies=self._all(self._copies),
            cached=self._all(cached),
            input_gradient=handed,
            weight_gradients=tuple(sorted(left - {handed})),
        )

    def _number(self, storage: Storage) -> int | None:
        return self._numbers.get(id(storage))

    def _all(self, storages: Iterable[Storage]) -> frozenset[int]:
        return frozenset(self._numbers[id(storage)] for storage in storages)
