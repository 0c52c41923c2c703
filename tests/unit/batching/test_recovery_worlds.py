"""In worlds with a hidden memory function, steps take few attempts and errors die out."""

from __future__ import annotations

import numpy as np

from benchmarks.recovery_worlds import World, play
from vlmpack.batching import OOMGuardian, run_step_with_recovery


def test_with_a_formula_wrong_by_up_to_a_third_steps_need_few_attempts_and_errors_stay_below_alpha():
    plays = [play(seed, steps=80, alpha=0.05) for seed in range(5)]
    attempts = np.concatenate([each.attempts for each in plays])
    assert (attempts <= 3).mean() >= 0.99
    assert np.mean([each.oom_rate for each in plays]) <= 0.05
    assert sum(each.lost for each in plays) == 0
    assert np.mean([each.load for each in plays]) > 0.7  # and the device is used


def test_without_any_formula_the_first_failures_teach_the_limit():
    world = World(3)
    guardian = OOMGuardian()
    attempts = []
    for number in range(150):
        shapes = world.step(number)
        report = run_step_with_recovery(shapes, world, guardian=guardian, undo=world, shapes=shapes)
        attempts.append(report.num_attempts)
    assert attempts[0] > 1
    assert sum(number > 1 for number in attempts[20:]) <= 2
    assert max(attempts[20:]) <= 3
