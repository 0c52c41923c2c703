"""For every test of training: garbage of imports is left alone, as collecting it takes 0.3 s each time."""

from __future__ import annotations

import pytest

from tests.toy_training import frozen_garbage  # noqa: F401 - a fixture


@pytest.fixture(autouse=True, scope="module")
def _frozen(frozen_garbage: None) -> None:  # noqa: F811
    """Every module here."""
