"""What must hold for any picture and any tiling."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import example, given
from hypothesis import strategies as st

from vlmpack.geometry import Tiling

sides = st.one_of(st.integers(1, 64), st.integers(1, 5000), st.integers(1, 70_000))


@st.composite
def tilings(draw):
    patch_size = draw(st.sampled_from([1, 14, 16]))
    tile_size = patch_size * draw(st.integers(1, 40))
    return Tiling(
        tile_size=tile_size,
        max_side=tile_size * draw(st.integers(1, 9)),
        resize_to_max_side=draw(st.booleans()),
        patch_size=patch_size,
        tokens_per_tile=draw(st.integers(1, 256)),
        position_tokens=draw(st.integers(0, 1)),
        reference_rounding=draw(st.booleans()),
        global_tile=draw(st.booleans()),
    )


def exact_target(tiling, long, short):
    """Sides in exact arithmetic: what the float formula approximates."""
    target = min(tiling.max_side, math.ceil(Fraction(long, tiling.tile_size)) * tiling.tile_size)
    if tiling.resize_to_max_side:
        target = tiling.max_side
    tiles = Fraction(short) * target / long / tiling.tile_size
    return target, max(math.ceil(tiles), 1) * tiling.tile_size, tiles


@given(tilings(), sides, sides)
@example(Tiling(resize_to_max_side=True), 273, 364)
@example(Tiling(max_side=1536, resize_to_max_side=True, reference_rounding=True), 1092, 1092)
def test_sides_are_the_exact_ones_or_a_rounding_error_away(tiling, height, width):
    found = tiling.image(height, width)
    long, short = max(height, width), min(height, width)
    target, exact_short, tiles = exact_target(tiling, long, short)
    got_long, got_short = (found.width, found.height) if width >= height else (found.height, found.width)
    assert got_long == target
    if got_short != exact_short:
        # Only where the exact side is a whole number of tiles, give or take an error of float.
        assert abs(got_short - exact_short) == tiling.tile_size
        assert abs(tiles - round(tiles)) < Fraction(1, 10**9)


@given(tilings(), sides, sides)
def test_tiles_cover_the_resized_picture_and_costs_follow_their_number(tiling, height, width):
    found = tiling.image(height, width)
    assert found.height == found.grid.rows * tiling.tile_size
    assert found.width == found.grid.columns * tiling.tile_size
    assert found.grid.num_tiles == found.grid.rows * found.grid.columns >= 1
    assert found.has_global_tile == (tiling.global_tile and found.grid.num_tiles > 1)
    assert found.num_tiles == found.grid.num_tiles + found.has_global_tile
    per_side = tiling.tile_size // tiling.patch_size
    assert found.num_patches == found.num_tiles * per_side * per_side
    assert found.num_image_tokens == found.num_tiles * tiling.tokens_per_tile
    assert found.num_tokens == found.num_image_tokens + found.num_tiles * tiling.position_tokens


@given(tilings(), sides, sides)
def test_turning_a_picture_turns_its_grid(tiling, height, width):
    upright, turned = tiling.image(height, width), tiling.image(width, height)
    if height == width:
        assert upright == turned
    else:
        assert (turned.height, turned.width) == (upright.width, upright.height)
    assert turned.num_tokens == upright.num_tokens


@given(sides, sides, st.booleans())
def test_no_side_exceeds_the_reference_configurations_largest(height, width, enlarge):
    found = Tiling(resize_to_max_side=enlarge, reference_rounding=True).image(height, width)
    assert max(found.height, found.width) <= 2048


@given(tilings(), sides, sides)
@example(Tiling(max_side=1536, resize_to_max_side=True), 1092, 1092)
def test_no_grid_is_larger_than_the_position_tokens_reach(tiling, height, width):
    grid = tiling.image(height, width).grid
    assert max(grid.rows, grid.columns) <= tiling.max_grid_side
    if not tiling.reference_rounding:
        assert tiling.max_grid_side == tiling.max_side // tiling.tile_size


@given(tilings(), sides, sides)
def test_smaller_tilings_need_no_more_tiles_along_the_long_side(tiling, height, width):
    smaller = tiling.smaller()
    if smaller is None:
        assert tiling.max_side == tiling.tile_size
        return
    assert smaller.max_side == tiling.max_side - tiling.tile_size
    before, after = tiling.image(height, width), smaller.image(height, width)
    long_side = "columns" if width >= height else "rows"
    assert getattr(after.grid, long_side) <= getattr(before.grid, long_side)
