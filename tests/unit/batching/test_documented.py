from __future__ import annotations

import pytest

from tests.documented_batching import DOCUMENTED


@pytest.mark.parametrize("sentence", DOCUMENTED)
def test_the_code_does_as_documented(sentence):
    assert DOCUMENTED[sentence]()


def test_there_are_sentences():
    assert len(DOCUMENTED) > 30
