"""Small data for training runs, and the models and collators of `family_models` for it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fakes import jpeg, row
from tests.family_models import CASES, TEXT, collator_of, model_of, size_of, tokenizer_of
from vlmpack.packing import ConstantLengthDataset
from vlmpack.stages import VQADataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlmpack.collate import VQACollator
    from vlmpack.packing.index import IndexedPacks

LENGTH = 224
"""About three samples a pack: the tokenizer makes a token of each byte."""


def rows(count: int = 27, *, images: bool = True) -> list[dict]:
    """Return conversations of different lengths, every third without an image where there are any."""
    rng = np.random.default_rng(7)
    return [
        row(
            "What? " * int(rng.integers(1, 6)),
            "Yes. " * int(rng.integers(1, 5)),
            [jpeg(40, 40, n)] if images and n % 3 else [],
        )
        for n in range(count)
    ]


def packs(name: str = "smolvlm", data: list[dict] | None = None, **settings: object) -> ConstantLengthDataset:
    """Return a stream of packs for a family."""
    samples = VQADataset(rows() if data is None else data, tokenizer_of(name), family=CASES[name].family)
    return ConstantLengthDataset(samples, **{"seq_length": LENGTH, "lookahead": 8, **settings})


def collator(name: str = "smolvlm", **settings: object) -> VQACollator:
    """Return the collator of a family."""
    return collator_of(name, LENGTH, **settings)


def fresh(name: str = "smolvlm") -> PreTrainedModel:
    """Return a tiny model of the family's class, always with the same weights."""
    return copy.deepcopy(model_of(name))


def llama() -> LlamaForCausalLM:
    """Return a language model alone."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**TEXT, vocab_size=size_of(tokenizer_of("smolvlm")), initializer_range=0.2)
    )


def alone(name: str, data: IndexedPacks, key: str, **settings: object) -> dict:
    """Return the batch of one sample alone, for which the model makes its own positions and mask."""
    members, _ = data.index.plan.members()
    (at,) = np.flatnonzero(data.index.rows[members] == int(key)).tolist()
    pack = data[at, at + 1]
    batch = collator_of(name, len(pack), **settings)([pack])
    for argument in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        del batch[argument]
    return batch | CASES[name].alone(batch)
