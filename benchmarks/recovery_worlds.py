"""Worlds with a hidden memory function, in which steps are split and recovered without any model.

A step holds 64 samples of different lengths and images. What a micro-batch really takes is a line through
tokens and images that nobody told the guardian, bent by noise of 1 % and, in 2 % of micro-batches, by a bump
of up to 5 %. The formula that the guardian starts from is wrong by up to 30 %.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vlmpack.batching import OOMGuardian, SampleShape, run_step_with_recovery, simulated_oom
from vlmpack.memory import CalibratedCost, FakeMemory, LinearCost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmpack.batching import MicroBatch

MB = 1e6
STEP = 64


@dataclass(slots=True)
class World:
    """One device, one model, one data set; implements `StepRunner`."""

    seed: int
    limit: float = 20_000 * MB
    rng: np.random.Generator = field(init=False)
    truth: np.ndarray = field(init=False)
    backend: FakeMemory = field(init=False)
    num_runs: int = 0
    num_ooms: int = 0
    ran: list[str] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng([self.seed, 11])
        fixed, token, image = self.rng.uniform([2000, 0.3, 100], [6000, 0.6, 300])
        self.truth = np.array([fixed, token, image]) * MB
        self.backend = FakeMemory(total=int(self.limit))

    def guardian(self, alpha: float) -> OOMGuardian:
        """Return one whose formula is wrong."""
        wrong = self.truth * self.rng.uniform(0.7, 1.3, 3)
        cost = LinearCost(name="world", features=("batch", "tokens", "images"), theta=tuple(wrong))
        return OOMGuardian(
            CalibratedCost(cost, alpha=alpha, spread=0.3), memory_margin_percent=0.0, backend=self.backend
        )

    def step(self, number: int) -> list[SampleShape]:
        """Return the samples of a step."""
        tokens = self.rng.integers(50, 2000, STEP).tolist()
        images = self.rng.integers(0, 5, STEP).tolist()
        return [
            SampleShape(key=f"{number}-{at}", num_tokens=token, num_images=image)
            for at, (token, image) in enumerate(zip(tokens, images, strict=True))
        ]

    def begin(self, parts: Sequence[MicroBatch]) -> None:  # noqa: ARG002 - the runner's interface
        self.ran = []

    def run(self, part: MicroBatch) -> None:
        self.num_runs += 1
        tokens = sum(shape.num_tokens for shape in part.shapes)
        images = sum(shape.num_images for shape in part.shapes)
        need = float(self.truth @ np.array([1, tokens, images])) * (1 + 0.01 * self.rng.standard_normal())
        if self.rng.random() < 0.02:
            need *= 1 + 0.05 * self.rng.random()
        if need > self.limit:
            self.num_ooms += 1
            raise simulated_oom(need, self.limit)
        self.backend.peak = int(need)
        self.loads.append(need / self.limit)
        self.ran += [shape.key for shape in part.shapes]

    def restore(self) -> None:
        self.ran = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Play:
    """What a world's run was like."""

    attempts: tuple[int, ...]
    """Of each step."""
    oom_rate: float
    """OOMs / micro-batches after the warm-up."""
    lost: int
    """Samples that did not run exactly once."""
    load: float
    """Mean share of the device that a micro-batch filled, after the warm-up."""


def play(seed: int, *, steps: int, alpha: float, warm_up: int = 20) -> Play:
    """Run one world."""
    world = World(seed)
    guardian = world.guardian(alpha)
    attempts, lost, before = [], 0, (0, 0)
    for number in range(steps):
        if number == warm_up:
            before = (world.num_ooms, world.num_runs)
            world.loads.clear()
        shapes = world.step(number)
        report = run_step_with_recovery(shapes, world, guardian=guardian, undo=world, shapes=shapes)
        attempts.append(report.num_attempts)
        lost += len({shape.key for shape in shapes} ^ set(world.ran)) + len(world.ran) - len(set(world.ran))
    runs = world.num_runs - before[1]
    return Play(
        attempts=tuple(attempts),
        oom_rate=(world.num_ooms - before[0]) / runs,
        lost=lost,
        load=float(np.mean(world.loads)),
    )
