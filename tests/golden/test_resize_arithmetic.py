"""Sizes from running nanoVLM's DynamicResize and splitters on 1,578 picture sizes.

data/dynamic_resize.json: columns and rows; tile size, largest side, scale-up flag, picture, result.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmpack.geometry import Tiling, resize_target

VECTORS = json.loads((Path(__file__).parent / "data" / "dynamic_resize.json").read_text(encoding="utf-8"))
ROWS = [dict(zip(VECTORS["columns"], row, strict=True)) for row in VECTORS["rows"]]
SETTINGS = sorted({(r["patch_size"], r["max_side_len"], r["resize_to_max_side_len"]) for r in ROWS})


def test_there_are_enough_vectors_for_each_setting():
    assert len(ROWS) == 1578
    assert len(SETTINGS) == 6
    assert {flag for *_, flag in SETTINGS} == {True, False}


@pytest.mark.parametrize("setting", SETTINGS)
def test_geometry_is_the_reference_pipelines(setting):
    tile_size, max_side, flag = setting
    tiling = Tiling(tile_size=tile_size, max_side=max_side, resize_to_max_side=flag, reference_rounding=True)
    rows = [r for r in ROWS if (r["patch_size"], r["max_side_len"], r["resize_to_max_side_len"]) == setting]
    wrong = []
    for row in rows:
        found = tiling.image(row["height"], row["width"])
        expected = (row["out_height"], row["out_width"], row["grid_rows"], row["grid_cols"])
        got = (found.height, found.width, found.grid.rows, found.grid.columns)
        if got != expected or found.num_tiles != row["tiles_with_global"]:
            wrong.append((row, got, found.num_tiles))
    assert len(rows) == 263
    assert not wrong


def test_arithmetic_is_float_and_left_to_right():
    # 273 x 2048 / 364 is 1536 exactly, but 2048 / 364 rounds up: x 273 / 512 is a hair over 3 tiles.
    assert resize_target(273, 364, tile_size=512, max_side=2048, resize_to_max_side=True) == (2048, 2048)
    row = next(r for r in ROWS if (r["width"], r["height"]) == (364, 273) and r["max_side_len"] == 2048)
    assert (row["out_height"], row["out_width"]) == (2048, 2048)
