"""Index mode: one cheap pass over all rows, one global plan, packs by number.

Where a data set has a length this is the better way: the plan sees every sample, divides evenly over
any number of ranks and workers, and where a run stands is one integer (see `vlmpack.ranks`). The pass
reads image headers and tokenises, about 0.35 ms a row; no pixel is decoded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from vlmpack.budget import AXES
from vlmpack.errors import ConfigError, SourceError
from vlmpack.packing.assemble import PackedSequence
from vlmpack.packing.plan import PackPlan, plan
from vlmpack.packing.report import PackingReport, count_pack
from vlmpack.samples import Refusal, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vlmpack.packing.assemble import Assembler
    from vlmpack.packing.inputs import Int64s
    from vlmpack.packing.ledger import Ledger
    from vlmpack.packing.methods import Method
    from vlmpack.packing.tally import RefusalLimit
    from vlmpack.stages.admit import Admission


class IndexedSource(Protocol):
    """Samples that can be had by row number; a `VQADataset` over a data set with a length is one."""

    num_rows: int | None

    def __iter__(self) -> Iterator[Sample | Refusal]:
        """Yield a sample or a refusal for each row, in order."""
        ...

    def __getitem__(self, index: int) -> Sample | Refusal:
        """Return the sample or the refusal of one row."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackIndex:
    """The costs of all samples, and the plan over them."""

    rows: Int64s = field(repr=False)
    """int64 [n]: the row of each admitted sample, ascending."""
    costs: Int64s = field(repr=False)
    """int64 [n, 3] in the order of `vlmpack.budget.AXES`, appended padding included."""
    plan: PackPlan = field(repr=False)
    """Which pack each sample goes into."""
    report: PackingReport = field(repr=False)
    """Rows read, and refusals by reason."""
    digest: str
    """Names the plan: rows, costs, budget and pack numbers. A saved position is valid for it alone."""


def build_index(
    samples: IndexedSource,
    admit: Admission,
    *,
    method: Method = "auto",
    seed: int = 0,
    limit: RefusalLimit | None = None,
    on_row: Callable[[PackingReport], None] | None = None,
) -> PackIndex:
    """Read every row once, without pixels, and plan all packs. O(rows).

    Args:
        samples: Over a data set that has a length.
        admit: The limits that each sample must keep.
        method: The packing algorithm.
        seed: Decides the order of packs.
        limit: The share of rows that may be refused.
        on_row: Called after each row, to show progress.

    Raises:
        ConfigError: If the data set is a stream.
        RefusalRatioError: If too many rows are refused.
        SourceError: If nothing can be packed.
    """
    if samples.num_rows is None:
        raise ConfigError("an index needs a data set that has a length; a stream is packed as it comes")
    report = PackingReport(budget=admit.budget)
    rows: list[int] = []
    costs: list[tuple[int, int, int]] = []
    for row, item in enumerate(samples):
        report.num_read += 1
        sample = item if isinstance(item, Refusal) else admit(item)
        if isinstance(sample, Refusal):
            report.refuse(sample)
            if limit is not None:
                limit.check(report)
        else:
            rows.append(row)
            costs.append(admit.packed_cost(sample).as_tuple())
        if on_row is not None:
            on_row(report)
    if not rows:
        raise SourceError(report.why_nothing())
    rows_N = np.array(rows, np.int64)
    cost_NA = np.array(costs, np.int64)
    packs = plan(cost_NA, admit.budget, method=method, seed=seed)
    return PackIndex(
        rows=rows_N, costs=cost_NA, plan=packs, report=report, digest=_digest(rows_N, cost_NA, packs)
    )


def _digest(rows_N: Int64s, cost_NA: Int64s, packs: PackPlan) -> str:
    digest = hashlib.sha256(json.dumps([packs.method, packs.budget.tolist()]).encode())
    for array in (rows_N, cost_NA, packs.pack_ids):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


class IndexedPacks(Dataset[PackedSequence]):
    """Packs of a plan, by number: a map-style data set for any `DataLoader`.

    Indexing by an integer gives a pack of the plan; by (start, stop), the samples at these places of the
    plan's pack-by-pack order, which is how a pack is split to make ranks even.

    Args:
        samples: The same as for the index.
        admit: The same as for the index.
        assemble: Builds packs.
        index: The plan.
        ledger: Counts what becomes of the samples.
    """

    def __init__(
        self,
        samples: IndexedSource,
        admit: Admission,
        assemble: Assembler,
        index: PackIndex,
        ledger: Ledger,
    ) -> None:
        self.index = index
        self._samples = samples
        self._admit = admit
        self._assemble = assemble
        self._ledger = ledger
        self._member_N, self.starts = index.plan.members()
        """int64 [packs + 1]: where each pack begins in the pack-by-pack order of samples."""
        self._report: PackingReport | None = None

    def __len__(self) -> int:
        return self.index.plan.num_packs

    def load_prefix(self) -> Int64s:
        """Return the ViT patches and the attention of all samples before each place. O(samples).

        Attention is the squared length of a sample, as samples are isolated. What the samples from `start` to
        `stop` of the pack-by-pack order load is the difference of two rows.

        Returns:
            int64 [samples + 1, 2].
        """
        cost_NA = self.index.costs[self._member_N]
        prefix = np.zeros((len(cost_NA) + 1, 2), np.int64)
        np.cumsum(cost_NA[:, AXES.index("patches")], out=prefix[1:, 0])
        np.cumsum(np.square(cost_NA[:, AXES.index("tokens")]), out=prefix[1:, 1])
        return prefix

    @property
    def report(self) -> PackingReport:
        """The index's refusals, and what became of the samples that were asked for since."""
        report = PackingReport(budget=self.index.report.budget)
        report.merge(self.index.report)
        report.merge(self._ledger.total())
        return report

    def __getitem__(self, pack: int | tuple[int, int]) -> PackedSequence:
        """Return a pack. Decodes its images; a sample that turns out broken leaves the pack, counted.

        The pack may be empty then, so that ranks stay even.

        Args:
            pack: Its number, or (start, stop) in the pack-by-pack order of samples.

        Raises:
            IndexError: If there is no such pack.
            SourceError: If a row is not what it was when the index was made.
        """
        start, stop = pack if isinstance(pack, tuple) else self._span(pack)
        samples = [self._sample(int(member)) for member in self._member_N[start:stop]]
        built, refusals = self._assemble(samples)
        report = self._counts()
        for refusal in refusals:
            report.refuse(refusal)
        if built is None:
            built = self._assemble.empty()
        else:
            count_pack(report, built, appends_pad=self._assemble.append_pad)
        self._ledger.write(now=True)
        return built

    def _span(self, pack: int) -> tuple[int, int]:
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        return int(self.starts[pack]), int(self.starts[pack + 1])

    def _sample(self, member: int) -> Sample:
        row = int(self.index.rows[member])
        item = self._samples[row]
        sample = item if isinstance(item, Refusal) else self._admit(item)
        planned = tuple(self.index.costs[member].tolist())
        found = None if isinstance(sample, Refusal) else self._admit.packed_cost(sample).as_tuple()
        if isinstance(sample, Refusal) or found != planned:
            raise SourceError(
                f"row {row} changed since the index was made: it cost {planned}, now "
                f"{sample.message if isinstance(sample, Refusal) else found}; make the index again"
            )
        return sample

    def _counts(self) -> PackingReport:
        if self._report is None:
            worker = get_worker_info()
            start = self._ledger.start
            self._report = start(worker.id, worker.num_workers) if worker else start()
        return self._report

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_report": None}
