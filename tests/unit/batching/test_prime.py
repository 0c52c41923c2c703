"""Optimizer state that is made beforehand is the state that the first step would have made."""

from __future__ import annotations

import pytest
import torch

from vlmpack.batching import prime_optimizer
from vlmpack.batching.testing import optimizer_fault
from vlmpack.errors import VlmpackError

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), amsgrad=True, foreach=False),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
}
LEFT_ALONE = {
    "SGD damped": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
}


def run(make, primed: bool) -> tuple[list[torch.Tensor], bool]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    done = prime_optimizer(optimizer) if primed else False
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(4, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return [parameter.detach().clone() for parameter in model.parameters()], done


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_is_the_same_to_the_bit(make):
    primed, done = run(make, primed=True)
    plain, _ = run(make, primed=False)
    assert done
    assert all(torch.equal(first, second) for first, second in zip(primed, plain, strict=True))


@pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_an_optimizer_whose_fresh_state_is_not_zeros_is_left_alone(make):
    primed, done = run(make, primed=True)
    plain, _ = run(make, primed=False)
    assert not done
    assert all(torch.equal(first, second) for first, second in zip(primed, plain, strict=True))


def test_state_that_is_there_is_not_touched():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(4, 3)).sum().backward()
    assert not prime_optimizer(optimizer)  # gradients wait for a step
    optimizer.step()
    moment = optimizer.state[model.weight]["exp_avg"].clone()
    assert not prime_optimizer(optimizer)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moment)


def test_after_priming_a_step_allocates_no_state():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    prime_optimizer(optimizer)
    model(torch.rand(4, 3)).sum().backward()
    with optimizer_fault(after=0):
        optimizer.step()


def test_memory_that_does_not_suffice_for_the_state_is_said_at_once():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    with (
        optimizer_fault(after=3),
        pytest.raises(VlmpackError, match="does not suffice for the optimizer's state"),
    ):
        prime_optimizer(optimizer)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert model.weight.grad is None
