"""The named workloads are what their descriptions say, and stay the same numbers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from benchmarks import workloads as benchmark_workloads
from vlmpack.errors import ConfigError
from vlmpack.packing.workloads import BUDGET, MAX_IMAGES, MAX_TILES, MAX_TOKENS, WORKLOADS, costs_of

# Name -> the first 16 digits of the SHA-256 of a draw (n = 1,000, seed 0, little-endian int64), and its sums
# of tokens, images and tiles; noted from the generators that docs/experiments.md was measured with.
DRAWN = {
    "text": ("d3d164e685d05cd7", [451271, 0, 0]),
    "vlm_tiles": ("6e2f5555277fc3a6", [820826, 1225, 9668]),
    "planted_half": ("cbc1b746bcba02e0", [1380352, 1954, 5199]),
    "over_half": ("7194b2fc83044455", [1975370, 0, 0]),
    "anticorrelated": ("8075628343b54327", [826362, 1833, 8359]),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_numbers_stay_those_that_published_figures_rest_on(name):
    costs = costs_of(name, 1000)
    digest = hashlib.sha256(costs.astype("<i8").tobytes()).hexdigest()[:16]
    assert (digest, costs.sum(axis=0).tolist()) == DRAWN[name]


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_sample_fits_a_pack_and_the_seed_decides(name):
    costs = costs_of(name, 2000, seed=1)
    assert (costs.dtype, costs.shape, costs.flags.c_contiguous) == (np.int64, (2000, 3), True)
    assert costs[:, 0].min() >= 1
    assert costs.min() >= 0
    assert (costs <= BUDGET).all()
    np.testing.assert_array_equal(costs, costs_of(name, 2000, seed=1))
    assert (costs != costs_of(name, 2000, seed=2)).any()


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_samples_can_be_drawn(name, n):
    assert costs_of(name, n).shape == (n, 3)


def test_text_and_over_half_use_one_axis():
    for name in ("text", "over_half"):
        assert costs_of(name, 1000)[:, 1:].sum() == 0


def test_nine_in_ten_of_over_half_are_just_above_half():
    tokens = costs_of("over_half", 10_000)[:, 0]
    above = tokens > MAX_TOKENS // 2
    assert 0.88 < above.mean() < 0.92  # 0.9, give or take six standard deviations of 0.003
    assert tokens[above].max() <= MAX_TOKENS // 2 + 200
    assert tokens[~above].max() <= 600


def test_tiles_come_with_images_and_with_their_tokens():
    tokens, images, tiles = costs_of("vlm_tiles", 10_000).T
    assert images.min() == 1
    assert images.max() == 4
    assert (tiles >= images).all()
    assert (tokens > 65 * tiles).all()  # 64 image tokens and a position token a tile, and some text
    # An image is 1 tile, or a grid of 2 to 16 and a global one.
    alone = set(tiles[images == 1].tolist())
    assert alone <= {1, *range(3, 18)}
    assert 1 in alone


def test_anticorrelated_samples_are_long_or_have_tiles():
    tokens, images, tiles = costs_of("anticorrelated", 10_000).T
    assert ((images == 0) == (tiles == 0)).all()
    assert tokens[tiles == 0].mean() > 2 * tokens[tiles > 0].mean()


def test_planted_packs_are_full():
    """Without the cut at n, every pack is one sample above half and what fills it: tokens add up exactly."""
    tokens, images, tiles = costs_of("planted_half", 30_000).T
    large = tokens > MAX_TOKENS // 2
    # A pack for each large sample, full but for the last one of each of at most a few blocks.
    assert abs(tokens.sum() / MAX_TOKENS - large.sum()) <= 3
    # At most 4 samples a pack with at most 4 images and 12 tiles each: these two never bind.
    assert 4 * images.max() <= MAX_IMAGES
    assert 4 * tiles.max() <= MAX_TILES


def test_the_benchmarks_use_the_same_numbers():
    assert benchmark_workloads.costs_of is costs_of
    assert benchmark_workloads.BUDGET is BUDGET


def test_a_wrong_name_or_number_is_refused():
    with pytest.raises(ConfigError, match="no workload 'texts'; choose one of text, vlm_tiles"):
        costs_of("texts", 10)
    for n, seed in ((-1, 0), (1, -1)):
        with pytest.raises(ConfigError, match=f"got {n} and {seed}"):
            costs_of("text", n, seed)
