"""A failed step leaves nothing behind: gradients, random numbers, buffers, metrics, the scaler."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.toy_training import Causal, Texts, collate, gradients, relative
from vlmpack.batching import MemoryFault, OOMSimulator, Rollback


class Norms(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x)).sum()


class Sums:
    def __init__(self) -> None:
        self.total = 0.0

    def state_dict(self) -> dict:
        return {"total": self.total}

    def load_state_dict(self, state: dict) -> None:
        self.total = state["total"]


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_everything_that_a_step_changes_is_put_back():
    model, sums = Norms(), Sums()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # makes its state
    before = Rollback(model, metrics=[sums], scaler=scaler)
    drawn = draw()
    mean = model.norm.running_mean.clone()
    for _ in range(2):  # a step may fail more than once
        model(torch.rand(3, 4)).backward()
        sums.total += 1
        scaler._per_optimizer_states[0]["found_inf_per_device"] = {"cpu": torch.ones(())}
        scaler.update(1.0)
        assert model.linear.weight.grad is not None
        assert not torch.equal(model.norm.running_mean, mean)
        before.restore()
        assert model.linear.weight.grad is None
        assert torch.equal(model.norm.running_mean, mean)
        assert model.norm.num_batches_tracked == 0
        assert sums.total == 0
        assert scaler.get_scale() == 8.0
        assert not scaler._per_optimizer_states
        assert draw() == drawn
        before.restore()


def test_gradients_that_were_there_come_back_by_value():
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    kept = model.weight.grad.clone()
    before = Rollback(model)
    model(torch.full((1, 2), 5.0)).sum().backward()
    before.restore()
    assert torch.equal(model.weight.grad, kept)
    model.weight.grad.add_(1)
    before.restore()
    assert torch.equal(model.weight.grad, kept)


@pytest.mark.parametrize("restores", [True, False])
def test_without_it_a_retried_step_is_wrong(restores):
    """An OOM in the backward pass of a model with dropout: what a bare retry would compute."""
    batch = collate(Texts(6).samples)
    model = Causal(dropout=0.5)
    torch.manual_seed(7)
    model(**batch)["loss"].backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(7)
    before = Rollback(model)
    with OOMSimulator(faults=[MemoryFault(call=0, phase="backward")]).attached(model):
        with pytest.raises(torch.OutOfMemoryError):
            model(**batch)["loss"].backward()
        if restores:
            before.restore()
        model(**batch)["loss"].backward()
    error = relative(gradients(model), expected)
    assert error == 0 if restores else error > 0.3
