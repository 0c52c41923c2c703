"""Guard a run against full memory: ask before a batch, split where it would not fit, learn where it did not.

The cap is what the items of one micro-batch may cost together. It starts at what the formula says fits,
falls to 0.7 of whatever failed, and grows back by 5 % after 50 clean steps where the formula allows it.
Without a formula it stays 5 % below the smallest cost that ever failed, so failures die out.
"""

from __future__ import annotations

import gc
import logging
import math
import sys
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import torch

from vlmpack.batching.costs import Formula, StepCosts
from vlmpack.batching.split import split_by_cost
from vlmpack.errors import ConfigError
from vlmpack.memory.device import CudaMemory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vlmpack.batching.records import SampleShape
    from vlmpack.memory.device import MemoryBackend

logger = logging.getLogger(__name__)

SingleSample: TypeAlias = Literal["raise", "checkpoint_then_retry", "isolate_and_report"]
"""What to do with a sample that does not fit alone."""

SHRINK: Final = 0.7
"""Next cap / cost that failed."""
GROWTH: Final = 1.05
"""Next cap / cap, after clean steps."""
GROWTH_AFTER: Final = 50
"""Clean steps before the cap grows."""
BELOW_FAILURE: Final = 0.95
"""How near the cap may come to a cost that failed, where no calibrated formula says what fits."""


class OOMGuardian:
    """Prevents out-of-memory errors where it can, and says how to go on after one.

    Args:
        memory_predictor: What batches cost: a `MemoryPredictor`, `CalibratedCost` or `LinearCost`. None:
            items are compared by tokens and images, and only failures tell the limit.
        memory_margin_percent: Share of the device that is left free, a *fraction*: 0.10 is a tenth.
        backend: The device; None: the GPU where there is one. Without a GPU nothing is measured.
        single_sample: For a sample that does not fit alone: "raise" with its key, "checkpoint_then_retry"
            (gradient checkpointing, once), or "isolate_and_report" (leave it out of the step, counted).

    Raises:
        ConfigError: If the margin is no fraction or the policy unknown.
    """

    def __init__(
        self,
        memory_predictor: Formula = None,
        *,
        memory_margin_percent: float = 0.10,
        backend: MemoryBackend | None = None,
        single_sample: SingleSample = "raise",
    ) -> None:
        if single_sample not in get_args(SingleSample):
            raise ConfigError(f"single_sample must be one of {get_args(SingleSample)}, got {single_sample!r}")
        self.costs = StepCosts(memory_predictor)
        self.memory_margin_percent = memory_margin_percent
        self.single_sample: SingleSample = single_sample
        self._backend = backend
        self._peak = 0
        self.cap = math.inf
        """What the items of a micro-batch may cost together."""
        self.smallest_failure = math.inf
        """The least cost that failed."""
        self.num_ooms = 0
        """Errors so far, on this rank."""
        self.clean_steps = 0
        """Steps since the last error or growth."""
        self._has_warned = False

    def adopt(self, memory_predictor: Formula) -> None:
        """Use a formula, if this guardian has none yet.

        Args:
            memory_predictor: What batches cost.
        """
        if self.costs.formula is None:
            self.costs = StepCosts(memory_predictor)

    @property
    def memory_margin_percent(self) -> float:
        """Share of the device that is left free; raise it, not lower it, when memory runs out."""
        return self._margin

    @memory_margin_percent.setter
    def memory_margin_percent(self, margin: float) -> None:
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1:
            hint = f"; {margin} per cent is {margin / 100}" if _is_percentage(margin) else ""
            raise ConfigError(
                f"memory_margin_percent is a fraction, 0 <= margin < 1 (its name is documented), got "
                f"{margin!r}{hint}"
            )
        self._margin = float(margin)

    @property
    def backend(self) -> MemoryBackend | None:
        """The device, or None where nothing can be measured."""
        if self._backend is None and torch.cuda.is_available():
            self._backend = CudaMemory()
        return self._backend

    @property
    def limit_bytes(self) -> float:
        """What may be used of the device; infinite where nobody knows."""
        total = self.backend.read().total if self.backend is not None else 0
        return total * (1 - self._margin) if total else math.inf

    def preflight(self, shapes: Iterable[SampleShape]) -> bool:
        """Return whether a batch of these items is expected to fit; true where nothing is known.

        Args:
            shapes: Its items.
        """
        if not self.costs.is_in_bytes:
            return True
        return self.costs.upper(self.costs.counts(shapes)) <= self.limit_bytes

    def safe_batch_size(self, shape: SampleShape, max_batch_size: int = 1 << 20) -> int:
        """Return the largest batch of such samples that is expected to fit; 0 where not even one does.

        Args:
            shape: One of them.
            max_batch_size: Not more than these.

        Raises:
            ConfigError: If there is no formula or no device to ask.
        """
        if not self.costs.is_in_bytes or math.isinf(self.limit_bytes):
            raise ConfigError("a safe batch size needs a memory_predictor and a device (or backend=)")
        one = self.costs.counts([shape])
        low, high = 0, max_batch_size
        while low < high:
            middle = (low + high + 1) // 2
            if self.costs.upper({name: count * middle for name, count in one.items()}) <= self.limit_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def reduce_batch_size(self, batch_size: int) -> int:
        """Return 0.7 of a batch size that failed, smaller by at least one.

        Args:
            batch_size: At least 2.

        Raises:
            ConfigError: If it cannot be reduced.
        """
        if batch_size < 2:
            raise ConfigError(
                f"a batch of {batch_size} cannot be made smaller: split the sample, or checkpoint"
            )
        return max(1, min(batch_size - 1, int(batch_size * SHRINK)))

    def emergency_cleanup(self, *, thorough: bool = True) -> None:
        """Collect garbage and give cached blocks back; call it *outside* the `except` block.

        While an exception is handled its traceback keeps the failed step's activations, and nothing is freed.

        Args:
            thorough: Look at all objects, which takes 0.3 s in a process that has loaded transformers; False:
                at young ones only, where a failed step's cycles are.
        """
        if sys.exc_info()[0] is not None:
            logger.warning("cleanup inside an except block: the failed step's memory is still in use")
        gc.collect(2 if thorough else 1)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()

    # ---- the cap ----------------------------------------------------------------------------------
    def plan(self, shapes: Sequence[SampleShape]) -> list[range]:
        """Return how to split these items: contiguous parts within the cap.

        Args:
            shapes: At least one.
        """
        cap = min(self.cap, self._room(shapes))
        return split_by_cost(self.costs.items(shapes), cap)

    def _room(self, shapes: Sequence[SampleShape]) -> float:
        limit = self.limit_bytes
        if not self.costs.is_in_bytes or math.isinf(limit):
            return math.inf
        room = self.costs.room(limit, self.costs.counts(shapes))
        if room <= 0 and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the formula does not even leave room for one item: %.2f GB are fixed, of %.2f GB. "
                "Items run one by one; correct the formula",
                self.costs.fixed / 1e9,
                limit / 1e9,
            )
        return room

    def measure(self) -> None:
        """Start measuring a micro-batch."""
        if self.backend is not None:
            self.backend.reset_peak()

    def succeeded(self, shapes: Sequence[SampleShape], *, after_failure: bool) -> None:
        """Learn from a micro-batch that ran.

        Args:
            shapes: Its items.
            after_failure: Its step had failed before, so it lies far from the limit.
        """
        if self.backend is None:
            return
        peak = self.backend.read().peak
        self._peak = max(self._peak, peak)
        if self.costs.calibrated is not None:
            self.costs.observe(self.costs.counts(shapes), peak, part=after_failure)

    def take_peak(self) -> int:
        """Return the most bytes of all micro-batches since the last call; 0 where nothing is measured."""
        peak, self._peak = self._peak, 0
        return peak

    def failed(self, shapes: Sequence[SampleShape], *, lower_cap: bool = True) -> None:
        """Learn from a micro-batch that did not fit, and lower the cap.

        Args:
            shapes: Its items.
            lower_cap: False where one sample failed for the first time, which says more about the state of
                the device than about sizes: a cap of one sample would last for thousands of steps.
        """
        self.num_ooms += 1
        self.clean_steps = 0
        if not lower_cap:
            return
        cost = sum(self.costs.items(shapes))
        self.smallest_failure = min(self.smallest_failure, cost)
        self.cap = min(self.cap, cost) * SHRINK
        if self.backend is not None and self.backend.read().total:
            self.costs.observe_failure(self.costs.counts(shapes), self.backend.read().total)

    def step_was_clean(self, shapes: Sequence[SampleShape]) -> None:
        """Count a step without an error; the cap grows where it may.

        Args:
            shapes: The step's items.
        """
        self.clean_steps += 1
        if math.isinf(self.cap) or self.clean_steps < GROWTH_AFTER:
            return
        wanted = self.cap * GROWTH
        allowed = self._room(shapes) if shapes else 0.0
        if self.costs.calibrated is None or math.isinf(allowed):
            allowed = min(allowed, self.smallest_failure * BELOW_FAILURE)
        if wanted <= allowed:
            self.cap = wanted
            self.clean_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned: plain values, fit for JSON."""
        return {
            "cap": None if math.isinf(self.cap) else self.cap,
            "smallest_failure": None if math.isinf(self.smallest_failure) else self.smallest_failure,
            "num_ooms": self.num_ooms,
            "clean_steps": self.clean_steps,
            "costs": self.costs.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.cap = math.inf if state["cap"] is None else float(state["cap"])
        smallest = state["smallest_failure"]
        self.smallest_failure = math.inf if smallest is None else float(smallest)
        self.num_ooms = int(state["num_ooms"])
        self.clean_steps = int(state["clean_steps"])
        self.costs.load_state_dict(state["costs"])


def _is_percentage(margin: object) -> bool:
    return isinstance(margin, int | float) and not isinstance(margin, bool) and 1 <= margin < 100
