from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmpack.batching import GradVac, PCGrad
from vlmpack.batching import surgery as surgery_module

TASKS = ("T1", "T2", "T3")


def slow_pcgrad(rows, orders):
    """Algorithm 1 of the paper, on the gradients themselves."""
    projected = []
    for i, order in enumerate(orders):
        mine = rows[i].clone()
        for j in order:
            if j != i and mine @ rows[j] < 0:
                mine = mine - (mine @ rows[j]) / (rows[j] @ rows[j]) * rows[j]
        projected.append(mine)
    return sum(projected)


def slow_gradvac(rows, orders, targets, beta):
    """Equation 6 of the paper, on the gradients themselves."""
    changed = []
    for i, order in enumerate(orders):
        mine = rows[i].clone()
        for j in order:
            cosine = (mine @ rows[j] / (mine.norm() * rows[j].norm())).item()
            target = targets[i][j]
            if cosine < target:
                top = mine.norm() * (target * math.sqrt(1 - cosine**2) - cosine * math.sqrt(1 - target**2))
                mine = mine + top / (rows[j].norm() * math.sqrt(1 - target**2)) * rows[j]
            targets[i][j] = (1 - beta) * target + beta * cosine
        changed.append(mine)
    return sum(changed)


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(0, 100))
def test_pcgrad_is_the_papers_algorithm(seed, num_tasks, step):
    rows = torch.randn(num_tasks, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(surgery_module._order_seed(3, step))
        orders = [torch.randperm(num_tasks).tolist() for _ in range(num_tasks)]
    shares = PCGrad(seed=3).coefficients(rows @ rows.T, list("abcde"[:num_tasks]), step)
    torch.testing.assert_close(shares @ rows, slow_pcgrad(rows, orders), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_gradvac_is_the_papers_formula(seed, num_tasks):
    gradvac, targets = GradVac(seed=3, beta=0.3), np.zeros((num_tasks, num_tasks))
    rng = torch.Generator().manual_seed(seed)
    for step in range(4):
        rows = torch.randn(num_tasks, 7, generator=rng, dtype=torch.float64)
        order = np.random.default_rng([3, step])
        orders = [
            order.permutation([k for k in range(num_tasks) if k != i]).tolist() for i in range(num_tasks)
        ]
        shares = gradvac.coefficients(rows @ rows.T, list("abcde"[:num_tasks]), step)
        want = slow_gradvac(rows, orders, targets, 0.3)
        torch.testing.assert_close(shares @ rows, want, rtol=1e-7, atol=1e-7)


@given(st.integers(0, 10**6))
def test_gradvac_equals_torchjds_where_all_tasks_are_present(seed):
    from torchjd.aggregation import GradVacWeighting

    # two tasks: each meets one other, so that no order is drawn
    mine, theirs = GradVac(beta=0.5), GradVacWeighting(beta=0.5, eps=0.0)
    rng = torch.Generator().manual_seed(seed)
    for step in range(5):
        rows = torch.randn(2, 9, generator=rng, dtype=torch.float64)
        gramian = rows @ rows.T
        torch.testing.assert_close(
            mine.coefficients(gramian, ["a", "b"], step), theirs(gramian), rtol=1e-8, atol=1e-8
        )


def test_the_gradvac_of_torchjd_forgets_a_pair_when_a_task_is_absent_and_ours_does_not():
    from torchjd.aggregation import GradVacWeighting

    rows = torch.tensor([[1.0, 0.2], [0.9, 0.3], [0.5, 0.5]], dtype=torch.float64)
    mine, theirs = GradVac(beta=1.0), GradVacWeighting(beta=1.0)
    for part, tasks in ((rows, ["a", "b", "c"]), (rows[:1], ["a"])):
        mine.coefficients(part @ part.T, tasks, 0)
        theirs(part @ part.T)
    conflict = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    gramian = conflict @ conflict.T
    # targets near 1 are remembered: gradients at right angles are turned towards each other
    assert mine.coefficients(gramian, ["a", "b", "c"], 1).sum() > 3.5
    assert theirs(gramian).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_the_order_follows_the_seed_and_the_step_and_no_global_state():
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gramian = rows @ rows.T
    tasks = list("abcd")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = PCGrad(seed=1).coefficients(gramian, tasks, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(PCGrad(seed=1).coefficients(gramian, tasks, 7), first)
    others = [PCGrad(seed=1).coefficients(gramian, tasks, step) for step in range(20)]
    assert any(not torch.equal(other, first) for other in others)


def test_tasks_that_do_not_conflict_are_left_alone():
    gramian = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
    assert PCGrad().coefficients(gramian, ["a", "b"], 0).tolist() == [1.0, 1.0]
    assert GradVac().coefficients(gramian, ["a", "b"], 0).tolist() == [1.0, 1.0]


def test_parallel_and_opposite_gradients_stay_finite():
    for sign in (1.0, -1.0):
        rows = torch.tensor([[1.0, 1.0], [sign, sign]], dtype=torch.float64)
        gramian = rows @ rows.T
        gradvac = GradVac(beta=1.0)
        for step in range(3):
            for method in (PCGrad(), gradvac):
                assert torch.isfinite(method.coefficients(gramian, ["a", "b"], step)).all()


def test_a_saved_gradvac_goes_on_bit_for_bit():
    rows = [
        torch.randn(3, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(6)
    ]
    whole = GradVac(beta=0.2, seed=9)
    want = [whole.coefficients(each @ each.T, TASKS, step) for step, each in enumerate(rows)]
    first = GradVac(beta=0.2, seed=9)
    for step in range(3):
        first.coefficients(rows[step] @ rows[step].T, TASKS, step)
    second = GradVac(beta=0.2, seed=9)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got = [second.coefficients(rows[step] @ rows[step].T, TASKS, step) for step in range(3, 6)]
    assert all(torch.equal(a, b) for a, b in zip(got, want[3:], strict=True))
