"""Draw images/report.png: the head of the report that `vlmpack train-demo` leaves.

python docs/draw_report.py      needs chromium on the path
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from vlmpack.batching.demo import run_demo

PICTURE = Path(__file__).parent / "images" / "report.png"


def main() -> None:
    """Run the demo and take a picture of its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = run_demo(Path(folder)).result.report.absolute()
        shot = Path(folder) / "shot.png"
        subprocess.run(  # noqa: S603
            [  # noqa: S607
                "chromium",
                "--headless",
                "--no-sandbox",
                "--hide-scrollbars",
                "--window-size=1240,1000",
                f"--screenshot={shot}",
                report.as_uri(),
            ],
            check=True,
        )
        with Image.open(shot) as picture:
            picture.convert("RGB").quantize(64).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
