"""The pictures that image benchmarks decode: 80 samples as a vision-language data set has them.

| class | share | what |
|---|---|---|
| photo 640x480 | 40 % | one photograph of the corpus, JPEG, quality 90, 4:2:0 |
| photo 1024x768 | 20 % | montage of 2 x 2 |
| photo 1920x1080 | 10 % | montage of 3 x 2 |
| photo 4000x3000 | 2.5 % | montage of 4 x 4, so that big pictures keep the detail of small ones |
| document 1240x1754 | 12.5 % | text of the corpus drawn in DejaVu Serif, RGB PNG |
| chart 800x600 | 15 % | matplotlib figure, RGBA PNG |

Four samples are text only, four have two pictures. Only photographs of at least 1.3 bit a pixel are taken:
smoother ones would decode faster than photographs do.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from vlmpack.corpus import load_corpus

SHARES: Final = {
    "photo 640x480": 32,
    "photo 1024x768": 16,
    "photo 1920x1080": 8,
    "photo 4000x3000": 2,
    "document 1240x1754": 10,
    "chart 800x600": 12,
}
"""Pictures of each class in 80."""

_CELLS: Final = {640: (1, 1), 1024: (2, 2), 1920: (3, 2), 4000: (4, 4)}
_DETAILED: Final = 1.3


def as_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


@cache
def photographs() -> tuple[Image.Image, ...]:
    """Return the detailed photographs of the corpus at 640 x 480."""
    images = [image for row in load_corpus() for image in row["images"]]
    small = [
        image.resize((640, 480), Image.Resampling.BICUBIC)
        for image in images
        if image.mode == "RGB" and min(image.size) >= 380 and image.format != "PNG"
    ]
    return tuple(image for image in small if len(as_jpeg(image)) * 8 >= _DETAILED * 640 * 480)


def photo(width: int, height: int, rng: np.random.Generator) -> bytes:
    """Return a JPEG: photographs side by side, each a random part of nine tenths a side."""
    columns, rows = _CELLS[width]
    cell = (-(-width // columns), -(-height // rows))
    picture = Image.new("RGB", (width, height))
    for row in range(rows):
        for column in range(columns):
            whole = photographs()[rng.integers(len(photographs()))]
            left, top = int(rng.integers(64)), int(rng.integers(48))
            part = whole.crop((left, top, left + 576, top + 432))
            picture.paste(
                part.resize(cell, Image.Resampling.BICUBIC),
                (column * (width // columns), row * (height // rows)),
            )
    return as_jpeg(picture)


@cache
def words() -> tuple[str, ...]:
    texts = (turn["user"] + " " + turn["assistant"] for row in load_corpus() for turn in row["texts"])
    return tuple(" ".join(texts).split())


def document(rng: np.random.Generator) -> bytes:
    """Return a page of text, A4 at 150 dots an inch."""
    fonts = Path(mpl.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(fonts / "DejaVuSerif.ttf"), 22)
    page = Image.new("RGB", (1240, 1754), "white")
    draw = ImageDraw.Draw(page)
    at = int(rng.integers(len(words())))
    for top in range(90, 1660, 31):
        line = ""
        while draw.textlength(line + words()[at % len(words())], font=font) < 1080:
            line += words()[at % len(words())] + " "
            at += 1
        draw.text((80, top), line, font=font, fill=(20, 20, 20))
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def chart(rng: np.random.Generator) -> bytes:
    """Return lines, bars or points."""
    figure = Figure(figsize=(8, 6), dpi=100)
    axes = figure.subplots()
    kind = int(rng.integers(3))
    if kind == 0:
        axes.plot(rng.normal(size=(100, 4)).cumsum(axis=0))
    elif kind == 1:
        axes.bar(np.arange(12), rng.random(12))
    else:
        axes.scatter(rng.normal(size=800), rng.normal(size=800), c=rng.random(800), alpha=0.6)
    axes.set_title("measured values")
    axes.grid(visible=True)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def pictures(name: str, count: int, seed: int = 0) -> list[bytes]:
    """Return files of one class.

    Args:
        name: One of `SHARES`.
        count: How many.
        seed: Decides which.
    """
    rng = np.random.default_rng((seed, list(SHARES).index(name)))
    kind, size = name.split()
    width, height = (int(side) for side in size.split("x"))
    if kind == "document":
        return [document(rng) for _ in range(count)]
    if kind == "chart":
        return [chart(rng) for _ in range(count)]
    return [photo(width, height, rng) for _ in range(count)]


def rows(scale: float = 1.0, seed: int = 0) -> list[dict[str, object]]:
    """Return the mix as rows of a data set, `images` as bytes and `texts` of one to three turns, shuffled.

    Args:
        scale: Share of the 80 samples to make; every class has at least one picture.
        seed: Decides which.
    """
    rng = np.random.default_rng(seed)
    files = [
        file for name, count in SHARES.items() for file in pictures(name, max(1, round(count * scale)), seed)
    ]
    files = [files[i] for i in rng.permutation(len(files))]
    turns = [turn for row in load_corpus() for turn in row["texts"]]
    num_special = max(1, round(4 * scale))
    images = [[], *([file] for file in files[2 * num_special :])] + [[] for _ in range(num_special - 1)]
    images += [[files[2 * i], files[2 * i + 1]] for i in range(num_special)]
    return [
        {
            "images": images[i],
            "texts": [turns[k] for k in rng.integers(len(turns), size=int(rng.integers(1, 4)))],
        }
        for i in rng.permutation(len(images))
    ]
