"""A small corpus of real records in several files, and what the stages make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vlmpack.corpus import load_corpus
from vlmpack.offline import Engine, IndexSettings, PlanSettings, build_index, build_plan

if TYPE_CHECKING:
    from pathlib import Path

HERE = Engine(num_workers=0)
"""Runs in this process."""
LIMITS = PlanSettings(max_images=18, max_images_per_example=4, group_bytes=1, method="first_fit")
FILES = {"a.parquet": range(14), "deep/b.parquet": range(14, 21), "deep/c.parquet": range(21, 24)}


def write_corpus(folder: Path, files: dict[str, range] = FILES) -> Path:
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        load_corpus().select(rows).to_parquet(str(path))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that tests only read."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def index(corpus, tmp_path_factory):
    return build_index(corpus, tmp_path_factory.mktemp("index") / "index", engine=HERE)


@pytest.fixture(scope="session")
def plan(index, tmp_path_factory):
    return build_plan(index, tmp_path_factory.mktemp("plan") / "plan", LIMITS)


@pytest.fixture(scope="session")
def samples():
    """Return what the stages make of each row of the corpus, by its place in the data set."""
    settings = IndexSettings()
    stage = settings.samples(list(load_corpus().select(range(24))), settings.load_tokenizer(), None)
    return list(stage)
