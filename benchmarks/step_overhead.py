"""What planning, splitting and bookkeeping add to a step: its CPU time less the model's and the collator's.

Measured inside of each step, so that a busy machine cannot move one side alone; the plain Trainer has a part
of it too, which is not taken off.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.goal_rows import Row, row
from tests.toy_training import Causal, Texts, arguments, collate
from vlmpack.batching import DynamicBatchingTrainer, OOMGuardian, OOMSimulator
from vlmpack.batching.records import StepDataset
from vlmpack.memory import CalibratedCost, LinearCost

if TYPE_CHECKING:
    from collections.abc import Callable

STEP_S = 0.050
FORMULA = LinearCost(name="tokens", features=("batch", "tokens", "samples"), theta=(1e3, 10.0, 5.0))


class Clock:
    """CPU time spent inside of what it wraps."""

    def __init__(self) -> None:
        self.inside = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside += time.process_time() - began

        return timed


class Timed(DynamicBatchingTrainer):
    """Notes each step's CPU time, and the part of it that any training spends."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        before, began = self.clock.inside, time.process_time()
        loss = super().training_step(*args, **kwargs)
        total = time.process_time() - began
        self.added.append(total - (self.clock.inside - before))
        return loss


def added_times(steps: int, parts: int) -> tuple[float, float]:
    """Return what a step added at the median, reading its samples' shapes included, and its micro-batches.

    Args:
        steps: To measure.
        parts: Micro-batches that the device's size asks for, about.
    """
    clock, samples = Clock(), 64
    data = Texts(samples * 4, longest=40)
    tokens = sum(len(sample["input_ids"]) for sample in data.samples) / 4
    budget = (1e3 + (tokens * 10 + samples * 5) / parts) * 1.3
    simulator = OOMSimulator(
        lambda inputs: 1e3 + 10.0 * int((inputs["input_ids"] > 0).sum()) + 5.0 * len(inputs["input_ids"]),
        limit_bytes=budget,
    )
    model = Causal(dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder, simulator.attached(model):
        trainer = Timed(
            model,
            arguments(folder, per_device_train_batch_size=samples, max_steps=steps + 20),
            data_collator=clock.wrap(collate),
            train_dataset=data,
            oom_guardian=OOMGuardian(
                CalibratedCost(FORMULA, spread=0.05), backend=simulator.backend, memory_margin_percent=0.0
            ),
        )
        trainer.clock, trainer.added = clock, []
        for name in ("compute_loss", "_prepare_inputs"):
            setattr(trainer, name, clock.wrap(getattr(trainer, name)))
        trainer.accelerator.backward = clock.wrap(trainer.accelerator.backward)
        trainer.train()
    times = []
    for _ in range(21):
        began = time.process_time()
        StepDataset(data).__getitems__(range(samples))
        times.append(time.process_time() - began)
    micro = simulator.num_calls / (steps + 20)
    return statistics.median(trainer.added[20:]) + statistics.median(times), micro


def overhead(steps: int) -> list[Row]:
    rows = []
    for parts in (1, 4):
        added, micro = added_times(steps, parts)
        what = f"CPU time that plan, split, rollback, metrics add to a step of 64 samples, {micro:.1f} parts"
        measured = f"{added / STEP_S:.1%} ({added * 1e3:.2f} ms)"
        rows.append(row("G15", f"{what}, share of 50 ms", "<= 2 %", measured, added <= 0.02 * STEP_S))
    return rows
