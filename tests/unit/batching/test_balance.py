from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vlmpack.batching import GradNormBalancer, compute_gradient_norm, documented_update
from vlmpack.errors import ConfigError

TASKS = ("T1", "T2", "T3")
norms_of_three = st.fixed_dictionaries({task: st.floats(1e-3, 1e3) for task in ("T1", "T2", "T3")})


def spread(weights, norms):
    """How unequal the weighted norms are: the largest distance of their logarithms from the mean."""
    logs = [math.log(weights[task] * norms[task]) for task in norms]
    mean = sum(logs) / len(logs)
    return max(abs(each - mean) for each in logs)


def test_the_documented_update_by_hand():
    # mean norm 2; factors (2/1)^1.5 and (2/3)^1.5, then scaled to sum 2
    up, down = 2**1.5, (2 / 3) ** 1.5
    moved = documented_update({"T1": 1.0, "T2": 1.0}, {"T1": 1.0, "T2": 3.0}, 1.5)
    assert moved == {"T1": up * 2 / (up + down), "T2": down * 2 / (up + down)}


@given(norms_of_three, norms_of_three, st.floats(0.1, 1.9))
def test_the_legacy_rule_is_the_documented_formula_on_weighted_norms(weights, norms, alpha):
    balancer = GradNormBalancer(alpha=alpha, initial_weights=weights)
    start = balancer.weights
    expected = documented_update(start, {task: start[task] * norm for task, norm in norms.items()}, alpha)
    got = balancer.update(norms)
    assert got == pytest.approx(expected, rel=1e-9, abs=3e-6)  # the floor of a weight
    assert math.isclose(sum(got.values()), 3.0, rel_tol=0, abs_tol=1e-12)


@pytest.mark.parametrize(("alpha", "updates"), [(1.0, 1), (0.5, 7), (1.5, 7), (1.9, 44), (0.1, 44)])
def test_the_legacy_rule_shrinks_errors_by_one_minus_alpha(alpha, updates):
    # |1 - alpha|^n <= 1 %: 0.5^7 = 0.8 %, 0.9^44 = 0.97 %
    norms = {"T1": 1.0, "T2": 2.0, "T3": 0.5}
    balancer = GradNormBalancer(alpha=alpha)
    before = spread(balancer.weights, norms)
    for n in range(1, updates + 1):
        balancer.update(norms)
        assert spread(balancer.weights, norms) == pytest.approx(abs(1 - alpha) ** n * before, abs=1e-9)
    assert spread(balancer.weights, norms) <= 0.01 * before


def test_documented_on_unweighted_norms_collapses_to_one_task():
    # The other reading of the document's text: it never stops.
    weights, norms = {"T1": 1.0, "T2": 1.0, "T3": 1.0}, {"T1": 1.0, "T2": 2.0, "T3": 0.5}
    for _ in range(10):
        weights = documented_update(weights, norms, 1.5)
    assert weights["T3"] > 2.999


def test_documented_on_the_whole_models_norm_does_nothing():
    # compute_gradient_norm(model) inside the loop over tasks is one number for all of them.
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    norm = GradNormBalancer.compute_gradient_norm(model)
    weights = {"T1": 0.5, "T2": 1.5, "T3": 1.0}
    assert documented_update(weights, dict.fromkeys(weights, norm), 1.5) == pytest.approx(weights, rel=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 2.0, 2.5, -1.0, math.nan])
def test_the_legacy_rule_refuses_an_alpha_that_never_converges(alpha):
    with pytest.raises(ConfigError, match="0 < alpha < 2"):
        GradNormBalancer(alpha=alpha)


def test_defaults_are_the_documented_ones():
    balancer = GradNormBalancer()
    assert (balancer.alpha, balancer.rule) == (1.5, "legacy")
    assert balancer.weights == {"T1": 1.0, "T2": 1.0, "T3": 1.0}


@pytest.mark.parametrize("rule", ["legacy", "gradnorm"])
def test_an_absent_task_keeps_its_weight_and_the_sum_stays(rule):
    balancer = GradNormBalancer(rule=rule, alpha=0.7, initial_weights={"T1": 0.5, "T2": 1.0, "T3": 1.5})
    moved = balancer.update({"T1": 1.0, "T2": 4.0}, {"T1": 1.0, "T2": 1.0})
    assert moved["T3"] == 1.5
    assert moved["T1"] > 0.5
    assert math.isclose(sum(moved.values()), 3.0, abs_tol=1e-12)
    assert balancer.num_skipped == {"T1": 0, "T2": 0, "T3": 0}


@pytest.mark.parametrize("rule", ["legacy", "gradnorm"])
@pytest.mark.parametrize("norm", [0.0, 1e-300, math.nan, math.inf])
def test_a_task_with_no_finite_gradient_keeps_its_weight_and_is_counted(rule, norm, caplog):
    balancer = GradNormBalancer(rule=rule)
    with caplog.at_level(logging.WARNING):
        moved = balancer.update({"T1": 1.0, "T2": 4.0, "T3": norm}, {"T1": 1.0, "T2": 1.0, "T3": 1.0})
    assert "task T3 keeps its weight" in caplog.text
    assert moved["T3"] == 1.0
    assert moved["T1"] > 1.0 > moved["T2"]
    assert balancer.num_skipped["T3"] == 1
    assert math.isclose(sum(moved.values()), 3.0, abs_tol=1e-12)


def test_nothing_to_balance_changes_nothing():
    balancer = GradNormBalancer()
    for norms in ({}, {"T1": 3.0}, {"T1": 3.0, "T2": 0.0}):
        assert balancer.update(norms) == {"T1": 1.0, "T2": 1.0, "T3": 1.0}
    assert balancer.num_updates == 0


def test_a_task_that_was_never_announced_is_an_error_with_its_remedy():
    balancer = GradNormBalancer()
    with pytest.raises(ConfigError, match=r"\['T9'\] were never announced; known are .*add_task"):
        balancer.update({"T1": 1.0, "T9": 2.0})
    balancer.add_task("T9")
    moved = balancer.update({"T1": 1.0, "T9": 2.0})
    assert math.isclose(sum(moved.values()), 4.0, abs_tol=1e-12)
    assert moved["T1"] > 1.0 > moved["T9"]
    with pytest.raises(ConfigError, match="there already"):
        balancer.add_task("T9")


@given(st.lists(norms_of_three, min_size=1, max_size=30), st.sampled_from(["legacy", "gradnorm"]), st.data())
def test_weights_stay_positive_and_sum_to_the_number_of_tasks(steps, rule, data):
    balancer = GradNormBalancer(rule=rule)
    for norms in steps:
        present = data.draw(st.sets(st.sampled_from(["T1", "T2", "T3"])))
        losses = {task: data.draw(st.floats(0, 100)) for task in present}
        balancer.update({task: norms[task] for task in present}, losses)
    weights = balancer.weights
    assert min(weights.values()) > 0
    assert math.isclose(sum(weights.values()), 3.0, rel_tol=0, abs_tol=1e-12)


# ---- the paper's rule --------------------------------------------------------------------------
def paper_slopes(weights, norms, losses, first, alpha):
    """d/dw of sum |G_i - target_i| by autograd, with the target held constant as the paper says."""
    w = torch.tensor([weights[task] for task in TASKS], dtype=torch.float64, requires_grad=True)
    g = w * torch.tensor([norms[task] for task in TASKS], dtype=torch.float64)
    ratio = torch.tensor([losses[task] / first[task] for task in TASKS], dtype=torch.float64)
    target = (g.mean() * (ratio / ratio.mean()) ** alpha).detach()
    (g - target).abs().sum().backward()
    return w.grad, ((g - target).abs() / g).min().item()


@settings(max_examples=50)  # torch's optimizer is slow
@given(st.lists(st.tuples(norms_of_three, norms_of_three), min_size=1, max_size=6), st.floats(0, 3))
def test_the_papers_rule_is_adam_on_the_papers_loss(steps, alpha):
    balancer = GradNormBalancer(rule="gradnorm", alpha=alpha, lr=0.01)
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=0.01)
    first = steps[0][1]
    for norms, losses in steps:
        held = dict(zip(TASKS, weight.tolist(), strict=True))
        weight.grad, nearest = paper_slopes(held, norms, losses, first, alpha)
        assume(nearest > 1e-6)  # the slope jumps where a norm is at its target: rounding decides there
        adam.step()
        with torch.no_grad():
            weight.mul_(3 / weight.sum())
        moved = balancer.update(norms, losses)
        assert [moved[task] for task in TASKS] == pytest.approx(weight.tolist(), rel=1e-6, abs=1e-9)


def test_the_slower_task_gains_weight():
    balancer = GradNormBalancer(("fast", "slow"), rule="gradnorm", alpha=1.0)
    balancer.update({"fast": 1.0, "slow": 1.0}, {"fast": 2.0, "slow": 2.0})
    for _ in range(20):  # equal gradients; one has a tenth of its loss left, the other nine tenths
        moved = balancer.update({"fast": 1.0, "slow": 1.0}, {"fast": 0.2, "slow": 1.8})
    assert moved["slow"] > 1.1 > 0.9 > moved["fast"]


def test_the_papers_sign_evens_out_relative_losses_and_the_other_sign_does_not():
    """Two quadratics on one vector, one four times as steep."""

    def relative_losses(alpha_sign):
        point = torch.zeros(4, dtype=torch.float64)
        goals = {
            "steep": torch.tensor([1.0, 0, 0, 0]).double(),
            "flat": torch.tensor([0, 1.0, 0, 0]).double(),
        }
        curve = {"steep": 4.0, "flat": 1.0}
        balancer = GradNormBalancer(tuple(goals), rule="gradnorm", alpha=1.0)
        first = None
        for _ in range(300):
            gaps = {task: point - goal for task, goal in goals.items()}
            # each task pulls on its own half of the vector, so that both can be learnt
            gaps["steep"][2:], gaps["flat"][2:] = 0, 0
            gaps["steep"][1], gaps["flat"][0] = 0, 0
            losses = {task: curve[task] * float(gap @ gap) for task, gap in gaps.items()}
            first = first or losses
            weights = balancer.weights
            point -= 0.01 * sum(2 * curve[task] * weights[task] * gap for task, gap in gaps.items())
            norms = {task: 2 * curve[task] * float(gap.norm()) for task, gap in gaps.items()}
            shown = losses if alpha_sign > 0 else {task: 1 / loss for task, loss in losses.items()}
            balancer.update(norms, shown)
        return {task: losses[task] / first[task] for task in losses}

    paper, flipped = relative_losses(+1), relative_losses(-1)
    gap = abs(math.log(paper["steep"] / paper["flat"]))
    assert gap < 1.5 < 3 * gap + 1.5 < abs(math.log(flipped["steep"] / flipped["flat"]))


def test_the_papers_rule_needs_losses_and_copes_with_bad_ones():
    balancer = GradNormBalancer(rule="gradnorm")
    with pytest.raises(ConfigError, match=r"\['T2'\] have none"):
        balancer.update({"T1": 1.0, "T2": 1.0}, {"T1": 1.0})
    with pytest.raises(ConfigError, match="have none"):
        balancer.update({"T1": 1.0, "T2": 1.0})
    moved = balancer.update({"T1": 1.0, "T2": 4.0, "T3": 1.0}, {"T1": math.nan, "T2": 1.0, "T3": 0.0})
    assert moved == {"T1": 1.0, "T2": 1.0, "T3": 1.0}
    assert balancer.num_skipped == {"T1": 1, "T2": 0, "T3": 1}
    balancer.update({"T1": 1.0, "T2": 4.0}, {"T1": 1.0, "T2": 1.0})
    learnt = balancer.update({"T1": 1.0, "T2": 4.0}, {"T1": 0.0, "T2": 0.0})  # both are learnt
    assert sum(learnt.values()) == pytest.approx(3.0, abs=1e-12)


def test_averaged_norms_follow_the_mean_and_not_the_noise():
    # T1's norm is 1 or 3 in turn, T2's is 2: on average they are equal
    swings = {}
    for decay in (0.0, 0.95):
        balancer = GradNormBalancer(("T1", "T2"), norm_decay=decay)
        seen = [balancer.update({"T1": 1.0 + 2 * (step % 2), "T2": 2.0})["T1"] for step in range(400)]
        swings[decay] = max(seen[200:]) - min(seen[200:])
        if decay:
            assert sum(seen[200:]) / 200 == pytest.approx(1.0, abs=0.05)
    assert swings[0.95] < 0.1 * swings[0.0]


@pytest.mark.parametrize("rule", ["legacy", "gradnorm"])
def test_a_saved_balancer_goes_on_bit_for_bit(rule):
    steps = [
        ({"T1": 1.0 + n, "T2": 2.0, "T3": 0.5}, {"T1": 1.0, "T2": 2.0 / (n + 1), "T3": 3.0}) for n in range(6)
    ]
    whole = GradNormBalancer(rule=rule, norm_decay=0.5)
    for step in steps:
        whole.update(*step)
    first = GradNormBalancer(rule=rule, norm_decay=0.5)
    for step in steps[:3]:
        first.update(*step)
    second = GradNormBalancer(rule=rule, norm_decay=0.5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[3:]:
        second.update(*step)
    assert second.weights == whole.weights
    assert second.state_dict() == whole.state_dict()
    other = GradNormBalancer(rule="legacy" if rule == "gradnorm" else "gradnorm")
    with pytest.raises(ConfigError, match="has rule"):
        other.load_state_dict(first.state_dict())


def test_settings_are_checked():
    for wrong, message in (
        ({"rule": "paper"}, "rule must be one of"),
        ({"rule": "gradnorm", "alpha": -0.1}, "alpha must be at least 0"),
        ({"lr": 0.0}, "lr positive"),
        ({"norm_decay": 1.0}, "norm_decay"),
        ({"task_types": ()}, "without repeats"),
        ({"task_types": ("a", "a")}, "without repeats"),
        ({"initial_weights": {"T1": 1.0}}, "the tasks are"),
        ({"initial_weights": {"T1": 1.0, "T2": 0.0, "T3": 1.0}}, "must be positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            GradNormBalancer(**wrong)


def test_the_gradient_norm_is_that_of_all_gradients():
    model = torch.nn.Linear(2, 1)
    assert compute_gradient_norm(model) == 0.0
    model.weight.grad = torch.tensor([[3.0, 0.0]])
    model.bias.grad = torch.tensor([4.0])
    assert compute_gradient_norm(model) == 5.0
    assert compute_gradient_norm([model.bias]) == 4.0
