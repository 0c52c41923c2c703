from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image


def test_the_demo_packs_the_corpus_and_draws_it(tmp_path):
    done = subprocess.run(
        [Path(sys.executable).with_name("vlmpack"), "demo", "--out", tmp_path / "new"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar or notice of any library
    # 162 records, of which 5 have more than 4 images; see vlmpack/corpus/records.jsonl.
    assert "157   of 162 rows" in done.stdout
    assert "too_many_images      5   3: 6 images" in done.stdout
    assert done.stdout.splitlines()[-1] == f"picture of the packs: {tmp_path / 'new' / 'demo-packs.png'}"
    with Image.open(tmp_path / "new" / "demo-packs.png") as picture:
        assert picture.width == 13 * 150


def test_a_folder_that_cannot_be_made_is_one_line(vlmpack, tmp_path):
    (tmp_path / "file").write_text("")
    result = vlmpack("demo", "--out", tmp_path / "file" / "folder")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
