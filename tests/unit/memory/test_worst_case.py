"""The reference document's worked example: what it counts, and what a step really needs."""

from __future__ import annotations

import pytest

from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling
from vlmpack.memory import (
    PRESETS,
    estimate,
    remedies,
    vit_memory_nominal,
    worked_example,
    worst_case_tiles_feasible,
    worst_case_tiles_nominal,
)
from vlmpack.memory.worst_case import REFERENCE_REGIME

GIB = 2**30


def test_the_nominal_worst_case_is_1224_tiles():
    assert worst_case_tiles_nominal(rows=4, max_images=18) == 4 * 18 * 17 == 1224
    # the same with six images a pack, and with the batch of two that the configuration really has
    assert worst_case_tiles_nominal(rows=4, max_images=6) == 408
    assert worst_case_tiles_nominal(rows=2, max_images=18) == 612


def test_tokens_allow_252_of_them():
    # 4096 // 65 = 63 tiles a row
    assert worst_case_tiles_feasible(rows=4) == 252
    assert worst_case_tiles_feasible(rows=2) == 126
    # without the position token, as the document counts: 4096 // 64 = 64
    assert worst_case_tiles_feasible(rows=4, tiling=Tiling(position_tokens=0)) == 256


def test_the_smallest_limit_decides():
    # three images of 17 tiles
    assert worst_case_tiles_feasible(rows=1, max_images=3) == 51
    assert worst_case_tiles_feasible(rows=1, max_images=None) == 63
    assert worst_case_tiles_feasible(rows=3, max_tiles_per_row=20) == 60


def test_a_smaller_side_is_fewer_tiles():
    # 1536 pixels: 3 * 3 + 1, 1024 pixels: 2 * 2 + 1 tiles an image
    assert worst_case_tiles_nominal(rows=2, max_images=8, tiling=Tiling(max_side=1536)) == 160
    assert worst_case_tiles_nominal(rows=1, max_images=1, tiling=Tiling(max_side=1024)) == 5


def test_a_side_of_1024_is_3_4_times_fewer_tiles():
    sides = [
        worst_case_tiles_nominal(rows=1, max_images=1, tiling=Tiling(max_side=side)) for side in (2048, 1024)
    ]
    assert sides == [17, 5]
    assert sides[0] / sides[1] == 3.4


def test_a_batch_of_one_takes_a_quarter_of_the_activations_of_four():
    # 63 tiles a row; 16 of them make a step, and its gradients are there throughout
    regime = REFERENCE_REGIME.model_copy(update={"accumulation": True})
    one, four = (
        estimate(PRESETS["nanovlm-460m"], regime, rows=rows, tokens_per_row=4096, tiles=63 * rows)
        for rows in (1, 4)
    )
    kept = ("inputs", "vision", "connector", "language")
    small, large = (sum(step.peak.parts[name] for name in kept) for step in (one, four))
    fixed = PRESETS["nanovlm-460m"].num_parameters * 2  # autocast's copies of the weights
    assert (large - fixed) / (small - fixed) == pytest.approx(4, rel=0.01)
    assert one.peak.parts["gradients"] == four.peak.parts["gradients"] > 0


def test_the_encoder_in_sub_batches_of_256_and_512_tiles_is_a_remedy():
    load = {"rows": 4, "tokens_per_row": 4096, "tiles": 1224}
    names = [remedy.name for remedy in remedies(PRESETS["nanovlm-460m"], REFERENCE_REGIME, "H100", **load)]
    for size in (256, 512):
        assert f"vision encoder on {size} tiles at a time" in names


def test_the_image_limit_is_a_paradox():
    # 17 tiles of 64 tokens; 18 such images are far above 4,096 tokens, and 3 are what fits
    assert 17 * 64 == 1088
    assert 18 * 1088 == 19_584
    assert 4096 // 1088 == 3
    assert worst_case_tiles_feasible(rows=1, max_images=18) < worst_case_tiles_nominal(rows=1, max_images=18)


def test_a_1224_tile_batch_has_1253376_patches():
    assert vit_memory_nominal(1224).tokens == 1_253_376


def test_the_documents_figures_are_reproduced_in_gib():
    count = vit_memory_nominal(1224)
    assert count.attention == 1224 * 12 * 1024**2 * 2  # "~29 GB"
    assert round(count.attention / GIB, 2) == 28.69
    assert round(count.qkv / GIB, 2) == 5.38  # "~5 GB"
    assert round(count.ffn / GIB, 2) == 7.17  # "~7 GB"
    assert round(count.layer / GIB, 2) == 41.24  # "~41 GB"
    assert round(count.total / GIB, 2) == 494.86  # "~494 GB"


def test_static_memory_is_not_6_7():
    parameters = PRESETS["nanovlm-460m"].num_parameters
    parts = [round(4 * parameters * times / GIB, 1) for times in (1, 1, 2)]
    assert parts == [1.7, 1.7, 3.4]
    assert round(16 * parameters / GIB, 2) == 6.86


def test_the_worked_example_names_its_errata():
    lines = {line.claim: line for line in worked_example()}
    assert "252" in lines["1,224 tiles"].verdict
    assert lines["~41 GB a layer"].exact == "28.69 + 5.38 + 7.17 = 41.24 GiB"
    assert lines["~494 GB"].exact == "494.86 GiB"
    # traced: 440.3 GiB with SDPA, 1,653 eager, 98.0 with checkpointing
    for figure in ("440.2", "1652.7", "97.9"):
        assert figure in lines["~494 GB"].verdict
    # traced: 174.3 GiB for 408 tiles, 75.9 for 160
    assert "174.2" in lines["408 tiles: ~12 GB"].verdict
    assert lines["35-45 GB at batch 2, 8 images, 1536 pixels"].exact.startswith("76.1")
    # the advice for 80 GB, derived again
    advice = lines["80 GB: batch 2, 8 images a pack, 3 an example, 1536 pixels"]
    assert advice.exact.startswith("2 packs of 63 tiles")


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"max_images": 0}, {"rows": 1.5}, {"rows": True}])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ConfigError):
        worst_case_tiles_nominal(**wrong)
