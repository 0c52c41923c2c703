"""Plan an index: which rows share a pack, file group by file group, from costs alone.

A plan over neighbouring files lets every file be read once, in order, and its tasks be independent; what that
costs in packs against one plan over everything is computed and written down. No image and no token is read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmpack.budget import UNLIMITED
from vlmpack.errors import ConfigError, SourceError
from vlmpack.offline.atomic import only_run, whole_file, write_text
from vlmpack.offline.index import Index
from vlmpack.offline.limits import Limits, PlanSettings
from vlmpack.packing import plan
from vlmpack.packing.engine import EFFORTS

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]

VERSION: Final = 1
EXAMPLES: Final = 3
"""Rows over a limit that are named, for each reason."""
SCHEMA: Final = pa.schema([
    ("pack", pa.int64()),
    ("file", pa.int32()),
    ("row", pa.int64()),
    ("tokens", pa.int32()),
    ("images", pa.int32()),
    ("patches", pa.int64()),
])
"""One row a sample, pack by pack; `pack` counts over the whole plan, `file` is its number in the index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedGroup:
    """Files that are planned together: one task, one shard."""

    files: tuple[int, ...]
    """Numbers in the index."""
    first_pack: int
    """Its packs are numbered from here."""
    num_packs: int
    """How many they are; 0 where no row can be packed."""
    num_samples: int
    """Samples in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFolder:
    """A plan on disk."""

    folder: Path
    """Where it is."""
    index: Index
    """What it was made of."""
    settings: PlanSettings
    """How packs were made."""
    groups: tuple[PlannedGroup, ...]
    """In the order of the files."""
    refused: dict[str, int]
    """Rows that are in no pack, by reason: those of the index and those over a limit."""
    examples: tuple[dict[str, Any], ...]
    """Some of those over a limit: file, row, key, reason, message."""
    lower_bound: int
    """No plan of these samples has fewer packs."""
    global_packs: int | None
    """Packs of one plan over everything; None where it was not made."""
    digest: str
    """A name for the packs. A saved position is valid for it alone."""

    @property
    def num_packs(self) -> int:
        """Packs in all."""
        return sum(group.num_packs for group in self.groups)

    @property
    def num_samples(self) -> int:
        """Samples in all packs."""
        return sum(group.num_samples for group in self.groups)

    def group_table(self, number: int) -> pa.Table:
        """Return the samples of a group, pack by pack.

        Args:
            number: Of the group.
        """
        return pq.read_table(self.folder / "groups" / group_name(number))

    @classmethod
    def open(cls, folder: str | Path, index: Index | None = None) -> PlanFolder:
        """Return the plan in a folder, if its index is what it was.

        Args:
            folder: Where `build_plan` put it.
            index: Where the index has moved to; None: where it was.

        Raises:
            ConfigError: If there is no whole plan, or the index changed since.
        """
        folder = Path(folder)
        try:
            plain = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            if plain["version"] != VERSION:
                raise ConfigError(f"{folder} has version {plain['version']}, this program reads {VERSION}")
            settings = PlanSettings(**plain["settings"])
            groups = tuple(
                PlannedGroup(**{**group, "files": tuple(group["files"])}) for group in plain["groups"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder} is no whole plan: {error}; plan again") from error
        index = index or Index.open(plain["index"])
        if index.digest != plain["index_digest"]:
            raise ConfigError(
                f"the index {index.folder} is not the one that {folder} was planned from (it was made again "
                "since, or is another); plan again"
            )
        return cls(
            folder=folder,
            index=index,
            settings=settings,
            groups=groups,
            refused=plain["refused"],
            examples=tuple(plain["examples"]),
            lower_bound=plain["lower_bound"],
            global_packs=plain["global_packs"],
            digest=plain["digest"],
        )


def group_name(number: int) -> str:
    """Return the name of a group's file of samples.

    Args:
        number: Of the group.
    """
    return f"group-{number:05d}.parquet"


def build_plan(
    index: Index | str | Path,
    out: str | Path,
    settings: PlanSettings | None = None,
    *,
    on_group: Callable[[int, int], object] | None = None,
) -> PlanFolder:
    """Plan an index and write the plan. O(rows); ten million take a few seconds and about a gigabyte.

    Args:
        index: Or its folder.
        out: Where to write; an older plan is replaced.
        settings: What a pack may hold.
        on_group: Called with the groups done and their number.

    Raises:
        ConfigError: If a setting is invalid, or another run writes the folder.
        SourceError: If nothing can be packed.
    """
    settings = settings or PlanSettings()
    index = index if isinstance(index, Index) else Index.open(index)
    out = Path(out)
    costs, refused, examples = _read_costs(index, settings)
    if not costs.rows.shape[0]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in refused.most_common())
        raise SourceError(f"none of the {index.num_rows} rows of {index.folder} can be packed: {reasons}")
    groups = file_groups([each.file.size for each in index.files], settings.group_bytes)
    whole = _plan_all(costs, settings) if len(groups) > 1 else None
    with only_run(out):
        (out / "plan.json").unlink(missing_ok=True)  # until it is whole again, there is no plan
        planned: list[PlannedGroup] = []
        digest = hashlib.sha256(json.dumps([index.digest, settings.model_dump()]).encode())
        for number, files in enumerate(groups):
            first = sum(group.num_packs for group in planned)
            group = _write_group(out, number, files, costs, settings, first, digest)
            planned.append(group)
            if on_group is not None:
                on_group(number + 1, len(groups))
        num_packs = sum(group.num_packs for group in planned)
        plain = {
            "version": VERSION,
            "index": str(index.folder.resolve()),
            "index_digest": index.digest,
            "settings": settings.model_dump(),
            "groups": [
                {
                    "files": list(group.files),
                    "first_pack": group.first_pack,
                    "num_packs": group.num_packs,
                    "num_samples": group.num_samples,
                }
                for group in planned
            ],
            "refused": dict(sorted(refused.items())),
            "examples": examples,
            "lower_bound": _lower_bound(costs, settings),
            "global_packs": num_packs if whole is None else whole,
            "digest": digest.hexdigest()[:32],
        }
        write_text(out / "plan.json", json.dumps(plain, indent=1) + "\n")
        for path in (out / "groups").glob("group-*.parquet"):
            if int(path.stem.removeprefix("group-")) >= len(groups):
                path.unlink()
    return PlanFolder.open(out, index)


def file_groups(sizes: Sequence[int], group_bytes: int) -> list[tuple[int, ...]]:
    """Return neighbouring files of up to `group_bytes` together; a larger file is alone.

    Args:
        sizes: Bytes of each file.
        group_bytes: 0 puts all files together.
    """
    if not group_bytes:
        return [tuple(range(len(sizes)))]
    groups: list[tuple[int, ...]] = []
    held = 0
    for number, size in enumerate(sizes):
        if groups and held + size <= group_bytes:
            groups[-1] += (number,)
            held += size
        else:
            groups.append((number,))
            held = size
    return groups


@dataclass(frozen=True, slots=True)
class _Costs:
    """Samples that can be packed: file and row of each, and int64 [n, 3] costs."""

    files: npt.NDArray[np.int32]
    rows: Int64s
    costs: Int64s


def _read_costs(index: Index, settings: PlanSettings) -> tuple[_Costs, Counter[str], list[dict[str, Any]]]:
    """Return the samples within every limit, how many are not, and some of those."""
    refused = index.refused
    limits = Limits.of(settings)
    files, rows, costs = [], [], []
    examples: list[dict[str, Any]] = []
    for number in range(len(index.files)):
        table = pq.read_table(index.part(number), columns=["row", "reason", "tokens", "images", "patches"])
        table = table.filter(pa.compute.is_null(table["reason"]))
        cost = np.empty((table.num_rows, 3), np.int64)
        for axis, name in enumerate(("tokens", "images", "patches")):
            cost[:, axis] = table[name].to_numpy()
        row_of = table["row"].to_numpy()
        fits = np.ones(cost.shape[0], bool)
        for reason, is_over in limits.faults(cost):
            over = np.flatnonzero(fits & is_over)
            if over.size:
                refused[reason] += over.size
                wanted = EXAMPLES - sum(example["reason"] == reason for example in examples)
                examples += [
                    {
                        "file": number,
                        "row": int(row_of[at]),
                        "reason": reason,
                        "message": limits.story(reason, cost[at]),
                    }
                    for at in over[: max(wanted, 0)].tolist()
                ]
                fits[over] = False
        rows.append(row_of[fits])
        costs.append(cost[fits] + np.array([settings.append_pad, 0, 0]))
        files.append(np.full(costs[-1].shape[0], number, np.int32))
    for example in examples:
        keys = pq.read_table(index.part(example["file"]), columns=["key"])["key"]
        example["key"] = keys[example["row"]].as_py()
    return _Costs(np.concatenate(files), np.concatenate(rows), np.concatenate(costs)), refused, examples


def _plan(costs: Int64s, settings: PlanSettings, seed: int) -> Any:
    method = settings.method
    if settings.balance is not None and method not in EFFORTS:
        method = "balanced"
    return plan(costs, settings.budget, method=method, seed=seed, balance=settings.balance)


def _plan_all(costs: _Costs, settings: PlanSettings) -> int:
    return int(_plan(costs.costs, settings, settings.seed).num_packs)


def _lower_bound(costs: _Costs, settings: PlanSettings) -> int:
    limits = settings.budget.as_array()
    totals = costs.costs.sum(axis=0)
    return max(
        -(-int(total) // int(limit))
        for total, limit in zip(totals, limits, strict=True)
        if 0 < limit < UNLIMITED
    )


def _write_group(
    out: Path,
    number: int,
    files: tuple[int, ...],
    costs: _Costs,
    settings: PlanSettings,
    first_pack: int,
    digest: Any,
) -> PlannedGroup:
    low, high = np.searchsorted(costs.files, [files[0], files[-1] + 1])
    cost = costs.costs[low:high]
    made = _plan(cost, settings, settings.seed + number)
    order, _ = made.members()
    columns = {
        "pack": made.pack_ids[order] + first_pack,
        "file": costs.files[low:high][order],
        "row": costs.rows[low:high][order],
        "tokens": cost[order, 0].astype(np.int32),
        "images": cost[order, 1].astype(np.int32),
        "patches": cost[order, 2],
    }
    for column in columns.values():
        digest.update(np.ascontiguousarray(column).tobytes())
    with whole_file(out / "groups" / group_name(number)) as draft:
        pq.write_table(pa.Table.from_pydict(columns, schema=SCHEMA), draft, compression="zstd")
    return PlannedGroup(
        files=files, first_pack=first_pack, num_packs=made.num_packs, num_samples=int(high - low)
    )


__all__ = ["PlanFolder", "PlanSettings", "PlannedGroup", "build_plan", "file_groups", "group_name"]
