from __future__ import annotations

import importlib
from importlib import metadata

import numba
import pytest
from PIL import features

from tests.unit.images.without import hide
from vlmpack.images import accelerate, accelerators


@pytest.fixture
def fresh():
    """Nothing found yet, before and after."""
    accelerate.module.cache_clear()
    yield
    accelerate.module.cache_clear()


@pytest.mark.usefixtures("fresh")
class TestAccelerators:
    def test_they_are_named_with_their_versions(self):
        found = accelerators()
        assert list(found) == ["simplejpeg", "deflate", "numba"]
        for name, version in found.items():
            assert version in {None, metadata.version(name) if importlib.util.find_spec(name) else None}

    def test_a_package_that_is_not_installed_is_none(self, monkeypatch):
        def missing(name):
            raise ImportError(name)

        monkeypatch.setattr(importlib, "import_module", missing)
        assert accelerators() == {"simplejpeg": None, "deflate": None, "numba": None}

    def test_a_pillow_with_another_jpeg_library_goes_without_simplejpeg(self, monkeypatch):
        monkeypatch.setattr(importlib, "import_module", lambda name: numba)
        monkeypatch.setattr(features, "check_feature", lambda name: name != "libjpeg_turbo")
        assert accelerate.module("simplejpeg") is None
        assert accelerate.module("deflate") is numba

    def test_kernels_that_are_not_compiled_are_not_used(self, monkeypatch):
        monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
        assert accelerate.module("numba") is None


def test_hiding_is_what_the_other_tests_rely_on(monkeypatch):
    hide(monkeypatch, "simplejpeg", "deflate", "numba")
    assert set(accelerators().values()) == {None}
