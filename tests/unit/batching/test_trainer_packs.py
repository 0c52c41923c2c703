"""Steps of packs: split between packs, and inside of a pack between samples, with the gradient unchanged."""

from __future__ import annotations

import pytest
import torch

from tests.fakes import packs_of, row, tokenizer
from tests.toy_training import VOCAB, Causal, arguments, relative, weights
from vlmpack import VQACollator
from vlmpack.batching import DynamicBatchingTrainer, OOMGuardian, OOMSimulator

LENGTH = 200


class Packs(list):
    """A map-style data set of packs."""

    def __init__(self) -> None:
        super().__init__(
            packs_of(
                [row(f"Question {i}?", "An answer " + "la " * (i % 12)) for i in range(40)], seq_length=LENGTH
            )
        )


class Small(VQACollator):
    """Collates packs, and maps their tokens to the toy model's few."""

    def __init__(self) -> None:
        super().__init__(tokenizer(), LENGTH)

    def __call__(self, packs):
        batch = super().__call__(packs)
        labels = batch["labels"]
        batch["labels"] = torch.where(labels == -100, labels, labels % VOCAB)
        batch["input_ids"] = batch["input_ids"] % VOCAB
        return batch


def positions(inputs) -> float:
    """The hidden memory function: rows times their length."""
    return float(inputs["input_ids"].numel())


def run(folder, limit: float, loss: str = "model", phase: str = "backward"):
    model = Causal()
    trainer = DynamicBatchingTrainer(
        model,
        arguments(folder, per_device_train_batch_size=4),
        data_collator=Small(),
        train_dataset=Packs(),
        loss=loss,
        oom_guardian=OOMGuardian(),
    )
    simulator = OOMSimulator(positions, limit_bytes=limit, phase=phase)
    with simulator.attached(model):
        trainer.train()
    return trainer, simulator


def oracle(plan, loss: str) -> torch.Tensor:
    """Weights after plain SGD steps on samples one by one, cut out of their packs."""
    packs, model = Packs(), Causal()
    for number in range(len(plan)):
        model.zero_grad()
        summed, total = torch.zeros(()), 0
        for index in plan.step(number):
            pack = packs[index]
            for segment in range(1, len(pack.keys) + 1):
                here = pack.segment_ids == segment
                ids = pack.input_ids[here].unsqueeze(0) % VOCAB
                labels = pack.labels[here].unsqueeze(0)
                labels = torch.where(labels == -100, labels, labels % VOCAB)
                count = int((labels[:, 1:] != -100).sum())
                share = 1 if loss == "sample" else count
                mean = model(ids, labels, torch.arange(ids.shape[1]).unsqueeze(0))["loss"]
                summed, total = summed + mean * share, total + share
        (summed / total).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return weights(model)


@pytest.mark.parametrize("loss", ["model", "token", "sample"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_pack_that_does_not_fit_alone_trains_as_its_samples_do(tmp_path, loss, phase):
    whole, free = run(tmp_path, float("inf"), loss)
    assert free.num_ooms == 0
    between, some = run(tmp_path, 2 * LENGTH, loss, phase)  # two packs fit
    inside, more = run(tmp_path, 0.6 * LENGTH, loss, phase)  # not even one
    assert 0 < some.num_ooms < more.num_ooms
    assert max(inside_calls(more)) < LENGTH
    expected = oracle(whole.step_plan, loss)
    for trainer in (whole, between, inside):
        assert relative(weights(trainer.model), expected) < 1e-12


def inside_calls(simulator) -> list[float]:
    """Sizes of the passes that fitted."""
    return list(simulator.peaks)


def test_a_step_holds_packs_and_counts_their_samples(tmp_path):
    trainer, _ = run(tmp_path, float("inf"))
    packs = Packs()
    assert any(len(pack.keys) > 2 for pack in packs)
    assert trainer.last_step.num_samples == len(trainer.step_plan.step(len(trainer.step_plan) - 1))
    assert trainer.state.global_step == -(-len(packs) // 4)
