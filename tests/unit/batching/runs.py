"""Made-up runs for the tests of the monitor and its report."""

from __future__ import annotations

import math
import random

from vlmpack.batching.metrics import BatchMetrics


def run(num_steps: int = 12, *, num_epochs: int = 3, nan_at: int = 0) -> list[BatchMetrics]:
    """Return the steps of a run of three tasks whose loss falls; T3 is absent from every other step."""
    rng = random.Random(0)
    steps = []
    for step in range(1, num_steps + 1):
        tasks = {"T1": 4, "T2": 2} | ({"T3": 3} if step % 2 else {})
        losses = {task: 3.0 - step / num_steps + 0.1 * n for n, task in enumerate(tasks)}
        count = sum(tasks.values())
        steps.append(
            BatchMetrics(
                step=step,
                epoch=(step - 1) * num_epochs // num_steps,
                loss=math.nan if step == nan_at else sum(losses[t] * tasks[t] for t in tasks) / count,
                task_losses=losses,
                task_types=tasks,
                task_weights={"T1": 1.0, "T2": 0.5, "T3": 1.5},
                allocated_bytes=2 * 10**9,
                reserved_bytes=6 * 10**9,
                peak_bytes=int((4 + rng.random()) * 10**9),
                seconds=0.5 + 0.01 * count,
                num_samples=count,
                num_tokens=100 * count,
                grad_norm=1.0,
                task_grad_norms=dict.fromkeys(tasks, 0.5),
                num_micro_batches=4 if step == 5 else 2,
                num_ooms=2 if step == 5 else 0,
                learning_rate=1e-4,
                lr_scale=math.sqrt(count / 16),
            )
        )
    return steps
