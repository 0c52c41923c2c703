"""Train on packs, and on their samples one by one: by how much do they differ?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.family_models import CASES, LENGTHS, collator_of, model_of, packs_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Differences:
    """The largest difference between a packed batch and its samples one by one."""

    logits: float
    loss: float
    gradients: float

    @property
    def largest(self) -> float:
        return max(self.logits, self.loss, self.gradients)


def num_targets(batch: dict) -> int:
    targets = batch["targets"] if "targets" in batch else batch["labels"][:, 1:]
    return int((targets != -100).sum())


def run(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and loss."""
    out = model(**batch)
    return out if isinstance(out, tuple) else (out.logits, out.loss)


def compare(
    name: str,
    attention: str,
    plan: list[list[int]],
    *,
    change: Callable[[dict], dict] = lambda batch: batch,
    model: PreTrainedModel | None = None,
) -> Differences:
    """Train on a batch of packs, and on its samples one by one: the same loss, logits and gradients?

    Alone, a sample gets no positions, mask or lengths: the model makes its own.

    Args:
        name: The family.
        attention: The kernel.
        plan: Samples of each row.
        change: Made to the packed batch first.
        model: Another one.
    """
    model = model or model_of(name, attention)
    packs = packs_of(name, plan, append_pad=True)
    batch = change(collator_of(name, max(map(len, packs)) + 3)(packs))
    model.zero_grad()
    packed, packed_loss = run(model, batch)
    packed_loss.backward()
    gradients = {
        key: parameter.grad.clone()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    logits = loss = 0.0
    for at_row, numbers in enumerate(plan):
        at = 0
        for number in numbers:
            single = packs_of(name, [[number]])
            alone = collator_of(name, len(single[0]))(single)
            if name in CASES:
                alone |= CASES[name].alone(alone)
            for key in ("position_ids", "segment_ids", *LENGTHS):
                alone.pop(key, None)
            out, own_loss = run(model, alone)
            share = own_loss * num_targets(alone) / num_targets(batch)
            share.backward()
            loss += float(share.detach())
            length = alone["input_ids"].shape[1]
            delta = packed[at_row, at : at + length] - out[0]
            logits = max(logits, float(delta.detach().abs().max()))
            at += length + 1
    own = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert own.keys() == gradients.keys()
    return Differences(
        logits=logits,
        loss=abs(loss - float(packed_loss.detach())),
        gradients=max(float((own[key] - gradients[key]).abs().max()) for key in own),
    )
