"""A runner for the commands, and real rows in every form in which people keep data sets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from vlmpack.cli.app import app
from vlmpack.corpus import load_corpus

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typer.testing import Result

SMALL_ROWS = (23, 62, 106, 150)
"""Rows of the corpus with one picture of at most 512 pixels a side, which is one tile: L, RGBA, L and
RGB, the last with an EXIF orientation that turns it."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` converts out of the user's cache, and lines as long as they are."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def vlmpack() -> Callable[..., Result]:
    """Run a command in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


def rows_of(indices: tuple[int, ...] = SMALL_ROWS) -> list[dict[str, Any]]:
    """Return rows of the corpus with their images as compressed bytes."""
    table = load_corpus().with_format("arrow").select(indices)
    return [row for part in table.iter(100) for row in part.to_pylist()]


def write_json_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines, their images beside them under images/."""
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        names = []
        for image in row["images"]:
            name = f"images/{number}-{image['path']}"
            (file.parent / name).write_bytes(image["bytes"])
            names.append(name)
        lines.append(json.dumps({"images": names, "texts": row["texts"]}) + "\n")
    file.write_text("".join(lines))
