"""Goals of splitting, recovery, planning and the Trainer, measured: rows for the batch-size control's table.

Gradients are compared with an oracle that adds up samples one by one; memory errors come from the simulator.
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from transformers import Trainer, TrainerCallback

from benchmarks.goal_rows import Row, row
from benchmarks.recovery_worlds import play
from benchmarks.step_overhead import overhead
from tests.documented_steps import DOCUMENTED_STEPS
from tests.properties.test_step_recovery import RATE, WEIGHTS, Recording, worst_error
from tests.toy_training import Causal, Texts, arguments, collate, memory_of, weights
from tests.unit.batching import test_trainer_guards as trap
from tests.unit.batching.test_detect import DECOYS, FORMS
from tests.unit.batching.test_trainer_guards import Named, Tasks, seen_by_accelerate
from tests.unit.batching.test_trainer_resume import run as run_resumable
from vlmpack.batching import (
    DynamicBatchingTrainer,
    MemoryFault,
    OOMSimulator,
    is_oom_error,
)
from vlmpack.batching.sampler import TaskItems
from vlmpack.errors import OversizeError
from vlmpack.kernels import first_fit
from vlmpack.kernels.shares import num_entries

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def documented() -> list[Row]:
    """Every sentence of the reference documents on these parts, as code."""
    held, total = sum(check() for check in DOCUMENTED_STEPS.values()), len(DOCUMENTED_STEPS)
    what = "documented names, defaults and behaviour: sampler, collator, memory safety, trainer"
    return [row("G2", what, f"{total} of {total}", f"{held} of {total}", held == total)]


# ---- gradients and samples -----------------------------------------------------------------------
@lru_cache(maxsize=4)
def trainings(number: int, double: bool) -> tuple[float, int, int, int]:
    """Train under random faults; return the worst error, OOMs, samples trained, samples lost or doubled."""
    rng = random.Random(5)
    worst, ooms, trained, wrong = 0.0, 0, 0, 0
    dtype = torch.float64 if double else torch.float32
    done = 0
    while done < number:
        data = Texts(rng.randrange(4, 16), tasks=("T1", "T2", "T3"), seed=rng.randrange(99))
        loss = rng.choice(["model", "token", "sample"])
        faults = [
            MemoryFault(call=call, phase=rng.choice(["forward", "backward"]))
            for call in rng.sample(range(16), 4)
        ]
        model = Causal(dtype=dtype)
        simulator = OOMSimulator(
            memory_of, limit_bytes=rng.choice([float("inf"), 400, 250]), faults=faults, phase="random"
        )
        with tempfile.TemporaryDirectory() as folder, simulator.attached(model):
            sizes = {"num_train_epochs": 2, "per_device_train_batch_size": rng.randrange(3, 10)}
            trainer = Recording(
                model,
                arguments(folder, learning_rate=RATE, **sizes),
                data_collator=collate,
                train_dataset=data,
                task_loss_weights=WEIGHTS,
                loss=loss,
            )
            trainer.trained = []
            try:
                trainer.train()
            except OversizeError:
                continue  # one sample met two faults: too large by itself, as far as anybody can tell
        done += 1
        plan = trainer.step_plan
        worst = max(worst, worst_error(trainer, Causal(dtype=dtype), data, WEIGHTS, loss))
        ooms += simulator.num_ooms
        for step, (keys, *_) in enumerate(trainer.trained):
            wanted = Counter(f"s{index}" for index in plan.step(step))
            wrong += sum(((Counter(keys) - wanted) + (wanted - Counter(keys))).values())
            trained += len(keys)
    return worst, ooms, trained, wrong


def gradients(number: int) -> list[Row]:
    rows = []
    for double, bound in ((True, 1e-12), (False, 1e-6)):
        worst, ooms, trained, wrong = trainings(number if double else number // 2, double)
        name = "float64" if double else "float32"
        what = f"gradient against samples one by one, {ooms} OOMs in both passes, three losses, {name}"
        rows.append(row("G5", what, f"<= {bound:.0e}", f"{worst:.1e}", worst <= bound))
        if double:
            what = f"samples lost or doubled of {trained:,} trained, the same runs"
            rows.append(row("G6", what, "0", str(wrong), wrong == 0))
    return rows


def resume() -> list[Row]:
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = run_resumable(f"{folder}/whole", dropout=0.2)
        for stop in range(1, 6):
            first = run_resumable(f"{folder}/{stop}", dropout=0.2, stop=stop)
            rest = run_resumable(f"{folder}/{stop}", dropout=0.2, resume=f"{folder}/{stop}/checkpoint-{stop}")
            same += torch.equal(weights(rest.model), weights(whole.model)) and (
                first.steps + rest.steps == whole.steps
            )
    what = "stops after which the run ends with the same bits and order, dropout and OOMs included"
    return [row("G7", what, "5 of 5", f"{same} of 5", same == 5)]


# ---- recovery ------------------------------------------------------------------------------------
def recovery(worlds: int, steps: int) -> list[Row]:
    plays = [play(seed, steps=steps, alpha=0.01) for seed in range(worlds)]
    attempts = np.concatenate([each.attempts for each in plays])
    share = float((attempts <= 3).mean())
    rates = [each.oom_rate for each in plays]
    lost = sum(each.lost for each in plays)
    what = f"steps with at most 3 attempts, {worlds} worlds of {steps} steps, formula wrong by up to 30 %"
    return [
        row("G9", what, ">= 99 %", f"{share:.2%} (most {attempts.max()})", share >= 0.99),
        row(
            "G9",
            "OOMs a micro-batch after 20 steps, mean (worst world), alpha 1 %",
            "<= 1 %",
            f"{statistics.mean(rates):.2%} ({max(rates):.2%})",
            statistics.mean(rates) <= 0.01,
        ),
        row("G6", "samples of those steps that did not run exactly once", "0", str(lost), lost == 0),
    ]


class Counting(Texts):
    """Counts what is read."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.read: Counter[int] = Counter()

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read[index] += 1
        return super().__getitem__(index)


class StepSizes(TrainerCallback):  # type: ignore[misc]
    """Counts optimizer steps, also those that a restart forgets."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def one_late_oom(trainer_class: Any, **more: Any) -> tuple[int, int]:
    """Train 48 samples in six steps, with one OOM in the fifth; return steps taken and samples read twice."""
    data, counter, model = Counting(48), StepSizes(), Causal()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model,
            arguments(folder, per_device_train_batch_size=8, **more),
            data_collator=collate,
            train_dataset=data,
            callbacks=[counter],
        )
        with OOMSimulator(faults=[MemoryFault(call=4, phase="backward")]).attached(model):
            trainer.train()
    return counter.steps, sum(data.read.values()) - len(data.read)


def beside_restarts() -> list[Row]:
    ours, ours_doubled = one_late_oom(DynamicBatchingTrainer)
    restarted, doubled = one_late_oom(Trainer, auto_find_batch_size=True)
    calls: list[int] = []

    @find_executable_batch_size(starting_batch_size=8)  # type: ignore[untyped-decorator]
    def loop(batch_size: int) -> int:
        calls.append(batch_size)
        for step in range(6):
            if len(calls) == 1 and step == 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return batch_size

    final = loop()
    what = "samples read twice after one OOM in step 5 of 6 (48 samples); optimizer steps taken"
    return [
        row("G6", f"{what}: this", "0; 6", f"{ours_doubled}; {ours}", (ours_doubled, ours) == (0, 6)),
        row("", f"{what}: Trainer, auto_find_batch_size", "", f"{doubled}; {restarted}", True),
        row(
            "",
            "the same by accelerate's find_executable_batch_size: runs of the loop, batch size from then on",
            "",
            f"{len(calls)}; {final} for good",
            True,
        ),
    ]


# ---- the sampler ---------------------------------------------------------------------------------
LIMIT = 27_000_000_000
FIXED = 270_000_000


def task_items(number: int, seed: int) -> TaskItems:
    """Samples of five tasks whose costs spread from 0.3 to 12 GB: memory binds, not the number."""
    rng = np.random.default_rng(seed)
    task = rng.choice(5, number, p=[0.4, 0.25, 0.2, 0.1, 0.05])
    cost = (rng.uniform(0.3, 3.0, number) * np.array([1, 1.85, 1.87, 3, 4])[task] * 1e9).astype(np.int64)
    return TaskItems(cost_N=cost, task_N=task.astype(np.int64))


def imbalance(batches: Sequence[np.ndarray], task: np.ndarray, weight: np.ndarray) -> float:
    """Return the mean over batches of 1 - diversity of the largest task: how one-sided batches are."""
    shares = []
    for batch in batches:
        counts = np.bincount(task[batch], minlength=len(weight))
        shares.append(counts.max() / counts.sum())
    return float(np.mean(shares))


def sampler(number: int) -> list[Row]:
    items = task_items(number, 1)
    position = np.random.default_rng(0).permutation(number)
    settings: dict[str, Any] = {"fixed": FIXED, "limit": LIMIT, "max_batch": 1 << 30, "weight": 0.5}
    task_items(100, 2).batches(np.arange(100), priority="bestfit", **settings)  # compiles
    began = time.process_time()
    ours = items.batches(position, priority="bestfit", **settings)
    speed = number / (time.process_time() - began)
    legacy = items.batches(position, priority="legacy", **settings)
    loads = np.array([items.cost_N[batch].sum() + FIXED for batch in ours])
    bins = np.empty(number, np.int64)
    order = np.argsort(position).astype(np.int64)
    room = np.array([LIMIT - FIXED], np.int64)
    baseline = first_fit(items.cost_N.reshape(-1, 1), order, room, num_entries(1), bins)
    fill = float(loads.sum() / (LIMIT * len(loads)))
    first = float((items.cost_N.sum() + FIXED * baseline) / (LIMIT * baseline))
    over = int((loads > LIMIT).sum())
    tasks = np.zeros(5)
    mixed, documented = (imbalance(each, items.task_N, tasks) for each in (ours, legacy))
    return [
        row("G11", f"batches over the limit, of {len(loads):,}", "0", str(over), over == 0),
        row(
            "G11",
            "fill of the limit (first fit in the same order)",
            ">= 95 %",
            f"{fill:.1%} ({first:.1%})",
            fill >= 0.95,
        ),
        row(
            "G11",
            "largest task's share of a batch (by the documented priority)",
            "<= that",
            f"{mixed:.3f} ({documented:.3f})",
            mixed <= documented + 1e-9,
        ),
        row("G11", f"samples planned a CPU second, n = {number:,}", ">= 1e5", f"{speed:.1e}", speed >= 1e5),
    ]


# ---- detection and guards ------------------------------------------------------------------------
def detection() -> list[Row]:
    ours = sum(map(is_oom_error, FORMS.values())), sum(map(is_oom_error, DECOYS.values()))
    theirs = (
        sum(map(should_reduce_batch_size, FORMS.values())),
        sum(map(should_reduce_batch_size, DECOYS.values())),
    )
    what = "forms of out-of-memory recognised, decoys taken for one"
    return [
        row("G12", f"{what}: this", "12; 0", f"{ours[0]}; {ours[1]}", ours == (12, 0)),
        row("", f"{what}: accelerate", "", f"{theirs[0]}; {theirs[1]}", True),
    ]


TRAPS: dict[str, tuple[Callable[..., None], ...]] = {
    "streamed packs cut by the dispatcher": (
        trap.test_the_plain_trainer_cuts_the_tiles_of_a_streamed_pack,
        trap.test_a_streamed_pack_arrives_whole,
    ),
    "batch_size attribute under DDP": (
        trap.test_a_batch_size_attribute_makes_accelerate_lose_and_double_samples,
    ),
    "epochs of different length": (
        trap.test_the_plain_trainer_counts_the_first_epochs_steps_and_the_schedule_never_ends,
        trap.test_a_plan_counts_every_epoch_and_the_schedule_ends,
    ),
    "labels at document starts": (
        lambda folder: trap.test_only_the_plain_trainer_trains_on_a_label_across_samples(folder, False),
    ),
}
"""Tests that hold if the plain Trainer falls into a trap, and ours does not."""


def guards() -> list[Row]:
    held = []
    for name, tests in TRAPS.items():
        with tempfile.TemporaryDirectory() as folder:
            for test in tests:
                test(*[Path(folder)] * test.__code__.co_argcount)
        held.append(name)
    named = seen_by_accelerate(Named(Tasks(100), 8, 6000, priority="legacy"))
    what = f"traps that the plain Trainer falls into and this one does not ({'; '.join(held)})"
    return [
        row(
            "G13",
            what,
            f"{len(TRAPS)} of {len(TRAPS)}",
            f"{len(held)} of {len(TRAPS)}",
            len(held) == len(TRAPS),
        ),
        row(
            "",
            "samples of 100 that 2 ranks of accelerate lose by the batch_size attribute",
            "",
            str(100 - len(named)),
            True,
        ),
    ]


def rows(*, quick: bool = False) -> list[Row]:
    """Measure everything.

    Args:
        quick: Fewer trainings, worlds and samples.
    """
    gc.collect()
    gc.freeze()  # a recovery collects garbage; that of imports is not its business
    return [
        *([] if quick else documented()),  # tests say the same
        *gradients(6 if quick else 60),
        *resume(),
        *recovery(3 if quick else 30, 60 if quick else 500),
        *beside_restarts(),
        *sampler(20_000 if quick else 1_000_000),
        *detection(),
        *([] if quick else guards()),
        *overhead(10 if quick else 60),
    ]
