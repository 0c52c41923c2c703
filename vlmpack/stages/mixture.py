"""Mixture: samples of several sources in seeded turns, by weight; its place is exact.

The n-th draw is a function of (seed, epoch, worker, n) and of which sources have ended, so a place is the
number of draws and where each source stands.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypedDict, get_args

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from vlmpack.errors import ConfigError
from vlmpack.stages.tokenize import VQADataset, tokenizer_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from vlmpack.geometry import ImageRule
    from vlmpack.samples import Refusal, Sample
    from vlmpack.stages.source import SourceState

Stop: TypeAlias = Literal["first_exhausted", "all_exhausted"]
"""When a pass ends:

* first_exhausted: when a source is drawn that has no row left; rows of others are left unread;
* all_exhausted: when all have ended. One that ends drops out, the others keep their weights, so that each
  row of each source comes exactly once."""

_DRAWS_AT_ONCE: Final = 1024


class MixtureState(TypedDict):
    """Where a `Mixture` stands; plain values, fit for JSON."""

    epoch: int
    num_draws: int
    ended: list[str]
    sources: dict[str, SourceState]


class Mixture(IterableDataset["Sample | Refusal"]):
    """Samples of several `VQADataset`s, for a `ConstantLengthDataset`.

    Keys begin with the source's name, "charts/17", and `PackingReport.by_source` counts each apart. Each
    source keeps settings of its own: its image folder, chat template, ratings, shuffling.

    Args:
        sources: By name, without "/" in it. They share a tokenizer and a tiling.
        weights: How often each is drawn, in any unit; as often as each other where None.
        seed: Decides the draws.
        stop: When a pass ends.

    Raises:
        ConfigError: If a name, a weight or a source does not fit.
    """

    def __init__(
        self,
        sources: Mapping[str, VQADataset],
        weights: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        stop: Stop = "all_exhausted",
    ) -> None:
        _check(sources, weights, stop)
        self._sources = dict(sources)
        self.names: Sequence[str] = tuple(self._sources)
        """Of the sources, in the order given."""
        self._weights = {name: 1.0 if weights is None else float(weights[name]) for name in self.names}
        self._seed = seed
        self._stop = stop
        first = self._sources[self.names[0]]
        self.tokenizer = first.tokenizer
        self.tiling = first.tiling
        self.family = first.family
        self.image_tokens = first.image_tokens
        self.max_pixels = max(source.max_pixels for source in self._sources.values())
        self._epoch = 0
        self._num_draws = 0
        self._ended: list[str] = []
        self._saved: MixtureState | None = None

    @property
    def num_rows(self) -> None:
        """None: rows come in turns, not by number."""
        return

    @property
    def num_texts_with_image_token(self) -> int:
        """Texts out of which an image token was removed, in this process."""
        return sum(source.num_texts_with_image_token for source in self._sources.values())

    def __iter__(self) -> Iterator[Sample | Refusal]:
        return (item for item in self.samples() if item is not None)

    def samples(self, wanted: Iterable[bool] = ()) -> Iterator[Sample | Refusal | None]:
        """Yield what becomes of each row, None for one that is not wanted, which costs only its reading.

        Args:
            wanted: Whether the first rows are wanted, in order; all behind them are.
        """
        saved, self._saved = self._saved, None
        self._num_draws, self._ended = (saved["num_draws"], list(saved["ended"])) if saved else (0, [])
        for name, source in self._sources.items():
            source.set_epoch(self._epoch)
            # A place that was not taken up, as of a source that had ended, must not reach into this pass.
            source.load_state_dict(None if saved is None else saved["sources"][name])
        is_wanted = iter(wanted)  # shared: a source asks once it has read a row
        running = {
            name: source.samples(iter(lambda: next(is_wanted, True), None))
            for name, source in self._sources.items()
        }
        worker = get_worker_info()
        draws = self._draws(worker.id if worker else 0)
        while len(self._ended) < len(self.names):
            name = self._pick(next(draws))
            self._num_draws += 1
            try:
                item = next(running[name])
            except StopIteration:
                self._ended.append(name)
                if self._stop == "first_exhausted":
                    self._ended = list(self.names)
                continue
            yield None if item is None else replace(item, key=f"{name}/{item.key}")

    def retile(self, sample: Sample, tiling: ImageRule) -> Sample:
        """Return the sample with its images cut by another rule."""
        return self._sources[self.names[0]].retile(sample, tiling)

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data the next one is; draws and shuffled sources differ in each.

        Args:
            epoch: From 0.
        """
        self._epoch, self._num_draws, self._ended = epoch, 0, []
        for source in self._sources.values():
            source.set_epoch(epoch)

    def state_dict(self) -> MixtureState:
        """Return where the latest pass stands, behind the sample that came last.

        Raises:
            ConfigError: If the place in a source could not be found again.
        """
        if self._saved is not None:
            return self._saved
        places = {}
        for name, source in self._sources.items():
            try:
                places[name] = source.state_dict()
            except ConfigError as error:
                raise ConfigError(f"source {name!r}: {error}") from error
        return MixtureState(
            epoch=self._epoch, num_draws=self._num_draws, ended=list(self._ended), sources=places
        )

    def load_state_dict(self, state: MixtureState) -> None:
        """Begin the next pass behind the sample that came last when the state was saved.

        Args:
            state: From `state_dict` of a mixture of the same sources.
        """
        self._saved, self._epoch = state, state["epoch"]

    def digests(self) -> dict[str, str]:
        """Return what tells the data, the tokenizer and the reading of rows from others."""
        parts = {name: source.digests() for name, source in self._sources.items()}
        together: dict[str, str] = {}
        for what in next(iter(parts.values())):
            together[what] = " ".join(f"{name}={digests[what]}" for name, digests in parts.items())
        return {
            "mixture": repr((self._weights, self._seed, self._stop)),
            **{what: f"{zlib.crc32(text.encode()):08x}" for what, text in together.items()},
        }

    def _draws(self, worker: int) -> Iterator[float]:
        """Yield the draws from the present one on, each in [0, 1)."""
        while True:
            block, at = divmod(self._num_draws, _DRAWS_AT_ONCE)
            rng = np.random.default_rng([self._seed, self._epoch, worker, block])
            yield from rng.random(_DRAWS_AT_ONCE)[at:].tolist()

    def _pick(self, draw: float) -> str:
        left = [name for name in self.names if name not in self._ended]
        sums = list(accumulate(self._weights[name] for name in left))
        return left[min(bisect_right(sums, draw * sums[-1]), len(left) - 1)]


def _check(sources: Mapping[str, VQADataset], weights: Mapping[str, float] | None, stop: str) -> None:
    if not sources:
        raise ConfigError("a mixture needs at least one source")
    for name, source in sources.items():
        if not name or "/" in name:
            raise ConfigError(f"a source's name must not be empty nor hold '/', got {name!r}")
        if not isinstance(source, VQADataset):
            raise ConfigError(f"source {name!r} must be a VQADataset, got {type(source).__name__}")
    if stop not in get_args(Stop):
        raise ConfigError(f"stop must be one of {get_args(Stop)}, got {stop!r}")
    if weights is not None and weights.keys() != sources.keys():
        raise ConfigError(f"weights are for {sorted(weights)}, sources are {sorted(sources)}")
    if not all(0 < weight < float("inf") for weight in (weights or {}).values()):
        raise ConfigError(f"weights must be positive numbers, got {dict(weights or {})}")
    _check_alike(sources)


def _check_alike(sources: Mapping[str, VQADataset]) -> None:
    first, *others = sources.values()
    for name, source in zip(list(sources)[1:], others, strict=True):
        if source.tiling != first.tiling or source.family != first.family:
            raise ConfigError(f"source {name!r} cuts images by another tiling than {next(iter(sources))!r}")
        same = source.tokenizer is first.tokenizer
        if not same and tokenizer_digest(source.tokenizer) != tokenizer_digest(first.tokenizer):
            raise ConfigError(f"source {name!r} has another tokenizer than {next(iter(sources))!r}")
