"""Deciding which samples share a pack, and building the packs."""

from vlmpack.packing.assemble import Assembler, PackedSequence
from vlmpack.packing.dataset import ConstantLengthDataset
from vlmpack.packing.lookahead import SampleSource
from vlmpack.packing.plan import PackPlan, plan
from vlmpack.packing.report import PackingReport
from vlmpack.packing.stream import StreamPacker

__all__ = [
    "Assembler",
    "ConstantLengthDataset",
    "PackPlan",
    "PackedSequence",
    "PackingReport",
    "SampleSource",
    "StreamPacker",
    "plan",
]
