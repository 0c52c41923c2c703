"""Each script of examples/ runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted(
    path
    for path in (Path(__file__).parents[2] / "examples").glob("*.py")
    if not path.name.startswith("train_")
)
"""Those that train are in test_training_examples.py."""

LAST_LINES = {
    # 162 records, 5 of them with more than 4 images; the last of those is row 103 with 5.
    "wrap_dataset.py": "refused row 103: 5 images; the limit is 4 (max_images_per_example)",
}
"""What each script says at its end."""


def test_the_examples_are_found():
    assert LAST_LINES.keys() <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_the_example_runs(path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", path],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    last = done.stdout.splitlines()[-1]
    assert last == LAST_LINES.get(path.name, last)
