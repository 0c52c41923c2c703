"""Hope: when a pass without end must stop, because whole readings of the data give nothing any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmpack.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmpack.samples import Refusal


class Hope:
    """Stops a pass without end in which whole readings of the data give nothing any more.

    Args:
        lookahead: Samples that may wait for a pack.
    """

    def __init__(self, lookahead: int) -> None:
        self._lookahead = lookahead
        self._keys: set[str] = set()
        self._num_lost = 0

    def lose(self, refusals: Sequence[Refusal], num_admitted: int | None) -> None:
        """Count samples whose images cannot be decoded, since the latest pack.

        Args:
            refusals: Theirs.
            num_admitted: Samples in a whole reading of the data, None before there was one.

        Raises:
            SourceError: If these are all samples that there are.
        """
        self._keys.update(refusal.key for refusal in refusals)
        self._num_lost += len(refusals)
        # Where keys repeat there are never enough of them; then the number decides.
        if num_admitted is None or (
            len(self._keys) < num_admitted and self._num_lost < 2 * (num_admitted + self._lookahead)
        ):
            return
        raise SourceError(
            f"no image of any sample can be decoded any more, {self._num_lost} samples in a row; the latest "
            f"is row {refusals[-1].key} ({refusals[-1].reason}): {refusals[-1].message}"
        )
