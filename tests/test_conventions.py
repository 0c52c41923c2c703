"""What the tree promises its readers: short files, named after their idea; documented public names."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import vlmpack

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "vlmpack").rglob("*.py"))
PROGRAMS = SOURCES + sorted((ROOT / "tests").rglob("*.py"))
TEXTS = [
    path
    for folder in ("vlmpack", "tests", "benchmarks", "docs", "examples", "scripts", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".md", ".sh", ".toml"} and "_build" not in path.parts
]


def test_there_are_files_to_check():
    assert len(SOURCES) > 40
    assert len(TEXTS) > 80


def test_no_file_is_over_400_lines_or_a_bag_of_helpers():
    long = {str(path): lines for path in PROGRAMS if (lines := len(path.read_text().splitlines())) > 400}
    assert not long
    assert not [path for path in PROGRAMS if path.stem in {"utils", "helpers", "common", "misc"}]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_package_files_only_hand_on_names(path):
    if path.name != "__init__.py" or path.parent.name in {"vlmpack", "corpus", "cli", "memory", "batching"}:
        return  # loads lazily, or is the package's one small file
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    assert all(isinstance(node, allowed) for node in ast.parse(path.read_text()).body)


PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES if path.name == "__init__.py"
)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_documented(package):
    module = import_module(package)
    names = getattr(module, "__all__", [])
    for name in names:
        value = getattr(module, name)
        is_made_here = inspect.isclass(value) or inspect.isfunction(value)
        assert not is_made_here or inspect.getdoc(value), f"{package}.{name}"
    assert set(names) <= set(dir(module))


def test_a_name_that_does_not_exist_is_an_attribute_error():
    assert len(vlmpack.__all__) > 20
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vlmpack.nothing  # noqa: B018


def test_no_file_names_a_path_of_somebodys_machine():
    machine = re.compile(
        "|".join((r"(?<![\w.])/" + "work/", "/" + "root/", "/" + r"home/\w", r"\.\./" + "shared"))
    )
    found = [str(path) for path in TEXTS if machine.search(path.read_text())]
    assert not found
