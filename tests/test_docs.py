"""What the documentation says is what the code does.

Every ```python block of README.md and docs/*.md is run, page by page, in an empty folder. A ```text
block right behind one is what it prints. In a ```console block the line after "$ " is run, and the rest is
what it prints. "..." stands for anything. Tables that list what the code has must be complete.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import zlib
from contextlib import redirect_stdout
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, Example, OutputChecker
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import vlmpack
from tests.fakes import jpeg, row, tokenizer
from vlmpack.corpus import load_tokenizer
from vlmpack.errors import REASONS
from vlmpack.families import add_family_tokens, family_for
from vlmpack.offline import build_index, build_plan, prepack
from vlmpack.packing import ConstantLengthDataset
from vlmpack.stages import VQADataset

if TYPE_CHECKING:
    from sybil.example import Example as Block

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if re.search("```(python|console)", page.read_text())]
_FLAGS = ELLIPSIS | NORMALIZE_WHITESPACE


class Page:
    """Runs the blocks of one page and compares what they print."""

    def __init__(self) -> None:
        self._run = PythonEvaluator()
        self._printed = ""
        self._end = -1

    def python(self, block: Block) -> None:
        printed = io.StringIO()
        with redirect_stdout(printed):
            self._run(block)
        self._printed, self._end = printed.getvalue(), block.end

    def text(self, block: Block) -> str | None:
        if self._end < 0 or block.document.text[self._end : block.start].strip():
            return None  # not the output of a block
        return difference(str(block.parsed), self._printed)

    def console(self, block: Block) -> str | None:
        prompt, _, shown = str(block.parsed).partition("\n")
        program, *arguments = shlex.split(prompt.removeprefix("$ "))
        done = subprocess.run(
            [Path(sys.executable).parent / program, *arguments],
            env=os.environ | {"COLUMNS": "80"},
            capture_output=True,
            text=True,
        )
        return done.stderr if done.returncode else difference(shown, done.stdout)


def difference(shown: str, printed: str) -> str | None:
    checker = OutputChecker()
    if checker.check_output(shown, printed, _FLAGS):
        return None
    return checker.output_difference(Example("", shown), printed, _FLAGS)


@pytest.mark.parametrize("path", WITH_CODE, ids=[page.name for page in WITH_CODE])
def test_code_blocks_run_and_print_what_the_page_shows(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Page()
    sybil = Sybil([
        CodeBlockParser(language, getattr(page, language)) for language in ("python", "text", "console")
    ])
    blocks = list(sybil.parse(path))
    assert blocks
    for block in blocks:
        block.evaluate()


def test_the_pages_that_teach_by_example_have_examples():
    teaching = {"README.md", "tutorial.md", "nanovlm.md", "bad_input.md", "command_line.md"}
    assert teaching <= {page.name for page in WITH_CODE}


def test_every_public_name_is_in_the_api_reference():
    reference = (ROOT / "docs" / "api.md").read_text()
    documented = re.findall(r"^\.\. auto\w+:: (vlmpack\.\w+)(?:\(.*\))?$", reference, re.MULTILINE)
    assert sorted(documented) == sorted(f"vlmpack.{name}" for name in vlmpack.__all__)


def test_every_term_in_the_glossary_is_defined_once():
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    terms = re.findall(r"^\| \*\*(.+?)\*\* \|", glossary, re.MULTILINE)
    assert len(terms) == len(set(terms)) > 20


def one_turn_only(messages: int) -> str:
    return (
        "{% if messages|length > " + str(messages) + " %}{{ raise_exception('one turn only') }}{% endif %}"
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )


def png_without_pixels(width: int, height: int) -> bytes:
    """Return a PNG file, 8-bit RGB, whose header is right and whose pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


class _Broken(list):
    """A data set that cannot make its second row."""

    def __getitem__(self, index):
        if index == 1:
            raise ValueError("no such file")
        return super().__getitem__(index)


PICTURE = jpeg(600, 400)
FAULTS = {
    "bad_row": {"images": [PICTURE], "text": "hello"},
    "source_error": row(),
    "no_text": {"images": [PICTURE], "texts": []},
    "empty_turn": row(answer=" "),
    "ratings": row() | {"relevance_ratings": [0]},
    "marker_mismatch": row("<image> or <image>?", images=[PICTURE]),
    "template_untraceable": {"texts": row()["texts"] * 2},
    "no_supervised_token": {"messages": [{"role": "user", "content": "Hello?"}]},
    "image_missing": row(images=[None]),
    "image_empty": row(images=[b""]),
    "image_unreadable": row(images=[b"<html>404 Not Found</html>"]),
    "image_truncated": row(images=[PICTURE[: len(PICTURE) // 2]]),
    "image_too_large": row(images=[png_without_pixels(30000, 30000)]),
    "image_shape": row(images=[jpeg(201, 1)]),
    "image_outside_root": row(images=["cat.png"]),
    "sample_too_long": row(answer="word " * 5000),
    "too_many_images": row(images=[PICTURE] * 5),
    "over_budget": row(images=[PICTURE]),
}


def messages_in_the_table() -> dict[str, str]:
    """Return reason -> message from the table of docs/bad_input.md."""
    page = (ROOT / "docs" / "bad_input.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*?\| ``? ?(.+?) ?``? \|[^|]*\|$", page, re.MULTILINE)
    assert len(rows) == len(dict(rows))
    return dict(rows)


def test_every_reason_for_a_refusal_has_its_line():
    assert sorted(messages_in_the_table()) == sorted(REASONS) == sorted([*FAULTS, "row_changed"])


def test_a_row_that_changed_since_it_was_indexed_says_what_the_page_says(tmp_path):
    (tmp_path / "corpus").mkdir()
    picture = tmp_path / "corpus" / "cat.jpg"
    picture.write_bytes(jpeg(600, 400))
    lines = [json.dumps(each) for each in (row(), row(images=["cat.jpg"]))]
    (tmp_path / "corpus" / "rows.jsonl").write_text("\n".join(lines))
    plan = build_plan(build_index(tmp_path / "corpus", tmp_path / "index"), tmp_path / "plan")
    picture.write_bytes(jpeg(400, 300))
    (refusal,) = prepack(plan, tmp_path / "packed")["shards"][0]["refused"]
    assert (refusal["key"], refusal["reason"]) == ("rows.jsonl:1", "row_changed")
    shown = messages_in_the_table()["row_changed"]
    assert difference(f"{shown}\n", f"{refusal['message']}\n") is None, refusal["message"]


@pytest.mark.parametrize("reason", FAULTS)
def test_each_refusal_says_what_the_page_says(reason):
    rows = (_Broken if reason == "source_error" else list)([row(), FAULTS[reason]])
    family, words = None, tokenizer()
    if reason == "image_shape":
        family, words = family_for("qwen2_vl"), load_tokenizer()
        add_family_tokens(words, family)
    samples = VQADataset(
        rows,
        words,
        family=family,
        chat_template=one_turn_only(2) if reason == "template_untraceable" else None,
    )
    packs = ConstantLengthDataset(samples, max_patches=4096 if reason == "over_budget" else None)
    assert sum(len(pack.keys) for pack in packs) == 1
    (refusal,) = packs.report.refusals
    assert (refusal.key, refusal.reason) == ("1", reason)
    shown = messages_in_the_table()[reason]
    assert difference(f"{shown}\n", f"{refusal.message}\n") is None, refusal.message
