"""Training on a pack equals training on its samples one by one: logits and gradients of a real model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fakes import only, packs_of, turns
from vlmpack.collate import VQACollator

ROWS = [
    {"texts": turns(("What is in the picture?", "A cat on a mat."))},
    {"texts": turns(("How many?", "Two."), ("Sure?", "Yes, two of them."))},
    {"texts": turns(("Colour?", "Red."))},
]


@pytest.fixture(scope="module")
def batch_and_alone():
    dataset = packs_of(ROWS, seq_length=160)
    pack = only(dataset)
    batch = VQACollator(dataset.dataset.tokenizer, 160)([pack])
    _, batch["input_ids"] = torch.unique(batch["input_ids"], return_inverse=True)  # a small vocabulary
    assert len(pack.keys) == 3
    return batch


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, batch_and_alone):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=int(batch_and_alone["input_ids"].max()) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation=request.param,
    )
    return LlamaForCausalLM(config).eval()


def run(model, ids, labels, positions):
    """Return logits, and the gradients of the summed loss of next tokens."""
    model.zero_grad()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    loss.backward()
    return logits.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def relabelled(batch):
    """Return the labels in the small vocabulary."""
    return torch.where(batch["labels"] == -100, -100, batch["input_ids"])


def one_by_one(model, batch):
    """Return the logits of each sample run alone, in place, and the sum of their gradients."""
    labels, segments = relabelled(batch), batch["segment_ids"]
    logits, total = None, {}
    for segment in range(1, int(segments.max()) + 1):
        at = segments[0] == segment
        positions = torch.arange(int(at.sum()))[None]
        alone, gradients = run(model, batch["input_ids"][:, at], labels[:, at], positions)
        if logits is None:
            logits = torch.zeros(*segments.shape, alone.shape[-1], dtype=alone.dtype)
        logits[:, at] = alone
        for name, gradient in gradients.items():
            total[name] = total.get(name, 0) + gradient
    return logits, total


def largest_difference(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_pack_equals_its_samples(model, batch_and_alone):
    batch = batch_and_alone
    inside = batch["segment_ids"] > 0
    packed, packed_gradients = run(model, batch["input_ids"], relabelled(batch), batch["position_ids"])
    alone, alone_gradients = one_by_one(model, batch)
    assert float((packed - alone)[inside].abs().max()) < 1e-5
    assert largest_difference(packed_gradients, alone_gradients) < 1e-5
    largest = max(float(gradient.abs().max()) for gradient in alone_gradients.values())
    assert largest > 1e-2, "there is a gradient"


def test_without_restarting_positions_the_samples_see_each_other(model, batch_and_alone):
    """The guard: the test above would notice."""
    batch = batch_and_alone
    inside = batch["segment_ids"] > 0
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    leaking, leaking_gradients = run(model, batch["input_ids"], relabelled(batch), positions)
    alone, alone_gradients = one_by_one(model, batch)
    assert float((leaking - alone)[inside].abs().max()) > 1e-2
    assert largest_difference(leaking_gradients, alone_gradients) > 1e-2


def test_a_label_across_a_seam_would_change_the_gradient(model, batch_and_alone):
    """The guard for masked first labels: with them, a pack teaches what no sample does."""
    batch = batch_and_alone
    segments = batch["segment_ids"]
    seam = torch.zeros_like(segments, dtype=torch.bool)
    seam[:, 1:] = (segments[:, 1:] > 1) & (segments[:, 1:] != segments[:, :-1])
    assert int(seam.sum()) == 2
    assert bool((batch["labels"][seam] == -100).all())
    labels = torch.where(seam, batch["input_ids"], relabelled(batch))
    _, crossing = run(model, batch["input_ids"], labels, batch["position_ids"])
    _, alone = one_by_one(model, batch)
    assert largest_difference(crossing, alone) > 1e-2
