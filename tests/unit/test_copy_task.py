"""A toy in which isolation decides what is learnt; its numbers stand in docs/training.md."""

from __future__ import annotations

import pytest

from benchmarks.bench_copy_task import STEPS
from benchmarks.copy_task import evaluate, train


@pytest.mark.slow
def test_isolated_packs_teach_what_one_context_does_not():
    loss, isolated = evaluate(train("isolated", steps=STEPS), "isolated")
    assert isolated >= 0.99
    assert loss < 0.1
    _, mixed = evaluate(train("one context", steps=STEPS), "isolated")
    assert mixed < 0.7
