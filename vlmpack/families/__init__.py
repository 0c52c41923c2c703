"""What each model family's batch looks like: sizes, tokens, pixels, positions, masks."""

from vlmpack.families.family import Family
from vlmpack.families.gemma3 import Gemma3
from vlmpack.families.idefics3 import Idefics3, SmolVLM
from vlmpack.families.internvl import InternVL
from vlmpack.families.llava import Llava
from vlmpack.families.llava_onevision import LlavaOnevision
from vlmpack.families.nanovlm import NanoVLM
from vlmpack.families.prepare import Fault, prepare_model_for_packing
from vlmpack.families.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL
from vlmpack.families.rows import Rows
from vlmpack.families.table import FAMILIES, family_for
from vlmpack.families.tokens import FamilyTokens, add_family_tokens
from vlmpack.families.verify import IsolationReport, SegmentDifference, verify_isolation

__all__ = [
    "FAMILIES",
    "Family",
    "FamilyTokens",
    "Fault",
    "Gemma3",
    "Idefics3",
    "InternVL",
    "IsolationReport",
    "Llava",
    "LlavaOnevision",
    "NanoVLM",
    "Qwen2VL",
    "Qwen3VL",
    "Qwen25VL",
    "Rows",
    "SegmentDifference",
    "SmolVLM",
    "add_family_tokens",
    "family_for",
    "prepare_model_for_packing",
    "verify_isolation",
]
