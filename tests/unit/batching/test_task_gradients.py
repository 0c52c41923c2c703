from __future__ import annotations

import json
import logging
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from vlmpack.batching import GradNormBalancer, GradVac, PCGrad, TaskBalancing, TaskGradients
from vlmpack.batching.task_gradients import last_shared_block
from vlmpack.errors import ConfigError, VlmpackError

TASKS = ("T1", "T2", "T3")


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(4, 6, dtype=dtype)
        self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(6, 1, dtype=dtype) for task in TASKS})

    def losses(self, x, y, tasks, rows):
        """The parts that some rows have in each task's mean loss of the step."""
        hidden = torch.tanh(self.body(x[rows]))
        found = {}
        for task in TASKS:
            mine = [place for place, row in enumerate(rows) if tasks[row] == task]
            if mine:
                gap = self.heads[task](hidden[mine]).squeeze(-1) - y[[rows[place] for place in mine]]
                found[task] = (gap**2).sum() / tasks.count(task)
        return found


def step_of(dtype=torch.float64, n=24, absent=()):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=rng, dtype=torch.float64).to(dtype)
    y = torch.randn(n, generator=rng, dtype=torch.float64).to(dtype)
    names = [task for task in TASKS if task not in absent]
    return x, y, [names[place % len(names)] for place in range(n)]


def gradient_of(balancing, model, data, splits, steps=3):
    """The flat gradients after some balanced steps without any update of the model."""
    found = []
    for step in range(steps):
        model.zero_grad()
        balancing.begin_step()
        for rows in splits:
            balancing.backward(model.losses(*data, rows))
        balancing.finish_step(step, dict.fromkeys(set(data[2]), 1.0 / (step + 1)))
        found.append(
            torch.cat([
                p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()
            ])
        )
    return torch.stack(found)


def balancing(model, surgery=None, rule=None, **settings):
    return TaskBalancing(
        TaskGradients(model.parameters(), TASKS),
        surgery=surgery,
        balancer=GradNormBalancer(rule=rule) if rule else None,
        **settings,
    )


SURGERIES = {
    "none": lambda: None,
    "pcgrad": lambda: PCGrad(seed=5),
    "gradvac": lambda: GradVac(seed=5, beta=0.5),
}


@pytest.mark.parametrize("rule", [None, "legacy", "gradnorm"])
@pytest.mark.parametrize("name", SURGERIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_balanced_step_does_not_depend_on_its_split(name, rule, dtype, bound):
    data = step_of(dtype)
    whole = gradient_of(balancing(Net(dtype), SURGERIES[name](), rule), Net(dtype), data, [])
    assert not whole.any()  # the model that was not trained has no gradient: nothing passes by default
    results = []
    for cuts in ([24], [12, 12], [1] * 24, [5, 11, 1, 7]):
        ends = np.cumsum([0, *cuts])
        splits = [list(range(a, b)) for a, b in pairwise(ends)]
        model = Net(dtype)
        results.append(gradient_of(balancing(model, SURGERIES[name](), rule), model, data, splits))
    assert results[0].abs().max() > 0.1
    for other in results[1:]:
        assert ((other - results[0]).norm() / results[0].norm()).item() <= bound


def test_without_surgery_and_weights_it_is_plain_backward():
    data, model = step_of(), Net()
    got = gradient_of(balancing(model), model, data, [list(range(24))], steps=1)[0]
    model.zero_grad()
    sum(model.losses(*data, list(range(24))).values()).backward()
    want = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_fixed_weights_weigh_the_tasks():
    data, model = step_of(), Net()
    weights = {"T1": 0.0, "T2": 2.0, "T3": 1.0}
    got = gradient_of(balancing(model, weights=weights), model, data, [list(range(24))], steps=1)[0]
    model.zero_grad()
    losses = model.losses(*data, list(range(24)))
    sum(weights[task] * loss for task, loss in losses.items()).backward()
    want = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


# ---- bad input ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
def test_a_task_without_gradient_and_an_absent_one_change_nothing_for_the_others(name):
    data = step_of(absent=("T3",))
    model = Net()
    want = gradient_of(balancing(model, SURGERIES[name](), "legacy"), model, data, [list(range(24))])
    model = Net()
    zero = balancing(model, SURGERIES[name](), "legacy")
    got = []
    for step in range(3):
        model.zero_grad()
        zero.begin_step()
        losses = model.losses(*data, list(range(24)))
        losses["T3"] = (model.body.weight * 0.0).sum()
        zero.backward(losses)
        zero.finish_step(step)
        got.append(
            torch.cat([
                p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()
            ])
        )
    if name == "gradvac":  # its order is drawn among the tasks that are there, and there are three now
        assert torch.isfinite(torch.stack(got)).all()
    else:
        torch.testing.assert_close(torch.stack(got), want, rtol=1e-12, atol=1e-15)
    assert zero.balancer.weights["T3"] == 1.0
    assert zero.balancer.num_skipped["T3"] == 3


def test_a_gradient_that_is_not_finite_stops_the_step_or_leaves_the_task_out(caplog):
    data = step_of()
    rows = list(range(24))

    def one_step(balanced, model):
        balanced.begin_step()
        losses = model.losses(*data, rows)
        losses["T2"] = losses["T2"] * math.nan
        balanced.backward(losses)
        return balanced.finish_step(4)

    model = Net()
    with pytest.raises(VlmpackError, match=r"step 4: the gradient of task 'T2' is not finite .*'drop'"):
        one_step(balancing(model, PCGrad(), "legacy"), model)
    dropping = balancing(model, PCGrad(), "legacy", non_finite="drop")
    with caplog.at_level(logging.WARNING):
        counts = one_step(dropping, model)
    assert set(counts) == {"T1", "T3"}
    assert dropping.num_dropped == {"T1": 0, "T2": 1, "T3": 0}
    assert "task T2 is left out" in caplog.text
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    # nothing of it is left for the next step
    dropping.begin_step()
    dropping.backward(model.losses(*data, rows))
    assert math.isfinite(dropping.gradients.norms()["T2"])


def test_a_micro_batch_that_fails_in_backward_adds_nothing():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("simulated")

    data, model = step_of(), Net()
    gradients = TaskGradients(model.parameters(), TASKS)
    gradients.add(model.losses(*data, list(range(12))))
    before = gradients.norms()
    losses = model.losses(*data, list(range(12, 24)))
    losses["T3"] = Fails.apply(losses["T3"])  # the last task: the others' gradients exist by then
    with pytest.raises(torch.OutOfMemoryError):
        gradients.add(losses)
    assert gradients.norms() == before
    gradients.add(model.losses(*data, list(range(12, 24))))  # the retry
    whole = TaskGradients(model.parameters(), TASKS)
    whole.add(model.losses(*data, list(range(24))))
    assert gradients.norms() == pytest.approx(whole.norms(), rel=1e-12)


def test_one_tensor_that_is_the_gradient_of_two_parameters_is_not_shared():
    one, two = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    gradients = TaskGradients([one, two], ("a",))
    for _ in range(2):
        gradients.add({"a": (one + two).sum()})  # autograd gives both an expanded view of one number
    gradients.write({"a": 1.0})
    assert one.grad.tolist() == two.grad.tolist() == [2.0, 2.0, 2.0]


def test_unknown_tasks_and_losses_without_parameters_are_refused():
    model = Net()
    gradients = TaskGradients(model.parameters(), TASKS)
    with pytest.raises(ConfigError, match=r"\['T9'\] were never announced"):
        gradients.add({"T9": model.body.weight.sum()})
    apart = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigError, match="no trained parameter has a part in the loss of task 'T1'"):
        gradients.add({"T1": apart.sum()})
    assert gradients.present == ()
    for arguments, message in (
        (([], TASKS), "needs parameters"),
        ((model.parameters(), ()), "needs parameters"),
    ):
        with pytest.raises(ConfigError, match=message):
            TaskGradients(*arguments)
    with pytest.raises(ConfigError, match="some of those that are trained"):
        TaskGradients(model.parameters(), TASKS, shared=[apart])
    with pytest.raises(ConfigError, match="non_finite must be one of"):
        balancing(model, non_finite="ignore")
    with pytest.raises(ConfigError, match="Gramian of shape"):
        PCGrad().coefficients(torch.eye(2), TASKS, 0)
    with pytest.raises(ConfigError, match="is not finite"):
        GradVac().coefficients(torch.full((3, 3), math.nan), TASKS, 0)
    with pytest.raises(ConfigError, match="beta"):
        GradVac(beta=1.5)


def test_norms_are_taken_on_the_shared_parameters_alone():
    data, model = step_of(), Net()
    gradients = TaskGradients(model.parameters(), TASKS, shared=[model.body.weight])
    losses = model.losses(*data, list(range(24)))
    want = {
        task: torch.autograd.grad(loss, model.body.weight, retain_graph=True)[0].norm().item()
        for task, loss in losses.items()
    }
    gradients.add(losses)
    assert gradients.norms() == pytest.approx(want, rel=1e-12)
    gradients.write(dict.fromkeys(TASKS, 1.0))
    assert model.heads["T1"].weight.grad is not None  # the rest gets its gradient too


@pytest.mark.parametrize("rule", ["legacy", "gradnorm"])
def test_weights_alone_give_the_same_with_a_few_shared_parameters_and_less_memory(rule):
    data, gradients, held = step_of(), [], []
    for apart in (False, True):
        model = Net()
        shared = [model.body.weight]
        balanced = TaskBalancing(
            TaskGradients(model.parameters(), TASKS, shared=shared),
            balancer=GradNormBalancer(rule=rule),
            non_finite="drop" if apart else "raise",  # which needs each task's own
        )
        gradients.append(gradient_of(balanced, model, data, [list(range(10)), list(range(10, 24))]))
        held.append(
            sum(b.numel() for each in balanced.gradients._buffers.values() for b in each if b is not None)
        )
        assert balanced.balancer.weights != dict.fromkeys(TASKS, 1.0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)
    # 24 weights a task, and 6 + 3 x 7 others once; or 24 + 6 + 7 a task
    assert held == [3 * 24 + 6 + 3 * 7, 3 * (24 + 6 + 7)]


def test_the_last_block_of_the_deepest_part_is_shared():
    model = torch.nn.Module()
    model.vision = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    model.language = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(4)])
    assert last_shared_block(model) == list(model.language[3].parameters())
    model.language.requires_grad_(False)
    assert last_shared_block(model) == list(model.vision[2].parameters())
    flat = torch.nn.Linear(2, 2)
    assert last_shared_block(flat) == list(flat.parameters())


def test_saved_balancing_goes_on_bit_for_bit():
    data, rows = step_of(), list(range(24))

    def steps(balanced, model, numbers):
        for number in numbers:
            model.zero_grad()
            balanced.begin_step()
            balanced.backward(model.losses(*data, rows))
            balanced.finish_step(number, dict.fromkeys(TASKS, 1.0 / (number + 1)))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad

    def make(model):
        return balancing(model, GradVac(seed=5, beta=0.5), "gradnorm")

    model = Net()
    whole = make(model)
    steps(whole, model, range(6))
    other = Net()
    first = make(other)
    steps(first, other, range(3))
    second = make(other)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    steps(second, other, range(3, 6))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert second.state_dict() == whole.state_dict()
    with pytest.raises(ConfigError, match="had a balancer of task gradients and this one has none"):
        balancing(Net(), GradVac()).load_state_dict(first.state_dict())
    with pytest.raises(ConfigError, match="had no surgery of task gradients and this one has one"):
        make(Net()).load_state_dict(balancing(Net(), PCGrad(), "gradnorm").state_dict())


def test_with_shares_the_norms_are_those_of_the_mean_losses():
    data, model = step_of(), Net()
    parts = {"T1": 0.5, "T2": 0.3, "T3": 0.2}
    balanced = balancing(model, rule="legacy")
    losses = model.losses(*data, list(range(24)))  # means
    means = TaskGradients(model.parameters(), TASKS)
    means.add({task: loss * 1.0 for task, loss in losses.items()})
    want = means.norms()
    losses = model.losses(*data, list(range(24)))
    balanced.backward({task: loss * parts[task] for task, loss in losses.items()})
    balanced.finish_step(0, shares=parts)
    assert balanced.grad_norms == pytest.approx(want, rel=1e-12)
    other = GradNormBalancer()
    assert balanced.weights == pytest.approx(other.update(want), rel=1e-12)
