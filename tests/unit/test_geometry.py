from __future__ import annotations

import pytest

from vlmpack.errors import ConfigError
from vlmpack.geometry import TileGrid, Tiling, resize_target


def target(height, width, *, enlarge=False, tile_size=512, max_side=2048):
    return resize_target(height, width, tile_size=tile_size, max_side=max_side, resize_to_max_side=enlarge)


@pytest.mark.parametrize(
    ("picture", "resized"),
    [
        ((600, 800), (1024, 1024)),  # long: 800 -> 1024, x 1.28; short: 600 -> 768 -> 1024
        ((480, 640), (1024, 1024)),  # long: 640 -> 1024, x 1.6; short: 480 -> 768 -> 1024
        ((640, 480), (1024, 1024)),  # the same, upright
        ((512, 512), (512, 512)),
        ((513, 512), (1024, 1024)),  # x 1.996; 512 -> 1022 -> 1024
        ((1, 1), (512, 512)),
        ((1, 5000), (512, 2048)),  # long capped; short: 0.4 -> at least one tile
        ((5000, 1), (2048, 512)),
        ((3000, 4000), (1536, 2048)),  # long capped, x 0.512; short: 3000 -> 1536 exactly
        ((2048, 2048), (2048, 2048)),
    ],
)
def test_sides_go_to_the_next_multiple_of_a_tile(picture, resized):
    assert target(*picture) == resized


@pytest.mark.parametrize(
    ("picture", "resized"),
    [
        ((480, 640), (1536, 2048)),  # x 3.2; 480 -> 1536
        ((386, 386), (2048, 2048)),
        ((1, 1), (2048, 2048)),
        ((100, 1000), (512, 2048)),  # x 2.048; 100 -> 204.8 -> 512
    ],
)
def test_every_picture_is_enlarged_to_the_largest_side_when_asked(picture, resized):
    assert target(*picture, enlarge=True) == resized


def test_costs_of_a_small_picture_enlarged():
    # 2048 x 2048 = 4 x 4 tiles + global = 17; a tile is 32 x 32 patches and 64 + 1 tokens.
    found = Tiling(resize_to_max_side=True).image(386, 386)
    assert found.grid == TileGrid(rows=4, columns=4)
    assert found.has_global_tile
    assert (found.num_tiles, found.num_patches) == (17, 17 * 1024)
    assert (found.num_image_tokens, found.num_tokens) == (17 * 64, 17 * 65)


def test_one_tile_has_no_global_tile():
    found = Tiling().image(300, 400)
    assert (found.height, found.width) == (512, 512)
    assert not found.has_global_tile
    assert (found.num_tiles, found.num_patches, found.num_image_tokens, found.num_tokens) == (1, 1024, 64, 65)


def test_global_tile_and_position_tokens_can_be_left_out():
    found = Tiling(global_tile=False, position_tokens=0).image(600, 800)
    assert not found.has_global_tile
    assert (found.num_tiles, found.num_tokens) == (4, 4 * 64)


def test_patches_follow_both_sizes():
    # 384 / 14 is no whole number; 378 / 14 = 27.
    tiling = Tiling(tile_size=378, max_side=756, patch_size=14)
    assert tiling.patches_per_tile == 729
    # 400 -> 756 wide, x 1.89; 300 -> 567 -> 756 high: 2 x 2 tiles and the global one
    assert tiling.image(300, 400).num_patches == 5 * 729


def test_float_arithmetic_can_take_a_side_one_tile_over_the_largest():
    # 1536 / 1092 rounds up, so 1092 x (1536 / 1092) is a hair over 1536 and the short side gets a
    # fourth row. The reference pipeline does the same (one of its vectors), so it is kept.
    assert target(1092, 1092, enlarge=True, max_side=1536) == (2048, 1536)
    assert Tiling(max_side=1536).max_grid_side == 3


def test_smaller_tilings_end_at_one_tile():
    sides, tiling = [], Tiling(resize_to_max_side=True)
    while tiling is not None:
        sides.append(tiling.max_side)
        assert tiling.resize_to_max_side
        tiling = tiling.smaller()
    assert sides == [2048, 1536, 1024, 512]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tile_size": 224, "max_side": 1024}, "224 does not divide max_side 1024.*896 or 1120"),
        ({"tile_size": 512, "max_side": 256}, "max_side 512"),
        ({"tile_size": 512, "patch_size": 14}, "patch_size 14 does not divide tile_size 512"),
        ({"tile_size": 0}, "tile_size must be a positive integer, got 0"),
        ({"max_side": 2048.0}, "max_side must be a positive integer, got 2048.0"),
        ({"patch_size": True}, "patch_size must be a positive integer, got True"),
        ({"tokens_per_tile": -1}, "tokens_per_tile must be a positive integer, got -1"),
        ({"position_tokens": -1}, "position_tokens must be 0 or 1 a tile, got -1"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_remedy(settings, words):
    with pytest.raises(ConfigError, match=words):
        Tiling(**settings)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 5)])
def test_pictures_without_pixels_are_refused(size):
    with pytest.raises(ConfigError, match="at least one pixel"):
        Tiling().image(*size)
