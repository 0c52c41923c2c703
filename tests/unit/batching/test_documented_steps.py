"""The reference documents' sentences on batches, memory safety and the trainer hold, one by one."""

from __future__ import annotations

import pytest

from tests.documented_steps import DOCUMENTED_STEPS


@pytest.mark.parametrize("sentence", DOCUMENTED_STEPS)
def test_the_sentence_holds(sentence):
    assert DOCUMENTED_STEPS[sentence]()


def test_there_are_sentences():
    assert len(DOCUMENTED_STEPS) > 30
