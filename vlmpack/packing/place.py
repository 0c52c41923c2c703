"""Place: where a stream of packs stands, as plain values, and why a saved one is refused."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from vlmpack.errors import ConfigError
from vlmpack.packing.report import PackingReport
from vlmpack.packing.stretch import stretch_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmpack.packing.assemble import Assembler
    from vlmpack.packing.lookahead import Chosen
    from vlmpack.packing.stretch import StretchState
    from vlmpack.stages.admit import Admission


class StreamPlace(TypedDict):
    """Where a `ConstantLengthDataset` stands, behind the pack that it gave last; fit for JSON.

    Under 4 kB: counters, checksums, the source's own state, and which rows waited for a pack.
    """

    settings: dict[str, Any]
    """What decides the packs: a place means nothing under others."""
    part: list[int] | None
    """[worker, workers]; None before the first pack, where it suits any number of workers."""
    epoch: int
    """The pass over the data."""
    stretch: StretchState | None
    """The stretch of packing that the last pack belongs to; None before the first pack."""
    num_done: int
    """Packs of this stretch that were given."""
    check: int
    """Checksum over their keys and tokens."""
    counts: dict[str, Any]
    """What was counted of packs; what was counted of rows is in the stretch."""
    ended: bool
    """Whether the pass has ended."""


def beginning(settings: dict[str, Any], epoch: int) -> StreamPlace:
    """Return the place before the first pack of an epoch.

    Args:
        settings: What decides the packs.
        epoch: The pass over the data.
    """
    return StreamPlace(
        settings=settings, part=None, epoch=epoch, stretch=None, num_done=0, check=0, counts={}, ended=False
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Latest:
    """What a place is made of, once somebody asks for it."""

    saved: StreamPlace | None = None
    """The place that the pass went on from, where no pack came since."""
    epoch: int = 0
    """The pass over the data, before its first pack and behind its last."""
    part: list[int] | None = None
    """[worker, workers]."""
    chosen: Chosen | None = None
    """The latest pack."""
    counted: tuple[PackingReport, ...] = ()
    """What must be counted on: that of packs alone, or of rows too where the pass has ended."""
    ended: bool = False
    """Whether the pass has ended."""

    @property
    def keeps_no_place(self) -> bool:
        """Whether the source could not say where it stood."""
        return self.chosen is not None and self.chosen.stretch.source is None

    def place(self, settings: dict[str, Any]) -> StreamPlace:
        """Return the place.

        Args:
            settings: What decides the packs.
        """
        if self.saved is not None:
            return self.saved
        place = beginning(settings, self.epoch)
        if not self.counted:
            return place
        total = PackingReport(budget=self.counted[0].budget)
        for report in self.counted:
            total.merge(report)
        place |= {"part": self.part, "counts": total.counts(), "ended": self.ended}
        if self.chosen is not None:
            stretch = self.chosen.stretch
            place |= {
                "epoch": stretch.epoch,
                "stretch": stretch_state(stretch),
                "num_done": self.chosen.number,
                "check": self.chosen.check,
            }
        return place


def why_no_place(source: object) -> str:
    """Return why a position in a source of samples could not be found again.

    Args:
        source: One that keeps no place.
    """
    state_dict = getattr(source, "state_dict", None)
    if state_dict is None:
        return f"{type(source).__name__} keeps no place: it has no state_dict and load_state_dict"
    try:
        state_dict()
    except ConfigError as error:
        return str(error)
    return f"{type(source).__name__} did not say where it stood"


def settings_of(
    digests: Mapping[str, str],
    admit: Admission,
    assemble: Assembler,
    packer: Mapping[str, object],
    *,
    infinite: bool,
) -> dict[str, Any]:
    """Return what decides the packs, in a few words and checksums.

    Args:
        digests: Of the data, the tokenizer and how rows are read.
        admit: The limits of a sample.
        assemble: Builds packs.
        packer: The packer's settings.
        infinite: Whether the data begins again at its end.
    """
    limits = (admit.max_sample_length, admit.max_images_per_example, admit.oversize)
    others = (packer["max_waiting_tokens"], packer["delta"], assemble.append_pad, assemble.decode, infinite)
    return {
        **digests,
        "budget": list(admit.budget.as_tuple()),
        "lookahead": packer["lookahead"],
        "method": packer["method"],
        "seed": packer["seed"],
        "other settings": f"{zlib.crc32(repr((limits, others)).encode()):08x}",
    }


def check_settings(saved: Mapping[str, Any], present: Mapping[str, Any], what: str) -> None:
    """Refuse a place that was saved under other settings.

    Args:
        saved: Then.
        present: Now.
        what: What would not be the same.

    Raises:
        ConfigError: If they differ; says in what.
    """
    differing = [name for name in present if saved.get(name) != present[name]]
    if differing:
        told = "; ".join(f"{name}: saved {saved.get(name)!r}, now {present[name]!r}" for name in differing)
        raise ConfigError(
            f"the saved position is of another {', '.join(differing)}, so {what} would differ ({told}). Go "
            "on with the saved settings and data, or begin anew"
        )


def check_part(saved: list[int] | None, present: list[int]) -> None:
    """Refuse a place of another worker, or of another number of workers.

    Args:
        saved: [worker, workers] then; None suits any.
        present: The same now.

    Raises:
        ConfigError: If they differ.
    """
    if saved not in (None, present):
        worker, num_workers = saved or present
        raise ConfigError(
            f"the saved position is of worker {worker} of {num_workers}, this is worker {present[0]} of "
            f"{present[1]}. Each worker packs a part of its own: use num_workers={num_workers} again, or an "
            "index (ConstantLengthDataset.index), whose position suits any number of workers and ranks"
        )
