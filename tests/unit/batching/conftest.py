"""Recovery collects garbage after each error, which takes 0.3 s with transformers loaded: not in tests."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True, scope="package")
def _garbage_of_imports_is_left_alone() -> Iterator[None]:
    import transformers.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
