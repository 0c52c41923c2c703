"""Deciding which samples share a pack, and building the packs."""

from vlmpack.packing.plan import PackPlan, plan
from vlmpack.packing.stream import StreamPacker

__all__ = ["PackPlan", "StreamPacker", "plan"]
