"""Goals of normalising and balancing, measured: rows for the table of the batch-size control.

python -m benchmarks.batching_goals      print them
"""

from __future__ import annotations

import logging
import math
import time
from itertools import pairwise
from typing import TypedDict

import numpy as np
import torch
from transformers import get_scheduler

from tests.documented_batching import DOCUMENTED
from vlmpack.batching import (
    BatchMetrics,
    DynamicBatchingMonitor,
    EffectiveBatchSizeNormalizer,
    GradNormBalancer,
    GradVac,
    PCGrad,
    TaskBalancing,
    TaskGradients,
    documented_update,
    sample_counted_schedule,
    scaled_learning_rate,
)

SCHEDULES = ("linear", "cosine", "constant", "inverse_sqrt", "polynomial")
TASKS = ("T1", "T2", "T3")


class Row(TypedDict):
    goal: str
    what: str
    target: str
    measured: str
    met: bool


def documented() -> list[Row]:
    """Every sentence of the reference document on these parts, as code."""
    held = sum(check() for check in DOCUMENTED.values())
    total = len(DOCUMENTED)
    return [
        Row(
            goal="G2",
            what="documented formulas, names, defaults and presets: normalise, balance, monitor, config",
            target=f"{total} of {total}",
            measured=f"{held} of {total}",
            met=held == total,
        )
    ]


# ---- learning rate -----------------------------------------------------------------------------
def update_error(name: str, rule: str, *, steps: int = 500, seed: int = 0) -> float:
    """Return the largest relative error of updates against base(t) * s(b_t) under one schedule."""
    rng = np.random.default_rng(seed)
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=20, num_training_steps=steps)
    normalizer = EffectiveBatchSizeNormalizer(16, 32, 0.1, lr_rule=rule)  # type: ignore[arg-type]
    power = {"sqrt": 0.5, "linear": 1.0}[rule]
    worst = 0.0
    for _ in range(steps):
        size = int(rng.integers(1, 257))
        base = scheduler.get_last_lr()[0]
        with torch.no_grad():
            weight.zero_()
        weight.grad = torch.ones_like(weight)
        with scaled_learning_rate(optimizer, normalizer.lr_scale(size)):
            optimizer.step()
        want = base * (size / 16) ** power
        if want:
            worst = max(worst, abs(-weight.item() - want) / want)
        scheduler.step()
    return worst


def end_error(name: str, *, seed: int = 0) -> float:
    """Return how far a schedule counted in samples ends from its end."""
    rng = np.random.default_rng(seed)
    seen = np.concatenate([[0], np.cumsum(rng.integers(1, 257, 300))]).tolist()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = sample_counted_schedule(
        optimizer, name, samples_at=seen.__getitem__, total_samples=seen[-1], warmup_samples=seen[-1] // 10
    )
    for _ in pairwise(seen):
        optimizer.step()
        schedule.step()
    return abs(schedule.get_last_lr()[0] - (1e-7 if name == "polynomial" else 0.0))


def learning_rates() -> list[Row]:
    worst = max(update_error(name, rule) for name in SCHEDULES for rule in ("sqrt", "linear"))
    end = max(end_error(name) for name in ("linear", "cosine", "polynomial"))
    return [
        Row(
            goal="G10",
            what="update = base(t) x s(b_t), 5 schedules, 2 rules, 500 steps of 1 to 256 samples",
            target="<= 1e-12",
            measured=f"{worst:.1e}",
            met=worst <= 1e-12,
        ),
        Row(
            goal="G10",
            what="a schedule counted in samples ends at its end (linear, cosine, polynomial)",
            target="<= 1e-15",
            measured=f"{end:.1e}",
            met=end <= 1e-15,
        ),
    ]


# ---- balancing ---------------------------------------------------------------------------------
def updates_to_one_percent(alpha: float) -> int:
    """Return how many updates of the documented rule bring weighted norms within 1 % of equal."""
    norms = {"T1": 1.0, "T2": 2.0, "T3": 0.5}
    balancer = GradNormBalancer(alpha=alpha)

    def spread() -> float:
        logs = [math.log(balancer.weights[task] * norm) for task, norm in norms.items()]
        return max(logs) - min(logs)

    first = spread()
    for count in range(1, 1000):
        balancer.update(norms)
        if spread() <= 0.01 * first:
            return count
    return 1000


def slower_task_gains() -> float:
    """Return the slower task's weight after 50 steps of the paper's rule with equal gradients."""
    balancer = GradNormBalancer(("fast", "slow"), rule="gradnorm", alpha=1.0)
    balancer.update({"fast": 1.0, "slow": 1.0}, {"fast": 2.0, "slow": 2.0})
    for _ in range(50):
        balancer.update({"fast": 1.0, "slow": 1.0}, {"fast": 0.2, "slow": 1.8})
    return balancer.weights["slow"]


def sum_error(*, steps: int = 2000, seed: int = 0) -> float:
    """Return the largest distance of the weights' sum from their number, with absent and zero tasks."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for rule in ("legacy", "gradnorm"):
        balancer = GradNormBalancer(rule=rule)  # type: ignore[arg-type]
        for _ in range(steps):
            there = [task for task in TASKS if rng.random() < 0.7]
            norms = {task: float(rng.lognormal() * (rng.random() > 0.1)) for task in there}
            losses = {task: float(rng.lognormal()) for task in there}
            worst = max(worst, abs(sum(balancer.update(norms, losses).values()) - 3))
    return worst


def split_error(dtype: torch.dtype) -> float:
    """Return the largest relative difference of balanced gradients over splits of 48 samples."""
    worst = 0.0
    for make in (lambda: None, lambda: PCGrad(seed=1), lambda: GradVac(seed=1, beta=0.5)):
        found = []
        for size in (48, 16, 5, 1):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
            model = model.to(dtype)
            x, y = (torch.randn(48, width, dtype=torch.float64).to(dtype) for width in (16, 3))
            balancing = TaskBalancing(
                TaskGradients(model.parameters(), TASKS), balancer=GradNormBalancer(), surgery=make()
            )
            for step in range(3):
                model.zero_grad()
                balancing.begin_step()
                for start in range(0, 48, size):
                    gap = (model(x[start : start + size]) - y[start : start + size]) ** 2
                    balancing.backward({task: gap[:, n].sum() / 48 for n, task in enumerate(TASKS)})
                balancing.finish_step(step)
            found.append(torch.cat([each.grad.flatten() for each in model.parameters()]))  # type: ignore[union-attr]
        worst = max(worst, *(float((each - found[0]).norm() / found[0].norm()) for each in found[1:]))
    return worst


def balancing() -> list[Row]:
    counts = {alpha: updates_to_one_percent(alpha) for alpha in (0.1, 0.5, 1.0, 1.5, 1.9)}
    weights = dict.fromkeys(TASKS, 1.0)
    for _ in range(10):
        weights = documented_update(weights, {"T1": 1.0, "T2": 2.0, "T3": 0.5}, 1.5)
    gain, off = slower_task_gains(), sum_error()
    rows = [
        Row(
            goal="G14",
            what="documented rule on weighted norms: updates to within 1 %, alpha 0.1, 0.5, 1, 1.5, 1.9 "
            f"(on plain norms one task has {max(weights.values()) / 3:.1%} of the weight after 10)",
            target="converges",
            measured=", ".join(map(str, counts.values())),
            met=max(counts.values()) < 100,
        ),
        Row(
            goal="G14",
            what="paper's rule: weight of the slower of two tasks with equal gradients after 50 steps",
            target="> 1",
            measured=f"{gain:.2f}",
            met=gain > 1,
        ),
        Row(
            goal="G14",
            what="weights sum to the number of tasks, 2 rules x 2,000 steps with absent and zero tasks",
            target="<= 1e-12",
            measured=f"{off:.1e}",
            met=off <= 1e-12,
        ),
    ]
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        error = split_error(dtype)
        rows.append(
            Row(
                goal="G5",
                what=f"balanced gradient (GradNorm, PCGrad, GradVac) over 4 splits, {dtype}".replace(
                    "torch.", ""
                ),
                target=f"<= {bound:.0e}",
                measured=f"{error:.1e}",
                met=error <= bound,
            )
        )
    return rows


def overhead() -> list[Row]:
    """What recording a step costs, in memory alone: the share of a step of 50 ms."""
    step = dict.fromkeys(TASKS, 1.0)
    times = []
    for _ in range(5):
        monitor = DynamicBatchingMonitor()
        begin = time.process_time()
        for number in range(1, 2001):
            monitor.record_batch(
                BatchMetrics(
                    step=number, loss=1.0, task_losses=step, task_weights=step, seconds=0.05, num_samples=8
                )
            )
        times.append((time.process_time() - begin) / 2000)
    share = sorted(times)[2] / 0.05
    return [
        Row(
            goal="G15",
            what="recording a step by the monitor, share of a step of 50 ms of CPU time",
            target="<= 2 %",
            measured=f"{share:.3%}",
            met=share <= 0.02,
        )
    ]


def rows() -> list[Row]:
    return [*documented(), *learning_rates(), *balancing(), *overhead()]


def main() -> None:
    logging.getLogger("vlmpack").setLevel(logging.ERROR)  # zero gradients are part of it
    for row in rows():
        state = "met" if row["met"] else "NOT met"
        print(f"{row['goal']:4} {state:7} {row['measured']:>18} {row['target']:>11}  {row['what']}")


if __name__ == "__main__":
    main()
