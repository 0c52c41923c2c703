"""The documented experiment: a knob, an estimate for each of its values, a search, a measurement."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vlmpack.batching import estimators
from vlmpack.batching.search import BatchSizeSearch, SearchResult, search_configurations
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vlmpack.batching.search_trials import Probe

logger = logging.getLogger(__name__)

DEFAULT_MAX_CROPS = (2, 4, 6, 8, 10, 12, 14)
"""One value for each row of the documented table."""


class BatchSizeExperiment:
    """Runs a measurement for several values of a knob, each with its largest batch size.

    Args:
        probe_of: Returns the probe for a value of the knob.
        base_batch_size: The upper limit of every search; the size itself without a search.
        search: How to search; None: every value is measured with `base_batch_size`.
        measure: Returns figures for a value of the knob at a batch size.
        knob: "max_crops", "top_k" or "num_blocks": decides the estimate.
        total_blocks: Blocks of the whole model, for "num_blocks".
        log: Where the documented lines go.

    Raises:
        ConfigError: If the knob is unknown, or its total is missing.
    """

    def __init__(
        self,
        probe_of: Callable[[int], Probe],
        *,
        base_batch_size: int,
        search: BatchSizeSearch | None,
        measure: Callable[[int, int], Mapping[str, Any]] | None = None,
        knob: str = "max_crops",
        total_blocks: int | None = None,
        log: logging.Logger = logger,
    ) -> None:
        if knob not in {"max_crops", "top_k", "num_blocks"}:
            raise ConfigError(f'knob must be "max_crops", "top_k" or "num_blocks", got {knob!r}')
        if knob == "num_blocks" and total_blocks is None:
            raise ConfigError('the knob "num_blocks" needs total_blocks, the blocks of the whole model')
        self.probe_of = probe_of
        self.base_batch_size = base_batch_size
        self.search = search
        self.measure = measure
        self.knob = knob
        self.total_blocks = total_blocks
        self._log = log

    def run(self, values: Sequence[int]) -> list[SearchResult]:
        """Search and measure every value, independently.

        Args:
            values: Of the knob.

        Raises:
            ConfigError: If there is none.
        """
        if not values:
            raise ConfigError(f"there is no {self.knob} to test")
        if self.search is None:
            return [self._fixed(value) for value in values]
        by_name = {f"{self.knob}={value}": value for value in values}
        return search_configurations(
            self.search,
            {name: self._estimate(value) for name, value in by_name.items()},
            lambda name: self.probe_of(by_name[name]),
            cap=self.base_batch_size,
            measure=self._measure_named(by_name) if self.measure else None,
            log=self._log,
        )

    def _measure_named(self, by_name: dict[str, int]) -> Callable[[str, int], Mapping[str, Any]]:
        measure = self.measure
        assert measure is not None, "called only where there is something to measure"
        return lambda name, size: measure(by_name[name], size)

    def _fixed(self, value: int) -> SearchResult:
        """Return the result without a search: one try with the fixed size."""
        name = f"{self.knob}={value}"
        self._log.info("Testing %s", name)
        once = BatchSizeSearch("documented", max_attempts=1, log=logging.getLogger(f"{__name__}.fixed"))
        found = once.run(
            self.probe_of(value), estimate=self.base_batch_size, cap=self.base_batch_size, name=name
        )
        metrics: dict[str, Any] = {}
        if self.measure is not None:
            self._log.info("Measuring accuracy for %s...", name)
            metrics = dict(self.measure(value, found.batch_size))
        return SearchResult(
            name=name,
            batch_size=found.batch_size,
            estimate=self.base_batch_size,
            trials=found.trials,
            metrics=metrics,
        )

    def _estimate(self, value: int) -> int:
        if self.knob == "max_crops":
            return self._estimate_batch_size_for_max_crops(value, self.base_batch_size)
        if self.knob == "top_k":
            return self._estimate_batch_size_for_top_k(value, self.base_batch_size)
        total = self.total_blocks
        assert total is not None, "checked when it was made"
        # The documented estimate gives small batches to small models; its correction begins at the limit.
        return estimators.estimate_for_depth(value, total, self.base_batch_size)

    def _find_optimal_batch_size(self, value: int, estimated: int) -> int:
        """Return the largest batch size for a value of the knob, by the name that the document uses.

        Args:
            value: Of the knob.
            estimated: Where to begin.

        Raises:
            ConfigError: If the experiment has no search.
        """
        if self.search is None:
            raise ConfigError("this experiment has a fixed batch size; give it a search")
        return self.search.run(
            self.probe_of(value), estimate=estimated, cap=self.base_batch_size, name=f"{self.knob}={value}"
        ).batch_size

    _estimate_batch_size_for_max_crops = staticmethod(estimators.estimate_batch_size_for_max_crops)
    _estimate_batch_size_for_top_k = staticmethod(estimators.estimate_batch_size_for_top_k)
    _estimate_batch_size_for_num_blocks = staticmethod(estimators.estimate_batch_size_for_num_blocks)
