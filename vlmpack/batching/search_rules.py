"""Which batch size to try next: pure functions of what was tried, so that a search can stop and go on.

documented    grow by half until it fails, halve until it works, then bisect; at most 5 tries, and none that
              would gain less than a tenth. Throws the measured peak away.
guided        a secant through the measured peaks of what worked, kept between what works and what failed:

    bytes |                        x  next try: where the line through the last two peaks meets the limit
    limit |- - - - - - - - - - - / - - - -
          |                  o '          a size that failed bounds it from above; where the line runs past
          |           o                   that, memory gave out below the limit, and the gap is cut instead
          +---------------------------> batch size

In a simulator with hidden memory functions the guided rule finds at least 98 % of the largest size in 99 % of
the worlds with about four tries (`python -m benchmarks.bench_search`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

AfterGrowthOOM: TypeAlias = Literal["bisect", "last_good"]
"""What the documented rule does when growing failed: its algorithm bisects, one of its logs stops."""

TOLERANCE: Final = 0.02
"""The guided search stops once at least 98 % of any larger size that may work is known to work."""
AIM: Final = 0.999
"""It aims at this share of the limit, since a secant errs to both sides."""
HIDDEN: Final = 0.010
"""Share of the limit that a reading may hide: allocators hand memory out in blocks."""
FIRST_CUT: Final = 0.45
"""What is tried after the first size failed, as a share of it; half of it after each further failure."""
TRUSTED_CUT: Final = 0.95
"""The same where a calibrated model made the estimate."""
BESIDE_FAILURE: Final = 0.7
"""Where between a size that works and one that failed to try next."""
MAX_GROWTH: Final = 4
"""A single reading is not trusted beyond this factor."""


class Trial(NamedTuple):
    """One batch size that was tried."""

    batch_size: int
    fits: bool
    peak_bytes: int | None
    """What the device held at its peak; None where it failed or nobody could read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentedRule:
    """The reference document's search.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    max_attempts: int = 5
    """Sizes tried, at most."""
    growth: float = 1.5
    """A size that works is multiplied by this."""
    min_gain: float = 0.10
    """A try that would gain less than this share is not made; the document's three scenarios need 0.087 to
    0.142."""
    after_growth_oom: AfterGrowthOOM = "bisect"
    """What to do when growing failed."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.growth <= 1 or self.min_gain < 0:
            raise ConfigError(
                f"max_attempts must be at least 1, growth above 1 and min_gain at least 0, got {self}"
            )

    def next_size(self, trials: Sequence[Trial], start: int, cap: int) -> int | None:
        """Return the size to try next, or None when the search is over.

        Args:
            trials: What was tried, in order.
            start: The first size.
            cap: The largest size that may be used.
        """
        if not trials:
            return start
        working, failing = bounds(trials, cap)
        if len(trials) >= self.max_attempts:
            return None
        if not working:
            return failing // 2 or None
        if failing > cap:
            candidate = min(max(int(working * self.growth), working + 1), cap)
        elif self.after_growth_oom == "last_good" and trials[0].fits:
            return None
        else:
            candidate = (working + failing) // 2
        return candidate if candidate - working >= self.min_gain * working and candidate > working else None


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidedRule:
    """A safeguarded secant on the measured peaks.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    limit_bytes: float
    """What the device can hold."""
    static_bytes: float | None = None
    """What it holds without a batch, from a calibrated model; None where nobody knows."""
    max_attempts: int = 8
    """Sizes tried, at most."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.limit_bytes <= 0:
            raise ConfigError(f"max_attempts must be at least 1 and limit_bytes positive, got {self}")

    def next_size(self, trials: Sequence[Trial], start: int, cap: int) -> int | None:
        """Return the size to try next, or None when the search is over.

        Args:
            trials: What was tried, in order.
            start: The first size.
            cap: The largest size that may be used.
        """
        if not trials:
            return start
        working, failing = bounds(trials, cap)
        if len(trials) >= self.max_attempts or failing - 1 - working <= TOLERANCE * working:
            return None
        if not working:
            cut = TRUSTED_CUT if self.static_bytes is not None else FIRST_CUT
            return max(1, min(failing - 1, int(failing * (cut if len(trials) == 1 else cut / 2))))
        candidate = self._beyond(self._points(trials), working, failing, failing <= cap)
        return None if candidate is None else min(max(candidate, working + 1), failing - 1)

    def _points(self, trials: Sequence[Trial]) -> list[tuple[int, float]]:
        """Return (size, peak) of what worked, ascending, with the empty batch where it is known."""
        points = {
            trial.batch_size: float(trial.peak_bytes) for trial in trials if trial.fits and trial.peak_bytes
        }
        lowest = min(points.values(), default=0.0)
        if len(points) == 1 and self.static_bytes is not None and self.static_bytes < lowest:
            points[0] = self.static_bytes
        return sorted(points.items())

    def _beyond(
        self, points: list[tuple[int, float]], working: int, failing: int, has_failed: bool
    ) -> int | None:
        """Return a size above the largest that works, or None where a larger one is not worth a try."""
        middle = int(working + BESIDE_FAILURE * (failing - working))
        if not points or points[-1][0] != working:  # no peak was read: grow, then cut the gap
            return middle if has_failed else 2 * working
        peak = points[-1][1]
        if len(points) == 1:
            in_proportion = int(min(working * self.limit_bytes * AIM / peak, MAX_GROWTH * working))
            if has_failed:
                in_proportion = min(in_proportion, int(working + 0.75 * (failing - working)))
            return max(in_proportion, working + max(1, working // 32))
        slope = _slope(points)
        if slope <= 0:
            return middle if has_failed else 2 * working
        end = working + (self.limit_bytes - peak) / slope
        if end <= working * (1 + TOLERANCE / 2) or end < working + 1:
            return self._past_the_line(working, failing, slope, has_failed)
        if has_failed and end >= failing:
            return middle
        return int(working + (self.limit_bytes * AIM - peak) / slope)

    def _past_the_line(self, working: int, failing: int, slope: float, has_failed: bool) -> int | None:
        """Return a size a little past where the line says that it ends, if the reading may hide that much."""
        slack = HIDDEN * self.limit_bytes / slope
        if slack <= TOLERANCE * working or slack < 1:
            return None
        candidate = working + max(1, min(int(slack), int(2 * TOLERANCE * working) + 1))
        return min(candidate, (working + failing) // 2) if has_failed else candidate


Rule: TypeAlias = DocumentedRule | GuidedRule


def bounds(trials: Sequence[Trial], cap: int) -> tuple[int, int]:
    """Return the largest size that works, 0 if none does, and the smallest that failed, cap + 1 if none did.

    Args:
        trials: What was tried.
        cap: The largest size that may be used.
    """
    working = max((trial.batch_size for trial in trials if trial.fits), default=0)
    failing = min((trial.batch_size for trial in trials if not trial.fits), default=cap + 1)
    return working, max(failing, working + 1)


def _slope(points: list[tuple[int, float]]) -> float:
    """Return the bytes a sample from the last two points on, bent as the last three are, within limits."""
    (before, low), (last, high) = points[-2:]
    slope = (high - low) / (last - before)
    if len(points) < 3:
        return slope
    first, lowest = points[-3]
    earlier = (low - lowest) / (before - first)
    bend = (slope - earlier) / ((last - first) / 2)
    return max(0.7 * slope, min(1.5 * slope, slope + bend * (last - before) / 2))
