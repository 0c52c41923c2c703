"""A toy that isolation decides: copy a word, in packs of samples that all look alike.

A sample is BOS, a word of 4 to 8 letters, SEP, and the word again, which is what is learnt. In its own
context the next letter is decided by the letter before; beside other samples, which use the same letters in
other orders, it is not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlmpack.budget import PackBudget, SampleCost
from vlmpack.collate import VQACollator
from vlmpack.packing.assemble import Assembler
from vlmpack.packing.plan import plan
from vlmpack.samples import Sample
from vlmpack.weighting import weighted_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

LETTERS = 16
PAD, BOS, SEP = LETTERS, LETTERS + 1, LETTERS + 2
LENGTH = 512
WAYS = {"isolated": "each sample alone", "one context": "all samples before it too, as nanoVLM packs"}


def sample(rng: np.random.Generator, key: int) -> Sample:
    word = rng.permutation(LETTERS)[: rng.integers(4, 9)]
    ids = np.concatenate([[BOS], word, [SEP], word])
    labels = np.where(np.arange(len(ids)) > len(word) + 1, ids, -100)
    cost = SampleCost(num_tokens=len(ids), num_images=0, num_patches=0)
    return Sample(
        key=str(key), input_ids=ids, labels=labels, images=(), geometries=(), image_starts=(), cost=cost
    )


def batches(seed: int, *, num_packs: int) -> Iterator[dict]:
    """Yield batches of the library's own packs, without end."""
    rng = np.random.default_rng(seed)
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=PAD)
    collate = VQACollator(tokenizer, LENGTH, loss_weighting="token")
    budget = PackBudget(max_tokens=LENGTH)
    assemble = Assembler(budget=budget, tile_size=1, pad_token_id=PAD, append_pad=False, max_pixels=1)
    while True:
        samples = [sample(rng, key) for key in range(num_packs * LENGTH // 10)]
        costs = np.array([each.cost.as_tuple() for each in samples])
        made = plan(costs, budget)
        members, starts = made.members()
        fullest = np.argsort(-made.loads[:, 0], kind="stable")[:num_packs]
        packs = [
            assemble([samples[at] for at in members[starts[pack] : starts[pack + 1]]])[0] for pack in fullest
        ]
        yield collate(packs)


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=LETTERS + 3,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )


def logits_of(model: LlamaForCausalLM, batch: dict, way: str) -> torch.Tensor:
    if way == "isolated":
        return model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return model(batch["input_ids"], attention_mask=(batch["segment_ids"] > 0).long()).logits


def train(way: str, *, steps: int, seed: int = 0, num_packs: int = 2) -> LlamaForCausalLM:
    """Return a model trained on packs in one of `WAYS`."""
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50, 2 * (steps - step) / steps)
    )
    for _, batch in zip(range(steps), batches(seed, num_packs=num_packs), strict=False):
        logits = logits_of(model, batch, way)
        loss = weighted_loss(logits, batch["labels"], batch["loss_weights"], batch["loss_weight_sum"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, way: str, *, num_packs: int = 16) -> tuple[float, float]:
    """Return loss and accuracy over the answers' tokens of packs that no training had."""
    batch = next(batches(10**6, num_packs=num_packs))
    logits = logits_of(model.eval(), batch, way)
    loss = weighted_loss(logits, batch["labels"], batch["loss_weights"], batch["loss_weight_sum"])
    learnt = batch["loss_weights"][:, 1:] > 0
    right = logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
    return float(loss), float(right[learnt].float().mean())
