"""Sphinx settings: `make docs`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from docutils import nodes
from docutils.parsers.rst import Directive

import vlmpack
from vlmpack import PipelineConfig

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "vlmpack"
copyright = "the vlmpack authors"  # noqa: A001 - the name that Sphinx asks for
version = release = vlmpack.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
# The nanoVLM drop-in has classes of the same names; a bare name in a signature means ours.
suppress_warnings = ["ref.python"]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"vlmpack {release}"


class SettingsTable(Directive):
    """```{settings}```: the fields of `PipelineConfig`, with the texts that the command line shows too."""

    def run(self) -> list[nodes.Node]:
        rows = [("Setting", "Default", "Meaning")]
        rows += [
            (name, repr(field.default), field.description or "")
            for name, field in PipelineConfig.model_fields.items()
        ]
        group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for width in (25, 15, 60)), cols=3)
        group += nodes.thead("", _row(rows[0], code=False))
        group += nodes.tbody("", *(_row(row, code=True) for row in rows[1:]))
        return [nodes.table("", group)]


def _row(texts: tuple[str, str, str], *, code: bool) -> nodes.row:
    name, default, meaning = texts
    kind = nodes.literal if code else nodes.inline
    cells = (kind("", name), kind("", default), nodes.inline("", meaning))
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))


_MARKUP: Final = re.compile(r"(?<!`)`([^`]+)`(?!`)(?=(\w?))|\|")


def mark_code(
    _app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Turn `code`, as docstrings write it, into reStructuredText's ``code``; keep a bare | as it is."""

    def rst(found: re.Match[str]) -> str:
        return f"``{found[1]}``" + "\\ " * bool(found[2]) if found[1] else "\\|"

    lines[:] = [_MARKUP.sub(rst, line) for line in lines]


_COLON: Final = "\ue000"  # stands for a colon while napoleon looks: before one it expects a type


def hide_colons(
    _app: Sphinx, what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    if what in {"attribute", "property"}:
        lines[:] = [line.replace(":", _COLON) for line in lines]


def show_colons(
    _app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def setup(app: Sphinx) -> None:
    app.add_directive("settings", SettingsTable)
    app.connect("autodoc-process-docstring", mark_code, priority=100)
    app.connect("autodoc-process-docstring", hide_colons, priority=200)  # napoleon comes at 500
    app.connect("autodoc-process-docstring", show_colons, priority=900)
