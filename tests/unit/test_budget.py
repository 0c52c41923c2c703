"""Costs add up, budgets keep their limits, and wrong numbers are refused where they are made."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import costs
from vlmpack.budget import AXES, NO_COST, UNLIMITED, BatchBudget, PackBudget, SampleCost
from vlmpack.errors import ConfigError
from vlmpack.memory import PRESETS, TrainingRegime, max_tiles

COSTS = costs(1000, 50, 5000)


def cost(tokens, images, patches):
    return SampleCost(num_tokens=tokens, num_images=images, num_patches=patches)


@given(COSTS, COSTS, COSTS)
def test_costs_add_up_like_numbers(a, b, c):
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + NO_COST == a
    assert (a + b).as_tuple() == tuple(map(sum, zip(a.as_tuple(), b.as_tuple(), strict=True)))


@pytest.mark.parametrize("wrong", [(-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_a_negative_cost_is_refused(wrong):
    with pytest.raises(ConfigError, match="cannot be negative"):
        cost(*wrong)


def test_a_budget_without_limits_holds_anything():
    budget = PackBudget(max_tokens=10)
    assert budget.as_tuple() == (10, None, None)
    assert budget.as_array().tolist() == [10, UNLIMITED, UNLIMITED]
    assert budget.as_array().dtype == np.int64
    assert budget.exceeded_by(cost(10, 10**9, 10**12)) == {}


def test_sums_with_unlimited_do_not_overflow():
    assert int(np.int64(UNLIMITED) + np.int64(UNLIMITED - 1)) > 0


LIMITS = st.tuples(st.integers(1, 1000), st.none() | st.integers(0, 50), st.none() | st.integers(0, 5000))


@given(used=COSTS, limits=LIMITS)
def test_exactly_the_axes_over_their_limit_are_named(used, limits):
    budget = PackBudget(max_tokens=limits[0], max_images=limits[1], max_patches=limits[2])
    expected = {}
    for axis, number, limit in zip(AXES, used.as_tuple(), limits, strict=True):
        if limit is not None and number > limit:
            expected[axis] = (number, limit)
    assert budget.exceeded_by(used) == expected


@pytest.mark.parametrize("name", ["max_tokens", "max_images", "max_patches"])
@pytest.mark.parametrize("value", [-1, 1.0, "5", True, UNLIMITED, float("nan")])
def test_a_wrong_limit_of_a_pack_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be an integer"):
        PackBudget(**{"max_tokens": 10, name: value})


@pytest.mark.parametrize("value", [0, None])
def test_a_pack_must_hold_a_token(value):
    with pytest.raises(ConfigError, match="max_tokens must be an integer of at least 1"):
        PackBudget(max_tokens=value)


def test_a_pack_may_hold_no_image():
    budget = PackBudget(max_tokens=10, max_images=0, max_patches=0)
    assert budget.exceeded_by(cost(10, 0, 0)) == {}
    assert budget.exceeded_by(cost(10, 1, 4)) == {"images": (1, 0), "patches": (4, 0)}


@pytest.mark.parametrize(("name", "least"), [("max_packs", 1), ("max_patches", 0), ("max_tokens", 1)])
def test_limits_of_a_batch(name, least):
    assert getattr(BatchBudget(**{name: least}), name) == least
    assert getattr(BatchBudget(), name) is None
    for wrong in (least - 1, 1.5, "3", False):
        with pytest.raises(ConfigError, match=f"{name} must be an integer of at least {least}"):
            BatchBudget(**{name: wrong})


def test_records_are_frozen_and_compare_by_value():
    assert cost(1, 2, 3) == cost(1, 2, 3)
    assert hash(PackBudget(max_tokens=3)) == hash(PackBudget(max_tokens=3))
    with pytest.raises(AttributeError):
        cost(1, 2, 3).num_tokens = 5


def test_budgets_and_errors_need_neither_torch_nor_numba():
    code = (
        "import sys, vlmpack.budget, vlmpack.errors, vlmpack.geometry; "
        "print(*{'torch', 'numba', 'transformers', 'datasets', 'PIL'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split() == []


# ---- for a GPU ---------------------------------------------------------------------------------
REFERENCE = TrainingRegime(mask="padding", holds_logits=True)


def test_budgets_for_a_gpu_are_the_memory_models_limits():
    # docs/memory_model.md: 38 tiles fit 40 GB beside two rows of 4,096, so 19 for each of the two
    limit = max_tiles(PRESETS["nanovlm-460m"], REFERENCE, "A100-40", rows=2, tokens_per_row=4096).tiles
    pack = PackBudget.for_gpu("A100-40", "nanovlm-460m", REFERENCE, max_tokens=4096, rows=2, max_images=18)
    assert pack == PackBudget(max_tokens=4096, max_images=18, max_patches=limit // 2 * 1024)
    batch = BatchBudget.for_gpu("A100-40", "nanovlm-460m", REFERENCE, tokens_per_row=4096, rows=2)
    assert batch == BatchBudget(max_packs=2, max_patches=limit * 1024, max_tokens=8192)


def test_without_a_number_of_rows_a_batch_has_as_many_as_may_all_be_full_of_tiles():
    batch = BatchBudget.for_gpu("A100-80", PRESETS["nanovlm-460m"], REFERENCE, tokens_per_row=4096)
    assert batch == BatchBudget(max_packs=2, max_patches=2 * 63 * 1024, max_tokens=8192)


def test_a_regime_left_out_is_that_of_packed_rows():
    def patches(regime):
        return PackBudget.for_gpu("A100-40", "nanovlm-460m", regime, max_tokens=4096, rows=2).max_patches

    # a dense mask is kept in every layer
    assert patches(None) == patches(TrainingRegime(mask="packed")) < patches(TrainingRegime())


@pytest.mark.parametrize(("replay", "tiles"), [(False, 99), (True, 116)])
def test_a_replay_of_the_allocator_allows_more(replay, tiles):
    # docs/memory_model.md: sixteen rows of 512 tokens on 24 GB; a tile of 224 pixels has 14 x 14 patches
    settings = {"regime": REFERENCE, "rows": 16, "replay": replay}
    pack = PackBudget.for_gpu("3090", "nanovlm-222m", max_tokens=512, **settings)
    assert pack.max_patches == tiles // 16 * 14**2
    batch = BatchBudget.for_gpu("3090", "nanovlm-222m", tokens_per_row=512, **settings)
    assert batch == BatchBudget(max_packs=16, max_patches=tiles * 14**2, max_tokens=16 * 512)


@pytest.mark.parametrize(
    ("gpu", "model", "settings", "words"),
    [
        ("4090", "llava-1.5-7b", {}, "llava-1.5-7b does not fit 4090: .* too much before the first batch"),
        ("4090", "nanovlm-460m", {"rows": 2}, "without a single picture"),
        ("H100", "nanovlm-460m", {"rows": 0}, "at least one row, got 0"),
        ("H100", "nanovlm-460m", {"rows": -1}, "at least one row, got -1"),
        ("H100", "nanovlm-460m", {"max_tokens": 0}, "at least one token, got 0"),
        ("H100", "nanovlm-460m", {"margin": 20}, r"did you mean 0.2\?"),
        (-5, "nanovlm-460m", {}, "positive number of bytes, got -5"),
    ],
)
def test_what_no_budget_can_be_made_of_is_refused(gpu, model, settings, words):
    with pytest.raises(ConfigError, match=words):
        PackBudget.for_gpu(gpu, model, **{"max_tokens": 4096, **settings})


def test_budgets_load_no_memory_model_until_they_are_asked_and_no_torch_then():
    code = (
        "import sys; from vlmpack.budget import PackBudget\n"
        "before = [name for name in sys.modules if name.startswith('vlmpack.memory')]\n"
        "PackBudget.for_gpu('H100', 'nanovlm-460m', max_tokens=4096)\n"
        "print(before, sorted({'torch', 'numba', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
