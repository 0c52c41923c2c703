"""Errors tell whose fault it is, can be caught by the usual names, and cross processes whole."""

from __future__ import annotations

import copy
import pickle

import pytest

from vlmpack import errors
from vlmpack.errors import (
    REASONS,
    BudgetError,
    ConfigError,
    OversizeError,
    SampleError,
    SourceError,
    VlmpackError,
)
from vlmpack.samples import Refusal

RAISED = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VlmpackError)]


def test_every_error_is_one_of_ours():
    assert set(RAISED) >= {BudgetError, ConfigError, OversizeError, SampleError, SourceError, VlmpackError}
    assert all(kind.__doc__ for kind in RAISED)


@pytest.mark.parametrize(
    ("kind", "usual"),
    [
        (ConfigError, ValueError),
        (BudgetError, ValueError),
        (OversizeError, ValueError),
        (OversizeError, BudgetError),
        (SourceError, RuntimeError),
    ],
)
def test_errors_can_be_caught_by_the_usual_name(kind, usual):
    assert issubclass(kind, usual)


def test_reasons_are_words_and_none_is_there_twice():
    assert len(set(REASONS)) == len(REASONS) > 10
    assert all(reason.isidentifier() and reason.islower() for reason in REASONS)


def test_a_refusal_has_all_that_its_error_says():
    error = SampleError("image_missing", "image 3 is None", image=3, path="x")
    refusal = Refusal.of("key", error)
    assert (refusal.key, refusal.reason, refusal.message) == ("key", "image_missing", "image 3 is None")
    assert refusal.numbers == {"image": 3, "path": "x"}
    error.numbers["image"] = 4
    assert refusal.numbers["image"] == 3, "a refusal is on its own"
    assert str(error) == error.message


def through_a_pipe(error):
    return pickle.loads(pickle.dumps(error))  # noqa: S301 - our own


@pytest.mark.parametrize("kind", [ConfigError, BudgetError, OversizeError, SourceError])
@pytest.mark.parametrize("travel", [copy.copy, through_a_pipe])
def test_errors_cross_processes(kind, travel):
    error = travel(kind("what, how much, what helps"))
    assert type(error) is kind
    assert str(error) == "what, how much, what helps"


@pytest.mark.parametrize("travel", [copy.copy, through_a_pipe])
def test_a_sample_error_crosses_processes_with_its_reason_and_numbers(travel):
    error = travel(SampleError("image_missing", "image 3 is None", image=3))
    assert (error.reason, error.message, error.numbers) == ("image_missing", "image 3 is None", {"image": 3})
