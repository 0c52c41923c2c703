"""The figures of a report, from packs on disk, a plan, or the JSON that `vlmpack pack` writes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmpack.errors import ConfigError, SourceError
from vlmpack.offline import PackedFolder, PlanFolder, load_packed
from vlmpack.offline.files import read_rows
from vlmpack.packing import PackingReport
from vlmpack.ranks import balanced_steps, load_imbalance

if TYPE_CHECKING:
    import numpy.typing as npt

    from vlmpack.budget import PackBudget
    from vlmpack.ranks import LoadImbalance

EXAMPLES: Final = 3
"""Refused rows that are shown for each reason."""
RANKS: Final = 8
"""Ranks for which the balance is shown."""
_FAR: Final = 20_000
"""A picture of a row further into its file than this is not looked for."""
_MOST: Final = 8192
"""Packs from which the balance is computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A row that is in no pack."""

    key: str
    """Names the row."""
    reason: str
    """The kind of fault."""
    message: str
    """The whole story."""
    picture: bytes | None = field(default=None, repr=False)
    """Its first image as it is stored, where it can still be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a report says of a set of packs."""

    source: str
    """What it is about."""
    budget: PackBudget
    """What a pack may hold."""
    num_packs: int
    """Packs."""
    num_samples: int
    """Samples in them."""
    num_read: int
    """Rows that were read."""
    load: tuple[int, int, int]
    """Tokens, images and patches of all packs."""
    lower_bound: int
    """Packs that no plan can do without."""
    tokens_per_pack: Counter[int] = field(repr=False)
    """How many packs hold so many."""
    patches_per_pack: Counter[int] = field(repr=False)
    """How many packs hold so many."""
    samples_per_pack: Counter[int] = field(repr=False)
    """How many packs hold so many."""
    refused: Counter[str]
    """Rows in no pack, by reason."""
    examples: tuple[Refused, ...] = ()
    """Some of them."""
    group_price: float | None = None
    """Share of packs more than one plan over everything would have."""
    imbalance: tuple[LoadImbalance, LoadImbalance] | None = None
    """Of random and of balanced steps of `RANKS` ranks."""
    packs: PackedFolder | None = None
    """The packs themselves, to look into."""

    @property
    def fill(self) -> dict[str, float | None]:
        """Used / capacity for each axis; None without a limit."""
        limits = self.budget.as_tuple()
        return {
            axis: None if not limit or not self.num_packs else used / (limit * self.num_packs)
            for axis, used, limit in zip(("tokens", "images", "patches"), self.load, limits, strict=True)
        }

    def padding(self, rows: int) -> float:
        """Return the share of positions that are padding with so many rows of the token budget.

        Args:
            rows: The packs, or the samples where each has a row of its own.
        """
        return 1 - self.load[0] / (rows * self.budget.max_tokens) if rows else 0.0


def figures_of(where: str | Path) -> Figures:
    """Return the figures of whatever lies there.

    Args:
        where: A folder of `vlmpack prepack` or `vlmpack plan`, or a JSON report of `vlmpack pack`.

    Raises:
        ConfigError: If it is none of them.
    """
    path = Path(where)
    if (path / "manifest.json").is_file():
        return _of_packed(load_packed(path))
    if (path / "plan.json").is_file():
        return _of_plan(PlanFolder.open(path))
    if path.is_file():
        return _of_report(path)
    raise ConfigError(
        f"{where} is neither a folder that `vlmpack prepack` or `vlmpack plan` wrote, nor a JSON report of "
        "`vlmpack pack`"
    )


def _of_packed(packs: PackedFolder) -> Figures:
    manifest = packs.manifest
    sizes = np.diff(packs.starts)
    loads = np.add.reduceat(packs.costs, packs.starts[:-1]) if len(packs) else np.zeros((0, 3), np.int64)
    late = [Refused(**refusal) for row in manifest["shards"] for refusal in row["refused"]]
    early = _with_pictures(Path(manifest["corpus"]), manifest["examples"])
    refused = Counter(manifest["refused"])
    refused.update(refusal.reason for refusal in late)
    return Figures(
        source=str(packs.folder),
        budget=packs.budget,
        num_packs=len(packs),
        num_samples=int(sizes.sum()),
        num_read=int(sizes.sum()) + sum(refused.values()),
        imbalance=_imbalance(packs.load_prefix(), packs.starts),
        refused=refused,
        examples=(*early, *_some(late)),
        packs=packs,
        **_distributions(loads, sizes, packs.budget),
    )


def _of_plan(plan: PlanFolder) -> Figures:
    tables = [plan.group_table(number) for number, group in enumerate(plan.groups) if group.num_packs]
    table = pa.concat_tables(tables)
    costs = np.stack([table[name].to_numpy().astype(np.int64) for name in ("tokens", "images", "patches")], 1)
    ids = table["pack"].to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ids)) + 1, [len(ids)]]).astype(np.int64)
    prefix = np.zeros((len(ids) + 1, 2), np.int64)
    np.cumsum(costs[:, 2], out=prefix[1:, 0])
    np.cumsum(np.square(costs[:, 0]), out=prefix[1:, 1])
    refused = Counter(plan.refused)
    price = None if plan.global_packs is None else plan.num_packs / plan.global_packs - 1
    values = _distributions(np.add.reduceat(costs, starts[:-1]), np.diff(starts), plan.settings.budget)
    return Figures(
        source=str(plan.folder),
        budget=plan.settings.budget,
        num_packs=plan.num_packs,
        num_samples=plan.num_samples,
        num_read=plan.index.num_rows,
        imbalance=_imbalance(prefix, starts),
        refused=refused,
        examples=(*_with_pictures(plan.index.corpus, _named(plan)), *_some(_of_index(plan))),
        group_price=price if len(plan.groups) > 1 else None,
        **{**values, "lower_bound": plan.lower_bound},
    )


def _of_report(path: Path) -> Figures:
    try:
        report = PackingReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no JSON report of `vlmpack pack`: {error}") from error
    return Figures(
        source=str(path),
        budget=report.budget,
        num_packs=report.num_packs,
        num_samples=report.num_packed,
        num_read=report.num_read,
        load=report.load.as_tuple(),
        lower_bound=report.lower_bound,
        tokens_per_pack=report.tokens_per_pack,
        patches_per_pack=report.patches_per_pack,
        samples_per_pack=report.samples_per_pack,
        refused=Counter(report.num_refused),
        examples=tuple(
            Refused(key=each.key, reason=str(each.reason), message=each.message) for each in report.refusals
        ),
    )


def _distributions(
    loads: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], budget: PackBudget
) -> dict[str, Any]:
    totals = loads.sum(axis=0)
    needs = [
        -(-int(total) // limit)
        for total, limit in zip(totals, budget.as_tuple(), strict=True)
        if limit is not None and limit > 0
    ]
    return {
        "load": tuple(totals.tolist()),
        "lower_bound": max(needs),
        "tokens_per_pack": Counter(loads[:, 0].tolist()),
        "patches_per_pack": Counter(loads[:, 2].tolist()),
        "samples_per_pack": Counter(sizes.tolist()),
    }


def _imbalance(
    prefix: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]
) -> tuple[LoadImbalance, LoadImbalance] | None:
    """Return how uneven ranks are with packs in random order and in balanced steps; None for a few packs."""
    loads = np.diff(prefix[starts], axis=0)
    usable = min(len(loads), _MOST) // RANKS * RANKS
    if usable < 2 * RANKS:
        return None
    rng = np.random.default_rng(0)
    order = rng.permutation(len(loads))[:usable]
    shuffled = loads[order]
    balanced = balanced_steps(shuffled, RANKS, 1, rng)
    return (
        load_imbalance(shuffled, world_size=RANKS, batch_size=1),
        load_imbalance(shuffled[balanced], world_size=RANKS, batch_size=1),
    )


def _named(plan: PlanFolder) -> list[dict[str, Any]]:
    return [{**each, "file": plan.index.files[each["file"]].file.name} for each in plan.examples]


def _with_pictures(corpus: Path, examples: list[dict[str, Any]]) -> list[Refused]:
    """Return refused rows with their first image, where the corpus is still there."""
    return [
        Refused(
            key=each["key"],
            reason=each["reason"],
            message=each["message"],
            picture=_first_picture(corpus / each["file"], each["row"]),
        )
        for each in examples
    ]


def _first_picture(path: Path, row: int) -> bytes | None:
    if row > _FAR or not path.is_file():
        return None
    try:
        raw = next(islice(read_rows(path), row, None), None)
    except SourceError:
        return None
    images = raw.get("images") if isinstance(raw, dict) else None
    first = images[0] if isinstance(images, list) and images else None
    data = first.get("bytes") if isinstance(first, dict) else None
    return data if isinstance(data, bytes) else None


def _of_index(plan: PlanFolder) -> list[Refused]:
    """Return some rows that the index refused."""
    found: list[Refused] = []
    for number, each in enumerate(plan.index.files):
        if each.refused:
            table = pq.read_table(plan.index.part(number), columns=["key", "reason", "message"])
            table = table.filter(pa.compute.is_valid(table["reason"])).slice(0, 1000)
            found += [Refused(**row) for row in table.to_pylist()]
    return found


def _some(refused: list[Refused]) -> list[Refused]:
    shown: Counter[str] = Counter()
    some = []
    for each in refused:
        shown[each.reason] += 1
        if shown[each.reason] <= EXAMPLES:
            some.append(each)
    return some
