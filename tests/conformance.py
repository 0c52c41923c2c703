"""What every stage promises, to be run on each of them: subclass `StageContract` and say how to run it."""

from __future__ import annotations

import copy
import json
import pickle
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.strategies import mixed_rows
from vlmpack.errors import REASONS
from vlmpack.samples import Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence


class StageContract:
    """One outcome for each input, the same each time, from a copy too, and the input left as it was.

    A subclass gives `inputs`, `make` and `run`; an outcome is a `Refusal` or anything that has keys.
    """

    drops_broken = True
    """Whether the inputs have rows that the stage must refuse."""

    def inputs(self) -> list:
        """Return what goes in: by default each kind of broken row, and good ones between them."""
        return mixed_rows()

    def make(self, inputs: list) -> object:
        """Return a new stage."""
        raise NotImplementedError

    def run(self, stage: object, inputs: list) -> list[object]:
        """Return all outcomes of one pass."""
        raise NotImplementedError

    def keys_in(self, inputs: Sequence[object]) -> list[str]:
        """Return the keys that must come out: by default the positions."""
        return [str(number) for number in range(len(inputs))]

    def keys_of(self, outcome: object) -> list[str]:
        """Return the keys of an outcome."""
        return list(getattr(outcome, "keys", None) or [outcome.key])

    def test_each_input_comes_out_exactly_once(self):
        inputs = self.inputs()
        outcomes = self.run(self.make(inputs), inputs)
        found = sorted(key for outcome in outcomes for key in self.keys_of(outcome))
        assert found == sorted(self.keys_in(inputs))

    def test_refusals_say_what_and_why(self):
        inputs = self.inputs()
        refusals = [item for item in self.run(self.make(inputs), inputs) if isinstance(item, Refusal)]
        assert bool(refusals) == self.drops_broken
        for refusal in refusals:
            assert refusal.reason in REASONS
            assert 20 < len(refusal.message) < 2_000
            assert refusal.message == refusal.message.strip()
            json.dumps(dict(refusal.numbers))

    def test_something_is_accepted(self):
        inputs = self.inputs()
        assert any(not isinstance(item, Refusal) for item in self.run(self.make(inputs), inputs))

    def test_a_second_pass_gives_the_same(self):
        inputs = self.inputs()
        stage = self.make(inputs)
        assert same(self.run(stage, inputs), self.run(stage, inputs))

    def test_a_pickled_stage_gives_the_same(self):
        inputs = self.inputs()
        stage = self.make(inputs)
        twin = pickle.loads(pickle.dumps(stage))  # noqa: S301 - our own
        assert same(self.run(twin, inputs), self.run(stage, inputs))

    def test_the_input_is_left_as_it_was(self):
        inputs = self.inputs()
        before = copy.deepcopy(inputs)
        self.run(self.make(inputs), inputs)
        assert same(inputs, before)

    def test_records_cannot_be_changed(self):
        inputs = self.inputs()
        for outcome in self.run(self.make(inputs), inputs):
            if not isinstance(outcome, tuple):
                name = next(iter(outcome.__slots__))
                with pytest.raises(AttributeError):
                    setattr(outcome, name, None)


def same(first: object, second: object) -> bool:
    """Return whether two values are equal all the way down, arrays, tensors and pictures included."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    slots = getattr(type(first), "__slots__", None)
    if slots and not isinstance(first, str | bytes | int | float):
        return all(same(getattr(first, name), getattr(second, name)) for name in slots)
    return bool(first == second)
