"""The runner of the command line's tests."""

from tests.unit.cli.conftest import own_cache, vlmpack

__all__ = ["own_cache", "vlmpack"]
