"""The plan of a whole run: which samples each optimizer step holds, for all epochs and ranks, in advance.

    epoch 0            epoch 1       step sizes may change between epochs, never within the plan
    s0  s1  s2  s3  |  s4  s5        len(plan) = 6: the learning rate's schedule ends where it should
     rank 0 takes some of each step, rank 1 the others

A Trainer asks a loader for its length once and for the whole run, so a sampler whose epochs differ loses
samples and its schedule never ends. Here the whole run is one pass over one plan. Memory has no say in it:
it decides how a step is split, not what it holds.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch.utils.data import Sampler

from vlmpack.batching.records import StepIndices
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class StepSource(Protocol):
    """Says what the steps of an epoch hold, over all ranks: a pure function of the epoch."""

    @property
    def digest(self) -> str:
        """A name for the source: equal for equal data and settings."""
        ...

    def batches(self, epoch: int) -> Sequence[Sequence[int]]:
        """Return the samples of each step of an epoch.

        Args:
            epoch: From 0.
        """
        ...


class RandomSteps:
    """Every sample once an epoch, in seeded random order, in steps of a given size.

    Args:
        num_samples: Samples of the data set.
        step_size: Samples of a step over all ranks, or a function of the epoch.
        shuffle: False keeps the data set's order.
        seed: Of the order.
        drop_last: Leave out a last, smaller step.

    Raises:
        ConfigError: If a number is not positive.
    """

    def __init__(
        self,
        num_samples: int,
        step_size: int | Callable[[int], int],
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if num_samples < 1:
            raise ConfigError(f"there must be at least one sample, got {num_samples}")
        self.num_samples = num_samples
        self.step_size = step_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.size_of(0)

    def size_of(self, epoch: int) -> int:
        """Return the samples of a step in an epoch.

        Args:
            epoch: From 0.

        Raises:
            ConfigError: If it is not positive.
        """
        size = self.step_size(epoch) if callable(self.step_size) else self.step_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"a step of epoch {epoch} must hold a positive number of samples, got {size!r}")
        return size

    @property
    def digest(self) -> str:
        """A name for the order; step sizes of later epochs are the plan's business."""
        return f"random-{self.num_samples}-{self.size_of(0)}-{self.shuffle}-{self.seed}-{self.drop_last}"

    def num_batches(self, epoch: int) -> int:
        """Return the number of steps of an epoch, without making them.

        Args:
            epoch: From 0.
        """
        size = self.size_of(epoch)
        return self.num_samples // size if self.drop_last else -(-self.num_samples // size)

    def batches(self, epoch: int) -> list[list[int]]:
        """Return the samples of each step of an epoch.

        Args:
            epoch: From 0.
        """
        rng = np.random.default_rng([self.seed, epoch, 1])
        order = (rng.permutation(self.num_samples) if self.shuffle else np.arange(self.num_samples)).tolist()
        size = self.size_of(epoch)
        steps = [order[at : at + size] for at in range(0, self.num_samples, size)]
        return steps[: self.num_batches(epoch)]


class StepPlan(Sampler[list[int]]):
    """This rank's samples of every step of a run; a batch sampler with an exact length.

    Args:
        source: What the steps of an epoch hold: `RandomSteps`, or a `MemoryAwareBatchSampler`.
        epochs: Passes over the data; a fraction ends in the middle of one.
        max_steps: Steps of the run, whatever the epochs.
        rank: This process, from 0.
        world_size: Processes in all.
        costs: What each sample costs; ranks then get equal loads, else every world_size-th sample.

    Raises:
        ConfigError: If a setting is invalid, or an epoch has no step.
    """

    def __init__(
        self,
        source: StepSource,
        *,
        epochs: float = 1,
        max_steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        costs: Sequence[float] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        if max_steps is None and not epochs > 0:
            raise ConfigError(f"epochs must be positive, got {epochs}")
        if max_steps is not None and max_steps < 1:
            raise ConfigError(f"max_steps must be positive, got {max_steps}")
        self.source = source
        self.rank = rank
        self.world_size = world_size
        self.batch_size = None
        """None, on purpose: accelerate would drop steps of another size."""
        self._costs = costs
        self._ends = self._epoch_ends(epochs, max_steps)
        self._next_step = 0
        self._made: dict[int, Sequence[Sequence[int]]] = {}

    def _epoch_ends(self, epochs: float, max_steps: int | None) -> list[int]:
        """Return the step with which each epoch ends, counted from the run's beginning.

        Raises:
            ConfigError: If an epoch has no step.
        """
        ends: list[int] = []
        total = 0
        while max_steps is None or total < max_steps:
            epoch = len(ends)
            if max_steps is None and epoch >= epochs:
                break
            number = self._num_steps(epoch)
            if not number:
                raise ConfigError(f"epoch {epoch} has no step: there are fewer samples than a step holds")
            if max_steps is None and epochs - epoch < 1:
                number = math.ceil((epochs - epoch) * number)
            total = total + number if max_steps is None else min(total + number, max_steps)
            ends.append(total)
        return ends

    def _num_steps(self, epoch: int) -> int:
        if isinstance(self.source, RandomSteps):
            return self.source.num_batches(epoch)
        return len(self.source.batches(epoch))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def epoch_ends(self) -> tuple[int, ...]:
        """Steps done at the end of each epoch."""
        return tuple(self._ends)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that a step belongs to.

        Args:
            step: From 0.
        """
        return min(bisect_right(self._ends, step), len(self._ends) - 1)

    def progress(self, num_steps: int) -> float:
        """Return how many epochs are done after so many steps: 1.5 in the middle of the second one.

        Args:
            num_steps: Steps done.
        """
        if num_steps <= 0:
            return 0.0
        epoch = self.epoch_of(num_steps - 1)
        begin = self._ends[epoch - 1] if epoch else 0
        return epoch + (num_steps - begin) / self._num_steps(epoch)

    def step(self, number: int) -> Sequence[int]:
        """Return the samples of a step over all ranks.

        Args:
            number: From 0.
        """
        epoch = self.epoch_of(number)
        if epoch not in self._made:
            # two: a loader reads ahead into the next epoch while the trainer asks for this one
            self._made = {each: steps for each, steps in self._made.items() if abs(each - epoch) < 2}
            self._made[epoch] = self.source.batches(epoch)
        return self._made[epoch][number - (self._ends[epoch - 1] if epoch else 0)]

    def mine(self, number: int) -> StepIndices:
        """Return this rank's samples of a step; none where there are fewer samples than ranks.

        Args:
            number: From 0.
        """
        samples = self.step(number)
        if self._costs is not None and self.world_size > 1:
            samples = _in_turns(samples, self._costs, self.world_size)
        return StepIndices(samples[self.rank :: self.world_size], number, self.epoch_of(number))

    def __iter__(self) -> Iterator[list[int]]:
        begin, self._next_step = self._next_step, 0
        for number in range(begin, len(self)):
            yield self.mine(number)

    @property
    def digest(self) -> str:
        """A name for the plan, the same on every rank and for any number of ranks."""
        return hashlib.sha256(repr((self.source.digest, self._ends)).encode()).hexdigest()[:16]

    def state_dict(self, next_step: int) -> dict[str, int | str]:
        """Return where a run stands.

        Args:
            next_step: Steps done.
        """
        return {"digest": self.digest, "next_step": next_step}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Let the next iteration begin where a run stood; with any number of ranks.

        Raises:
            ConfigError: If the state is of another plan.
        """
        self.check_digest(str(state["digest"]))
        self._next_step = int(state["next_step"])

    def check_digest(self, digest: str) -> None:
        """Make sure that a saved run had this plan.

        Args:
            digest: What was saved.

        Raises:
            ConfigError: If it had not.
        """
        if digest != self.digest:
            raise ConfigError(
                f"the saved run had the step plan {digest}, this one is {self.digest}: data, step size, "
                "epochs or seed changed, so its place means nothing; resume with the old settings, or begin "
                "anew"
            )


def _in_turns(samples: Sequence[int], costs: Sequence[float], world_size: int) -> list[int]:
    """Return the samples so that every world_size-th one gives equal loads: dearest first, back and forth."""
    ordered = sorted(samples, key=lambda index: (-costs[index], index))
    turned: list[int] = []
    for at in range(0, len(ordered), world_size):
        row = ordered[at : at + world_size]
        turned += row[::-1] if (at // world_size) % 2 and len(row) == world_size else row
    return turned
