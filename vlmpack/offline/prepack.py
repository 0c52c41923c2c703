"""Prepack: every shard of a plan, on any engine; then one manifest that accounts for every sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlmpack.errors import ConfigError, SourceError
from vlmpack.offline.atomic import only_run, write_text
from vlmpack.offline.engine import Engine, run_tasks
from vlmpack.offline.materialise import GroupFile, ShardSettings, materialise
from vlmpack.offline.plan import PlanFolder, group_name

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION: Final = 1


def prepack(
    plan: PlanFolder | str | Path,
    out: str | Path,
    *,
    pixels: bool = False,
    engine: Engine | None = None,
    on_shard: Callable[[dict[str, Any], int], object] | None = None,
) -> dict[str, Any]:
    """Write all packs of a plan, and return the manifest. What an earlier run finished is not made again.

    Args:
        plan: Or its folder.
        out: Where to write; may hold part of the same plan, never of another.
        pixels: Store uint8 tiles, about fifty times as large, instead of compressed images.
        engine: What runs the shards; None: a process for each core.
        on_shard: Called with each shard's row as it is done, and the number of shards.

    Raises:
        ConfigError: If the plan is stale, the folder holds another plan's packs, or another run writes it.
        SourceError: If a file is gone or changed, a worker died too often, or a sample is missing at the end.
    """
    plan = plan if isinstance(plan, PlanFolder) else PlanFolder.open(plan)
    out = Path(out)
    settings = ShardSettings(
        corpus=str(plan.index.corpus),
        tiling=plan.index.settings.pipeline().tiling(),
        budget=plan.settings.budget,
        pad_token_id=plan.index.pad_token_id,
        append_pad=plan.settings.append_pad,
        pixels=pixels,
        image_marker=plan.index.settings.image_marker,
    )
    tasks = [
        (
            {
                number: GroupFile(file=plan.index.files[number].file, part=str(plan.index.part(number)))
                for number in group.files
            },
            str(plan.folder / "groups" / group_name(number)),
            str(out / f"packs-{number:05d}-of-{len(plan.groups):05d}.parquet"),
            settings,
        )
        for number, group in enumerate(plan.groups)
        if group.num_packs
    ]
    with only_run(out):
        _claim(out, plan, pixels=pixels)
        rows = []
        for row in run_tasks(materialise, tasks, engine or Engine()):
            rows.append(row)
            if on_shard is not None:
                on_shard(row, len(tasks))
        return _finish(out, plan, sorted(rows, key=lambda row: row["shard"]), pixels=pixels)


def _claim(out: Path, plan: PlanFolder, *, pixels: bool) -> None:
    """Write down whose packs a folder holds, before the first of them.

    Raises:
        ConfigError: If it holds others'.
    """
    wanted = {"plan": plan.digest, "pixels": pixels}
    claim = out / ".plan.json"
    if claim.is_file():
        known = json.loads(claim.read_text(encoding="utf-8"))
        if known != wanted:
            raise ConfigError(
                f"{out} holds packs of plan {known['plan']}{' as pixels' * known['pixels']}, this is plan "
                f"{plan.digest}{' as pixels' * pixels}; choose another folder"
            )
    elif any(not path.name.startswith(".") for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no packs of this plan; choose another folder")
    write_text(claim, json.dumps(wanted) + "\n")


def _finish(out: Path, plan: PlanFolder, rows: list[dict[str, Any]], *, pixels: bool) -> dict[str, Any]:
    """Check that every planned sample is in a shard or refused, and write the manifest.

    Raises:
        SourceError: If one is missing or there twice.
    """
    covered = sum(row["samples"] + len(row["refused"]) for row in rows)
    if covered != plan.num_samples or len({row["shard"] for row in rows}) != len(rows):
        raise SourceError(
            f"the shards in {out} account for {covered} samples of {plan.num_samples} planned; remove "
            f"{out / 'manifest'} and run it again"
        )
    manifest = {
        "version": VERSION,
        "plan": plan.digest,
        "pixels": pixels,
        "settings": {"index": plan.index.settings.model_dump(), "plan": plan.settings.model_dump()},
        "packs": sum(row["packs"] for row in rows),
        "samples": sum(row["samples"] for row in rows),
        "refused": plan.refused,
        "examples": [
            {**example, "file": plan.index.files[example["file"]].file.name} for example in plan.examples
        ],
        "corpus": str(plan.index.corpus),
        "shards": rows,
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest
