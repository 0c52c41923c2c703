"""What may enter the buffer: each limit, each policy, and messages with the figures and a remedy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import SMALL, only, png, row, samples_of, tokenizer
from tests.strategies import made_samples
from vlmpack.budget import PackBudget, SampleCost
from vlmpack.errors import BudgetError, ConfigError, OversizeError
from vlmpack.samples import Refusal, Sample
from vlmpack.stages import Admission, ImageTokens
from vlmpack.stages.placeholders import retile

TOKENS = ImageTokens.of(tokenizer(), SMALL)


def retile_made(sample, tiling):
    """Re-tile a made sample as VQADataset does; it has sizes instead of image files."""
    return retile(sample, TOKENS, tiling)


def admission(max_tokens=100, max_images=None, max_patches=None, **settings):
    budget = PackBudget(max_tokens=max_tokens, max_images=max_images, max_patches=max_patches)
    return Admission(budget=budget, **settings)


def sample(num_tokens=10, num_images=0, num_patches=0):
    ids = np.arange(num_tokens, dtype=np.int64)
    return Sample(
        key="s",
        input_ids=ids,
        labels=ids.copy(),
        images=(),
        geometries=(),
        image_starts=(),
        cost=SampleCost(num_tokens=num_tokens, num_images=num_images, num_patches=num_patches),
    )


def test_a_sample_within_every_limit_passes_unchanged():
    given_sample = sample(100, 3, 50)
    assert admission(100, 3, 50, max_images_per_example=3)(given_sample) is given_sample


@pytest.mark.parametrize(
    ("cost", "axis", "used", "limit"),
    [((101, 3, 50), "tokens", 101, 100), ((100, 4, 50), "images", 4, 3), ((100, 3, 51), "patches", 51, 50)],
)
def test_one_over_the_budget_on_any_axis_is_refused_with_the_figures(cost, axis, used, limit):
    refusal = admission(100, 3, 50)(sample(*cost))
    assert isinstance(refusal, Refusal)
    assert (refusal.key, refusal.reason) == ("s", "over_budget")
    assert f"{used} {axis} where a pack holds {limit}" in refusal.message
    assert refusal.numbers == {f"num_{axis}": used, f"max_{axis}": limit}


def test_all_axes_that_are_over_are_named():
    refusal = admission(100, 3, 50)(sample(101, 4, 51))
    used = {"num_tokens": 101, "num_images": 4, "num_patches": 51}
    assert refusal.numbers == used | {"max_tokens": 100, "max_images": 3, "max_patches": 50}


def test_the_appended_token_counts():
    assert isinstance(admission(100, extra_tokens=1)(sample(99)), Sample)
    assert admission(100, extra_tokens=1)(sample(100)).reason == "over_budget"
    assert admission(100, extra_tokens=1).packed_cost(sample(99)).num_tokens == 100
    assert admission(100).packed_cost(sample(99)).num_tokens == 99


def test_max_sample_length_refuses_at_the_limit_not_above_it():
    assert isinstance(admission(max_sample_length=50)(sample(49)), Sample)
    refusal = admission(max_sample_length=50)(sample(50))
    assert (refusal.reason, refusal.numbers) == ("sample_too_long", {"num_tokens": 50, "limit": 50})


def test_max_images_per_example_allows_the_limit():
    assert isinstance(admission(max_images_per_example=2)(sample(10, 2)), Sample)
    refusal = admission(max_images_per_example=2)(sample(10, 3))
    assert (refusal.reason, refusal.numbers) == ("too_many_images", {"num_images": 3, "limit": 2})
    assert admission(max_images_per_example=0)(sample(10, 1)).reason == "too_many_images"


@pytest.mark.parametrize(
    ("settings", "cost", "figures"),
    [
        ({}, (101,), "101 tokens where a pack holds 100"),
        ({"max_sample_length": 50}, (50,), "50 tokens"),
        ({"max_images_per_example": 2}, (10, 3), "3 images; the limit is 2"),
    ],
)
def test_raise_stops_with_the_key_and_the_figures(settings, cost, figures):
    with pytest.raises(OversizeError, match=f"sample s: {figures}") as caught:
        admission(oversize="raise", **settings)(sample(*cost))
    assert isinstance(caught.value, BudgetError)
    assert isinstance(caught.value, ValueError)


def test_the_remedy_fits_the_sample_and_the_policy():
    text, picture = sample(101), replace(sample(101, 1, 20), geometries=(SMALL.image(64, 64),))
    assert "truncate_text" in admission()(text).message
    assert "fewer_tiles" not in admission()(text).message
    assert "fewer_tiles" in admission()(picture).message
    tiled = admission(oversize="fewer_tiles", tiling=SMALL, retile=lambda sample, _: sample)
    assert "oversize='fewer_tiles' could not make it fit" in tiled(picture).message
    assert "lower max_side" not in tiled(text).message


# Fewer tiles


def picture_sample(width=128, height=128, question="Before ", answer=" after"):
    return only(samples_of([row(f"{question}<image>", answer, images=[png(width, height)])]))


def with_fewer_tiles(stage, **limits):
    return admission(oversize="fewer_tiles", tiling=SMALL, retile=stage.retile, **limits)


@pytest.mark.parametrize(
    ("max_patches", "tiles"),
    [
        (68, 17),  # 128 x 128: 4 x 4 tiles and the global one, 4 patches each
        (67, 10),  # at most 96 a side: 3 x 3 and the global one
        (40, 10),
        (39, 5),  # at most 64 a side: 2 x 2 and the global one
        (19, 1),  # at most 32: one tile
        (4, 1),
    ],
)
def test_tiles_shrink_until_the_sample_fits(max_patches, tiles):
    stage = samples_of([row("Before <image>", " after", images=[png(128, 128)])])
    whole = only(stage)
    fitted = with_fewer_tiles(stage, max_tokens=1000, max_patches=max_patches)(whole)
    assert fitted.geometries[0].num_tiles == tiles
    assert fitted.cost == SampleCost(
        num_tokens=whole.cost.num_tokens - 5 * (17 - tiles), num_images=1, num_patches=4 * tiles
    )
    assert len(fitted.input_ids) == len(fitted.labels) == fitted.cost.num_tokens
    start = whole.image_starts[0]
    assert fitted.image_starts == (start,)
    assert np.array_equal(fitted.input_ids[:start], whole.input_ids[:start])
    assert np.array_equal(fitted.input_ids[start + 5 * tiles :], whole.input_ids[start + 5 * 17 :])
    assert np.array_equal(fitted.labels[start + 5 * tiles :], whole.labels[start + 5 * 17 :])


def test_tiles_shrink_for_tokens_and_for_the_sample_length_too():
    stage = samples_of([row("Before <image>", " after", images=[png(128, 128)])])
    whole = only(stage)
    text = whole.cost.num_tokens - 17 * 5
    fitted = with_fewer_tiles(stage, max_tokens=text + 10 * 5)(whole)
    assert fitted.geometries[0].num_tiles == 10
    shorter = with_fewer_tiles(stage, max_tokens=1000, max_sample_length=text + 10 * 5)(whole)
    assert shorter.geometries[0].num_tiles == 5, "the length must stay under max_sample_length"


@pytest.mark.parametrize("limits", [{"max_patches": 3}, {"max_tokens": 10}, {"max_images": 0}])
def test_what_one_tile_an_image_cannot_fit_is_refused(limits):
    stage = samples_of([row("Before <image>", " after", images=[png(128, 128)])])
    refusal = with_fewer_tiles(stage, **{"max_tokens": 1000, **limits})(only(stage))
    assert refusal.reason == "over_budget"


def test_too_many_images_cannot_be_cured_by_fewer_tiles():
    stage = samples_of([row(images=[png(128, 128)] * 2)])
    refusal = with_fewer_tiles(stage, max_tokens=1000, max_patches=9, max_images_per_example=1)(only(stage))
    assert refusal.reason == "too_many_images"


def text_ids(sample):
    return sample.input_ids[(sample.input_ids >= 1000) & (sample.input_ids < 2000)].tolist()


@given(made=made_samples(), limits=st.tuples(st.integers(1, 200), st.integers(0, 3), st.integers(0, 80)))
def test_whatever_passes_fits_and_keeps_its_text(made, limits):
    for policy in ("drop", "fewer_tiles", "truncate_text"):
        admit = admission(*limits, oversize=policy, tiling=SMALL, retile=retile_made, extra_tokens=1)
        outcome = admit(made)
        if isinstance(outcome, Refusal):
            assert outcome.key == made.key
            continue
        assert not admit.budget.exceeded_by(admit.packed_cost(outcome))
        assert len(outcome.input_ids) == len(outcome.labels) == outcome.cost.num_tokens
        assert (outcome.labels[1:] != -100).any()
        if policy == "fewer_tiles":
            assert text_ids(outcome) == text_ids(made)
        else:
            length = len(outcome.input_ids)
            assert np.array_equal(outcome.input_ids, made.input_ids[:length])
            assert np.count_nonzero(made.input_ids[length:] == 7) == 0, "no image token is cut off"


# Truncated text


def test_truncation_cuts_the_end_of_the_answer():
    whole = only(samples_of([row("Before <image>", "a b c d e f g h i j", images=[png(32, 32)])]))
    length = whole.cost.num_tokens - 3
    cut = admission(max_tokens=length, oversize="truncate_text")(whole)
    assert cut.cost == SampleCost(num_tokens=length, num_images=1, num_patches=4)
    assert np.array_equal(cut.input_ids, whole.input_ids[:-3])
    assert np.array_equal(cut.labels, whole.labels[:-3])
    under = admission(max_tokens=1000, max_sample_length=length, oversize="truncate_text")(whole)
    assert under.cost.num_tokens == length - 1


def test_truncation_never_cuts_an_image_or_the_last_target():
    whole = only(samples_of([row("q", "answer <image> b", images=[png(64, 64)])]))
    end = whole.image_starts[0] + 25  # 2 x 2 tiles and the global one, 5 tokens each
    assert isinstance(admission(max_tokens=end, oversize="truncate_text")(whole), Sample)
    assert admission(max_tokens=end - 1, oversize="truncate_text")(whole).reason == "over_budget"
    text = only(samples_of([row("a long question", "x")]))
    first = int(np.flatnonzero(text.labels != -100)[0])
    assert isinstance(admission(max_tokens=first + 1, oversize="truncate_text")(text), Sample)
    assert admission(max_tokens=first, oversize="truncate_text")(text).reason == "over_budget"


# Settings


@pytest.mark.parametrize("name", ["max_sample_length", "max_images_per_example"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "4"])
def test_a_wrong_limit_is_refused_at_construction(name, value):
    with pytest.raises(ConfigError, match=name):
        admission(**{name: value})


def test_a_length_of_zero_is_refused_but_no_images_is_a_wish():
    with pytest.raises(ConfigError):
        admission(max_sample_length=0)
    assert isinstance(admission(max_images_per_example=0)(sample(10)), Sample)


def test_a_policy_that_does_not_exist_or_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="oversize must be one of"):
        admission(oversize="squeeze")
    with pytest.raises(ConfigError, match="needs samples that can be tiled again"):
        admission(oversize="fewer_tiles")
