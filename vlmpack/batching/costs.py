"""One view of every memory formula for those who split: bytes of an item, of a batch, and what was learned.

A formula may be a `LinearCost`, a `CalibratedCost`, a `MemoryPredictor` around either, or none: then an item
costs its tokens and images, in units that only compare, and a failure is what tells the limit.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from vlmpack.batching.records import COUNTS
from vlmpack.memory.calibrate import CalibratedCost
from vlmpack.memory.linear_cost import LinearCost
from vlmpack.memory.predictor import MemoryPredictor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vlmpack.batching.records import SampleShape

Formula: TypeAlias = "LinearCost | CalibratedCost | MemoryPredictor | None"

UNITS: Final = LinearCost(name="units", features=("samples", "tokens", "images"), theta=(1.0, 1.0, 256.0))
"""What items cost where no formula is given: an image counts as 256 tokens. Not bytes."""


class StepCosts:
    """What the items of a step cost.

    Args:
        formula: Bytes of a batch; None: units without a meaning in bytes.
    """

    def __init__(self, formula: Formula = None) -> None:
        self.calibrated: CalibratedCost | None = None
        self.formula = formula
        if isinstance(formula, MemoryPredictor):
            self.cost = formula.cost
            self.calibrated = formula.calibrated if formula.method == "rls" else None
        elif isinstance(formula, CalibratedCost):
            self.cost, self.calibrated = formula.cost, formula
        else:
            self.cost = formula or UNITS
        names = [name for name in self.cost.features if name != "batch"]
        self._counted = {name: COUNTS[name] for name in names if name in COUNTS}
        self._tasks = frozenset(name for name in names if name not in COUNTS)

    @property
    def is_in_bytes(self) -> bool:
        """Whether costs are bytes and can be compared with a device."""
        return self.formula is not None

    def counts(self, shapes: Iterable[SampleShape]) -> dict[str, float]:
        """Return the features of a batch of these items."""
        shapes = list(shapes)
        total = {name: float(sum(map(count, shapes))) for name, count in self._counted.items()}
        if self._tasks:
            tasks = Counter(shape.task_type for shape in shapes)
            if not tasks.keys() <= self._tasks:
                self._refuse_task(shapes)
            total.update({task: float(number) for task, number in tasks.items()})
        return total

    def items(self, shapes: Sequence[SampleShape]) -> list[float]:
        """Return what each item adds to a batch, as far as known."""
        theta = self.cost.theta if self.calibrated is None else self.calibrated.calibrator.theta.tolist()
        price = {name: max(each, 0.0) for name, each in zip(self.cost.features, theta, strict=True)}
        if not self._tasks:
            added = [0.0] * len(shapes)
        elif {shape.task_type for shape in shapes} <= self._tasks:
            added = [price[shape.task_type] for shape in shapes]
        else:
            self._refuse_task(shapes)
        for name, count in self._counted.items():
            each = price[name]
            added = [cost + each * count(shape) for cost, shape in zip(added, shapes, strict=True)]
        return added

    def _refuse_task(self, shapes: Iterable[SampleShape]) -> NoReturn:
        for shape in shapes:
            shape.counts(self.cost.features)  # raises where the task is unknown
        raise AssertionError("every task is known")

    @property
    def fixed(self) -> float:
        """What a batch costs whatever it holds."""
        return self.predict({})

    def predict(self, counts: Mapping[str, float]) -> float:
        """Return what a batch is expected to cost."""
        return self.calibrated.predict(counts) if self.calibrated else self.cost.predict(counts)

    def upper(self, counts: Mapping[str, float]) -> float:
        """Return what a batch costs at most, but for a small share of all batches."""
        if self.calibrated is not None:
            return self.calibrated.upper(counts)
        if isinstance(self.formula, MemoryPredictor):
            return self.formula.upper(counts) * 1e9
        return self.cost.predict(counts)

    def room(self, budget: float, counts: Mapping[str, float]) -> float:
        """Return what the items of a batch may cost together so that its upper bound is the budget.

        Args:
            budget: Bytes of the device that may be used.
            counts: Features of the whole step, near which the margin is taken.
        """
        predicted = self.predict(counts)
        factor = self.upper(counts) / predicted if predicted > 0 else 1.0
        return budget / max(factor, 1e-9) - self.fixed

    def observe(self, counts: Mapping[str, float], actual_bytes: float, *, part: bool = False) -> None:
        """Learn from a micro-batch that ran.

        Args:
            counts: Its features.
            actual_bytes: Its measured peak.
            part: It belongs to a step that had failed before.
        """
        if self.calibrated is not None and actual_bytes > 0:
            self.calibrated.observe(counts, actual_bytes, part=part)

    def observe_failure(self, counts: Mapping[str, float], limit_bytes: float) -> None:
        """Learn from a micro-batch that did not fit.

        Args:
            counts: Its features.
            limit_bytes: What the device has.
        """
        if self.calibrated is not None:
            self.calibrated.observe_failure(counts, limit_bytes)

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned."""
        return {} if self.calibrated is None else self.calibrated.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        if self.calibrated is not None and state:
            self.calibrated.load_state_dict(state)
