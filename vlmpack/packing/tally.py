"""Tally: what became of every row of a pass, counted and written down; too many refusals stop it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vlmpack.errors import ConfigError, RefusalRatioError
from vlmpack.packing.report import count_pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmpack.packing.account import Account
    from vlmpack.packing.assemble import PackedSequence
    from vlmpack.packing.ledger import Ledger
    from vlmpack.packing.lookahead import Chosen
    from vlmpack.packing.report import PackingReport
    from vlmpack.samples import Refusal, Sample

logger = logging.getLogger(__name__)

MIN_ROWS: Final[int] = 100
"""Rows that must be read before their refused share says something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusalLimit:
    """The share of rows that may be refused.

    Raises:
        ConfigError: If a ratio is not in 0..1, or the warning comes behind the error.
    """

    max_ratio: float | None = None
    """Refused / read over which a pass stops with an error; None never stops it."""
    warn_ratio: float | None = None
    """Refused / read over which a warning is logged, once."""
    min_rows: int = MIN_ROWS
    """Rows that must be read first."""

    def __post_init__(self) -> None:
        for name, ratio in (
            ("max_refusal_ratio", self.max_ratio), ("warn_refusal_ratio", self.warn_ratio)
        ):  # fmt: skip
            if ratio is not None and (isinstance(ratio, bool) or not 0 <= ratio <= 1):
                raise ConfigError(f"{name} must lie between 0 and 1, got {ratio!r}")
        if self.max_ratio is not None and self.warn_ratio is not None and self.warn_ratio > self.max_ratio:
            raise ConfigError(
                f"warn_refusal_ratio {self.warn_ratio} is over max_refusal_ratio {self.max_ratio}: the error "
                "would come before the warning"
            )

    def check(self, *reports: PackingReport) -> bool:
        """Return whether to warn. O(reasons).

        Args:
            *reports: Whose counts add up.

        Raises:
            RefusalRatioError: If too many rows are refused.
        """
        num_read = sum(report.num_read for report in reports)
        if num_read < self.min_rows or (self.max_ratio is None and self.warn_ratio is None):
            return False
        ratio = sum(report.total_refused for report in reports) / num_read
        if self.max_ratio is not None and ratio > self.max_ratio:
            raise RefusalRatioError(f"{share_refused(*reports)}; over max_refusal_ratio={self.max_ratio}")
        return self.warn_ratio is not None and ratio > self.warn_ratio


def share_refused(*reports: PackingReport) -> str:
    """Return how many rows were refused, and why, for a person.

    Args:
        *reports: Whose counts add up.
    """
    num_read = sum(report.num_read for report in reports)
    reasons: dict[str, int] = {}
    for report in reports:
        for reason, count in report.num_refused.items():
            reasons[reason] = reasons.get(reason, 0) + count
    num_refused = sum(reasons.values())
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda x: -x[1]))
    latest = [report.refusals[-1] for report in reports if report.refusals]
    told = "".join(f". Row {refusal.key} for example: {refusal.message}" for refusal in latest[:1])
    return f"{num_refused} of {num_read} rows are refused, {num_refused / num_read:.1%}: {listed}{told}"


class Tally:
    """Counts the rows and the packs of one pass in this process.

    Args:
        ledger: Shows the counts to other processes.
        read: Counts rows.
        packed: Counts packs.
        limit: The share of rows that may be refused.
        account: Takes down what became of each row; None if nobody asked.
        appends_pad: Whether a padding token is appended to each sample.
        sources: Names of the sources of a mixture, which keys begin with.
    """

    def __init__(
        self,
        ledger: Ledger,
        read: PackingReport,
        packed: PackingReport,
        *,
        limit: RefusalLimit,
        account: Account | None,
        appends_pad: bool,
        sources: Sequence[str] = (),
    ) -> None:
        self.read = read
        self.packed = packed
        self._ledger = ledger
        self._limit = limit
        self._account = account
        self._appends_pad = appends_pad
        self._sources = frozenset(sources)
        self._has_warned = False

    def count_row(self, row: int, item: Sample | Refusal, refusal: Refusal | None) -> None:
        """Count a row that was read.

        Args:
            row: Rows before it.
            item: What became of it.
            refusal: If it is refused.
        """
        self.read.num_read += 1
        self._count_source(self.read, item.key, "read")
        if refusal is not None:
            self._refuse(self.read, row, refusal)
        self._ledger.write()

    def count_pack(self, chosen: Chosen, pack: PackedSequence | None, refusals: Sequence[Refusal]) -> None:
        """Count a pack and the samples that it lost when its images were decoded.

        Args:
            chosen: Its samples.
            pack: None if none is left.
            refusals: Of those that were lost.
        """
        left = [(sample.key, row) for sample, row in zip(chosen.samples, chosen.rows, strict=True)]
        for refusal in refusals:
            at = next(at for at, (key, _) in enumerate(left) if key == refusal.key)
            self._refuse(self.packed, left.pop(at)[1], refusal)
        if pack is None:
            return
        for (key, row), cost in zip(left, pack.costs, strict=True):
            self._count_source(self.packed, key, "packed")
            self._count_source(self.packed, key, "tokens", cost.num_tokens)
            if self._account is not None:
                self._account.add(key, row, pack=self.packed.num_packs)
        count_pack(self.packed, pack, appends_pad=self._appends_pad)
        self._ledger.write()

    def close(self) -> None:
        """Finish what is written."""
        if self._account is not None:
            self._account.close()
        self._ledger.write(now=True)

    def _refuse(self, report: PackingReport, row: int, refusal: Refusal) -> None:
        report.refuse(refusal)
        self._count_source(report, refusal.key, "refused")
        if self._account is not None:
            self._account.add(refusal.key, row, reason=refusal.reason)
        if self._limit.check(self.read, self.packed) and not self._has_warned:
            self._has_warned = True
            logger.warning("%s; over warn_refusal_ratio", share_refused(self.read, self.packed))

    def _count_source(self, report: PackingReport, key: str, what: str, number: int = 1) -> None:
        if self._sources:
            source = key.partition("/")[0]
            if source in self._sources:
                report.by_source[f"{source}/{what}"] += number
