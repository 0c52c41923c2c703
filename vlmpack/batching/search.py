"""The search for the largest batch size that fits: one configuration, or several after each other."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from vlmpack.batching.estimators import starting_size
from vlmpack.batching.search_rules import DocumentedRule, GuidedRule, Rule, Trial, bounds
from vlmpack.batching.search_trials import NoFeasibleBatchSizeError, shared, try_batch_size
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vlmpack.batching.search_store import SearchStore
    from vlmpack.batching.search_trials import Probe

logger = logging.getLogger(__name__)

SearchMethod: TypeAlias = Literal["guided", "documented"]
"""How the next size is chosen; see `search_rules`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What a search found."""

    name: str
    """The configuration, such as "max_crops=12"."""
    batch_size: int
    """The largest size that works."""
    estimate: int
    """Where the estimate was, before it was limited."""
    trials: tuple[Trial, ...]
    """Everything that was tried, in order."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What was measured afterwards with this size."""

    @property
    def num_ooms(self) -> int:
        """Sizes that did not fit."""
        return sum(not trial.fits for trial in self.trials)

    @property
    def peak_bytes(self) -> int | None:
        """The device's peak at the size that was found, where it was read."""
        return next(t.peak_bytes for t in self.trials if t.fits and t.batch_size == self.batch_size)

    def as_dict(self) -> dict[str, Any]:
        """Return a row of the results' summary, with the documented keys and what a reader wants besides."""
        name, is_pair, value = self.name.partition("=")
        row: dict[str, Any] = {name: int(value) if value.isdigit() else value} if is_pair else {"name": name}
        return row | {
            **self.metrics,
            "batch_size_used": self.batch_size,
            "estimate": self.estimate,
            "attempts": len(self.trials),
            "ooms": self.num_ooms,
            "probe_peak_bytes": self.peak_bytes,
            "trials": [trial._asdict() for trial in self.trials],
        }


class BatchSizeSearch:
    """Finds the largest batch size that fits.

    Args:
        method: "guided" reads each try's measured peak; "documented" is the reference document's search.
        limit_bytes: What the device can hold; needed by "guided".
        static_bytes: For "guided": what the device holds without a batch, from a calibrated model.
        timeout_s: A try that takes longer ends the search; None waits for ever.
        store: Keeps what was tried, so that a search that was killed goes on.
        log: Where the documented lines go.
        on_trial: Called with the configuration and each trial, to show progress.
        **rule: For `DocumentedRule` or `GuidedRule`: max_attempts, growth, min_gain, after_growth_oom.

    Raises:
        ConfigError: If a setting is wrong or missing.
    """

    def __init__(
        self,
        method: SearchMethod = "guided",
        *,
        limit_bytes: float | None = None,
        static_bytes: float | None = None,
        timeout_s: float | None = None,
        store: SearchStore | None = None,
        log: logging.Logger = logger,
        on_trial: Callable[[str, Trial], object] | None = None,
        **rule: Any,
    ) -> None:
        if method not in get_args(SearchMethod):
            raise ConfigError(f"method must be one of {get_args(SearchMethod)}, got {method!r}")
        try:
            self.rule: Rule = (
                DocumentedRule(**rule)
                if method == "documented"
                else GuidedRule(limit_bytes=_needed(limit_bytes), static_bytes=static_bytes, **rule)
            )
        except TypeError as error:
            raise ConfigError(f"the {method} search has no such setting: {error}") from error
        self._timeout_s = timeout_s
        self._store = store
        self._log = log
        self._on_trial = on_trial

    def run(self, probe: Probe, *, estimate: int, cap: int, name: str = "batch") -> SearchResult:
        """Search one configuration.

        Args:
            probe: Runs a step with the worst batch of a size; see `search_trials.try_batch_size`.
            estimate: Where to begin; limited to 1 to `cap`.
            cap: The largest size that may be used.
            name: Of the configuration, for log and results.

        Raises:
            ConfigError: If the cap is not positive.
            NoFeasibleBatchSizeError: If nothing that was tried fits; names every try.
        """
        if isinstance(cap, bool) or not isinstance(cap, int) or cap < 1:
            raise ConfigError(f"{name}: the largest batch size must be an integer of at least 1, got {cap!r}")
        start = starting_size(estimate, cap)
        self._log.info(
            "Finding optimal batch size for %s (estimated: %d, starting with: %d)...", name, estimate, start
        )
        trials = shared(self._store.trials(name, self.rule, start, cap) if self._store else [])
        size = self.rule.next_size(trials, start, cap)
        while size is not None:
            trials.append(self._try(probe, size, name))
            size = self._announce(trials, start, cap)
        working, _ = bounds(trials, cap)
        if not working:
            tried = ", ".join(str(trial.batch_size) for trial in trials)
            raise NoFeasibleBatchSizeError(
                f"{name}: no batch size fits, tried {tried}. Begin with a smaller estimate, allow more "
                "attempts, or make a sample smaller (fewer crops, shorter text, activation checkpointing)"
            )
        self._log.info("Using batch size: %d for %s", working, name)
        return SearchResult(name=name, batch_size=working, estimate=estimate, trials=tuple(trials))

    def _try(self, probe: Probe, size: int, name: str) -> Trial:
        if self._store:
            self._store.begin(name, size)
        try:
            outcome = try_batch_size(probe, size, timeout_s=self._timeout_s)
        except BaseException:  # the process lives: what stopped the try says nothing of its size
            if self._store:
                self._store.cancel(name, size)
            raise
        trial = Trial(size, outcome.fits, outcome.peak_bytes)
        if self._store:
            self._store.end(name, trial)
        if trial.fits:
            self._log.info("✓ Batch size %d works for %s", size, name)
        else:
            self._log.info("✗ Batch size %d caused OOM", size)
        if self._on_trial:
            self._on_trial(name, trial)
        return trial

    def _announce(self, trials: list[Trial], start: int, cap: int) -> int | None:
        size, latest = self.rule.next_size(trials, start, cap), trials[-1]
        if size is not None and latest.fits:
            self._log.info("  Trying larger batch size: %d...", size)
        elif size is not None:
            self._log.info("  → Trying %d...", size)
        elif not latest.fits and getattr(self.rule, "after_growth_oom", None) == "last_good":
            self._log.info("  → Trying %d...", bounds(trials, cap)[0])  # the document says so, and uses it
        return size


def _needed(limit_bytes: float | None) -> float:
    if limit_bytes is None:
        raise ConfigError(
            'the guided search needs limit_bytes, what the device can hold; method="documented" does without'
        )
    return limit_bytes


def search_configurations(
    search: BatchSizeSearch,
    estimates: Mapping[str, int],
    probe_of: Callable[[str], Probe],
    *,
    cap: int,
    measure: Callable[[str, int], Mapping[str, Any]] | None = None,
    measured: str = "accuracy",
    log: logging.Logger = logger,
) -> list[SearchResult]:
    """Search several configurations, each on its own: what one finds says nothing of the next.

    Args:
        search: How.
        estimates: Where each configuration's search begins, by name, such as {"max_crops=12": 19}.
        probe_of: Returns the probe of a configuration.
        cap: The largest size that may be used.
        measure: Called with configuration and size once it is found; its figures join the result.
        measured: What that is called in the log.
        log: Where the documented lines go.

    Raises:
        ConfigError: If there is no configuration.
    """
    if not estimates:
        raise ConfigError("there is no configuration to search")
    results = []
    for name, estimate in estimates.items():
        log.info("Testing %s", name)
        result = search.run(probe_of(name), estimate=estimate, cap=cap, name=name)
        if measure is not None:
            log.info("Measuring %s for %s...", measured, name)
            metrics = dict(measure(name, result.batch_size))
            result = SearchResult(
                name=name,
                batch_size=result.batch_size,
                estimate=estimate,
                trials=result.trials,
                metrics=metrics,
            )
        results.append(result)
    return results
