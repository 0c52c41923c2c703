"""Look-ahead: samples that wait for a pack -> the samples of each pack, and the way back to any of them.

    rows      0 1 2 3 4 5 6 7 8 | 9 10 11 ...
    waiting       2     5   7 8 |               what waits at the bar is carried over it
    source    ^-- a place at or before row 2    from which these rows are read again

Packing goes in *stretches*. At the end of each the packer is replaced by a new one, which is given what
waits, oldest first: from there on packs follow from these samples and the rows behind them alone. So a
place in the stream is the beginning of a stretch and a number of packs; the samples are read again, never
stored. What a stretch forgets costs no fill: 54,025 packs for 54,025, 12,142 for 12,143 and so on over the
seeded workloads of `vlmpack.packing.workloads`.

The oldest sample is in every next pack, which bounds the way back: 2 to 5 look-aheads were measured.
"""

from __future__ import annotations

import logging
import zlib
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

from vlmpack.errors import ConfigError, SourceError
from vlmpack.packing.stretch import Stretch
from vlmpack.samples import Refusal, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from vlmpack.geometry import ImageRule
    from vlmpack.packing.stream import StreamPacker
    from vlmpack.packing.tally import Tally
    from vlmpack.stages.admit import Admission

logger = logging.getLogger(__name__)

MIN_STRETCH: Final[int] = 256
"""Rows of a stretch where the look-ahead is shorter: a new packer costs 0.1 ms."""

MAX_CARRIED: Final[int] = 4096
CARRIED_OF_MORE: Final[int] = 2048
"""Samples that are carried at most, and how many where the look-ahead is larger than that: they take 3 to 4
bits each in a saved place, which so stays under 4 kB. Packs lose no fill: a window of 1,024 fills as well."""

_ROWS_PER_SNAPSHOT: Final = 64


class SampleSource(Protocol):
    """What `ConstantLengthDataset` packs; `VQADataset` is one.

    To resume it needs `state_dict` and `load_state_dict` too, and `set_epoch` and `digests` where passes
    or data differ.
    """

    tokenizer: PreTrainedTokenizerBase
    tiling: ImageRule
    max_pixels: int

    def __iter__(self) -> Iterator[Sample | Refusal]:
        """Yield a sample or a refusal for each row of this worker's part."""
        ...

    def retile(self, sample: Sample, tiling: ImageRule) -> Sample:
        """Return the sample with its images cut by another rule."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The samples of one pack, and where that is."""

    samples: list[Sample] = field(repr=False)
    """In the order of their rows."""
    rows: list[int]
    """The row of each."""
    stretch: Stretch = field(repr=False)
    """The stretch that it belongs to."""
    number: int
    """Packs of the stretch up to it, from 1."""
    check: int
    """Checksum over the keys and tokens of these packs: other data is noticed when they are planned again."""


class LookAhead:
    """Reads rows, pass after pass, and chooses the samples of each pack.

    Args:
        source: Gives what becomes of each row.
        admit: The limits that each sample must keep.
        new_packer: Makes the packer of a stretch from its number.
        lookahead: Samples that may wait.
        infinite: Begin again at the end of the data, without end.
        epoch: The pass to begin with.
        tally: Counts what becomes of rows.
        on_epoch: Called with the number of each further pass.
    """

    def __init__(
        self,
        source: SampleSource,
        admit: Admission,
        new_packer: Callable[[int], StreamPacker],
        *,
        lookahead: int,
        infinite: bool,
        epoch: int,
        tally: Tally,
        on_epoch: Callable[[int], None],
    ) -> None:
        self._source = source
        self._admit = admit
        self._new_packer = new_packer
        self._max_carried = lookahead if lookahead <= MAX_CARRIED else CARRIED_OF_MORE
        self._stretch_rows = max(lookahead, MIN_STRETCH)
        self._infinite = infinite
        self._epoch = epoch
        self._tally = tally
        self._report = tally.read
        self._on_epoch = on_epoch
        self.num_admitted: int | None = None
        """Samples in the latest whole reading of the data, if `infinite`."""
        self._num_arrived = 0
        self._row = 0
        self._counted_from = 0
        self._waiting: dict[int, tuple[int, Sample]] = {}
        """By their number in the packer: row and sample, the oldest first."""
        self._places: deque[tuple[int, int, Any]] = deque()
        """Rows before it, epoch, and state of the source, ascending; the first is before all that wait."""
        self._num_texts = _num_texts(source)
        self._num_packs = 0
        self._check = 0

    def packs(self, saved: Stretch | None = None, num_done: int = 0, check: int = 0) -> Iterator[Chosen]:
        """Yield the packs of the rest of the stream.

        Args:
            saved: The stretch to go on in; None begins at the beginning.
            num_done: Packs of it that were had.
            check: The checksum of the last of them.

        Raises:
            SourceError: If the pass is without end and a later reading of the data gives no sample, or if
                the rows are not those that were read before.
        """
        carried: list[tuple[int, Sample]] = []
        if saved is None:
            _call(self._source, "set_epoch", self._epoch)
            saved = self._new_stretch(0)
            items = self._items(())
        else:
            items, carried = self._reread(saved)
        self._begin(saved, carried)
        packs = self._plan(items)
        self._check_had(islice(packs, num_done), saved, num_done, check)
        yield from packs

    def _check_had(self, had: Iterator[Chosen], saved: Stretch, num_done: int, check: int) -> None:
        """Plan the packs that were had, and compare them.

        Raises:
            SourceError: If they are not those that were had.
        """
        latest = None
        for latest in had:
            if latest.stretch is not saved:
                break
        if num_done and (latest is None or (latest.number, latest.check) != (num_done, check)):
            told = "the packs" if latest is None else f"packs up to that of samples {_keys(latest.samples)}"
            raise SourceError(_changed(told))

    def _plan(self, items: Iterator[Sample | Refusal | None]) -> Iterator[Chosen]:
        for item in items:
            self._row += 1
            sample = self._admitted(item)
            if sample is not None:
                self._waiting[self._packer.num_arrived] = (self._row - 1, sample)
                self._num_arrived += 1
                yield from map(self._chosen, self._packer.push(self._admit.packed_cost(sample)))
            if self._row - self._stretch.row >= self._stretch_rows:
                yield from map(self._chosen, self._packer.drain(self._max_carried))
                self._begin(self._new_stretch(self._stretch.number + 1), list(self._waiting.values()))
            elif self._row % _ROWS_PER_SNAPSHOT == 0:
                self._remember_place()
        yield from map(self._chosen, self._packer.flush())
        assert not self._waiting, f"{len(self._waiting)} samples were left behind by the packer"
        if self._infinite and self._num_arrived:  # else this worker has no part of the data; others may
            raise SourceError(
                f"the data set gave {self._num_arrived} samples, and none of {self._num_rows_of_pass} rows "
                "when it was read once more. An iterator can be read only once: pass a data set that begins "
                "again, or infinite=False."
            )

    def _items(
        self, wanted: Iterable[bool], saved: Stretch | None = None
    ) -> Iterator[Sample | Refusal | None]:
        """Yield what becomes of each row, pass after pass; None for a row that is not wanted."""
        is_wanted = iter(wanted)
        while True:
            _call(self._source, "set_epoch", self._epoch)
            if saved is not None:
                _call(self._source, "load_state_dict", saved.source)
            self._remember_place()
            num_before, row_before = self._num_arrived, self._row
            samples = getattr(self._source, "samples", None)
            yield from iter(self._source) if samples is None else samples(is_wanted)
            self._num_rows_of_pass = self._row - row_before
            if not self._infinite:
                return
            if saved is None and row_before >= self._counted_from:  # whole, all of it for the first time
                self.num_admitted = self._num_arrived - num_before
                if not self.num_admitted:
                    return
            saved = None
            self._epoch += 1
            self._on_epoch(self._epoch)

    def _reread(self, saved: Stretch) -> tuple[Iterator[Sample | Refusal | None], list[tuple[int, Sample]]]:
        """Return the rows behind the beginning of a stretch, and the samples that it carries.

        Raises:
            ConfigError: If the source keeps no place.
            SourceError: If the rows are not those that were read before.
        """
        if saved.source is None:
            raise ConfigError("the saved position holds no place in the data")
        self._epoch, self._row, self._counted_from = saved.epoch, saved.first_row, saved.row
        rows = frozenset(saved.carried)
        items = self._items([row in rows for row in range(saved.first_row, saved.row)], saved)
        carried = []
        for row in range(saved.first_row, saved.row):
            item = next(items, None)
            self._row += 1
            if row in rows:
                sample = self._admit(item) if isinstance(item, Sample) else item
                if not isinstance(sample, Sample):
                    raise SourceError(_changed(f"row {row}, counted from the beginning of the run"))
                carried.append((row, sample))
            if self._row % _ROWS_PER_SNAPSHOT == 0:
                self._remember_place()
        self._num_texts = _num_texts(self._source)
        return items, carried

    def _admitted(self, item: Sample | Refusal | None) -> Sample | None:
        """Return the sample as it may wait for a pack; None if its row is refused, which is counted."""
        assert item is not None, "a row behind the beginning of a stretch is wanted"
        report = self._report
        num_texts = _num_texts(self._source)
        report.num_texts_with_image_token += num_texts - self._num_texts
        self._num_texts = num_texts
        sample = item if isinstance(item, Refusal) else self._admit(item)
        refusal = sample if isinstance(sample, Refusal) else None
        self._tally.count_row(self._row - 1, item, refusal)
        if isinstance(sample, Refusal):
            logger.info("refused %s (%s): %s", sample.key, sample.reason, sample.message)
            return None
        if isinstance(item, Sample) and sample is not item:
            report.num_shrunk += 1
            report.num_tokens_removed += item.cost.num_tokens - sample.cost.num_tokens
        return sample

    def _chosen(self, arrivals: Sequence[int]) -> Chosen:
        members = [self._waiting.pop(arrival) for arrival in arrivals]
        rows, samples = [row for row, _ in members], [sample for _, sample in members]
        self._report.add_delays(self._row - 1 - row for row in rows)
        self._num_packs += 1
        self._check = _checksum(samples, self._check)
        return Chosen(
            samples=samples, rows=rows, stretch=self._stretch, number=self._num_packs, check=self._check
        )

    def _new_stretch(self, number: int) -> Stretch:
        """Return the stretch that begins here."""
        self._remember_place()
        rows = tuple(row for row, _ in self._waiting.values())
        oldest = rows[0] if rows else self._row
        while len(self._places) > 1 and self._places[1][0] <= oldest:
            self._places.popleft()
        first_row, epoch, source = self._places[0]
        return Stretch(
            number=number,
            epoch=epoch,
            source=source,
            first_row=first_row,
            row=self._row,
            carried=rows,
            counts=self._report.counts(),
        )

    def _begin(self, stretch: Stretch, carried: list[tuple[int, Sample]]) -> None:
        """Give a new packer what waits."""
        self._stretch = stretch
        self._packer = self._new_packer(stretch.number)
        self._waiting = dict(enumerate(carried))
        self._num_packs = 0
        self._check = _checksum([sample for _, sample in carried], 0)
        for _, sample in carried:
            made = self._packer.push(self._admit.packed_cost(sample))
            assert not made, "what waited made no pack due, nor does it in a new packer"

    def _remember_place(self) -> None:
        if self._places and self._places[-1][:2] == (self._row, self._epoch):
            return
        try:
            state = _call(self._source, "state_dict")
        except ConfigError:  # it cannot say where it stands; whoever asks for a position is told why
            state = None
        self._places.append((self._row, self._epoch, state))


def _checksum(samples: Sequence[Sample], check: int) -> int:
    for sample in samples:
        check = zlib.crc32(sample.input_ids.tobytes(), zlib.crc32(sample.key.encode(errors="replace"), check))
    return check


def _call(source: object, method: str, *arguments: object) -> Any:
    """Call a method that not every source of samples has."""
    bound = getattr(source, method, None)
    return None if bound is None else bound(*arguments)


def _num_texts(source: object) -> int:
    return int(getattr(source, "num_texts_with_image_token", 0))


def _keys(samples: Sequence[Sample]) -> str:
    return ", ".join(sample.key for sample in samples[:3])


def _changed(what: str) -> str:
    return (
        f"{what}: not what was read before the position was saved. The data set changed, or is not the same "
        "each time that it is read, so the position means nothing; begin anew"
    )
