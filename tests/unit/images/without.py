"""Machines without the optional packages, for tests."""

from __future__ import annotations

from vlmpack.images import accelerate

EXTRAS = ("simplejpeg", "deflate")
INSTALLED = [name for name in EXTRAS if accelerate.module(name)]
"""The extras that can be tested here; nothing fails where none is installed."""


def hide(monkeypatch, *names):
    """Let these packages be missing."""
    real = accelerate.module
    monkeypatch.setattr(accelerate, "module", lambda name: None if name in names else real(name))
