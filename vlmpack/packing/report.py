"""What became of every row: packed, or refused with a reason; and how full the packs are."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlmpack.budget import AXES, NO_COST, PackBudget, SampleCost
from vlmpack.errors import StorageError, why_unwritten
from vlmpack.samples import Refusal
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.figure import Figure

    from vlmpack.packing.assemble import PackedSequence

_HISTOGRAMS: Final = ("samples_per_pack", "tokens_per_pack", "patches_per_pack")
_SUMS: Final = (
    "num_read",
    "num_packed",
    "num_packs",
    "num_tiles",
    "num_supervised",
    "num_appended",
    "num_texts_with_image_token",
    "num_shrunk",
    "num_tokens_removed",
    "attention",
    "total_delay",
)

MAX_EXAMPLES: Final[int] = 100
"""Refusals of one reason that are kept; more are counted only, so a report stays small."""

_MAX_TEXT: Final = 1_000
"""Characters of a kept refusal's texts; some quote what a data set or its owner's code said."""


@dataclass(kw_only=True)
class PackingReport:
    """Counts of one pass over the data; adds up over workers and ranks.

    At the end of a pass, num_read == num_packed + the sum of num_refused.
    """

    budget: PackBudget
    """What a pack may hold."""
    num_read: int = 0
    """Rows read."""
    num_packed: int = 0
    """Samples in finished packs."""
    num_packs: int = 0
    """Finished packs."""
    load: SampleCost = NO_COST
    """Sum over all packs."""
    num_tiles: int = 0
    """Tiles over all packs, global ones included."""
    num_supervised: int = 0
    """Tokens with a label."""
    num_appended: int = 0
    """Padding tokens among the load: one a sample where the packer appends it."""
    max_load: tuple[int, int, int] = (0, 0, 0)
    """Largest load of one pack, an entry for each axis of `vlmpack.budget.AXES`."""
    samples_per_pack: Counter[int] = field(default_factory=Counter)
    """How many packs have how many samples; these counters and `refusals` begin anew in a resumed run."""
    tokens_per_pack: Counter[int] = field(default_factory=Counter)
    """How many packs have how many tokens."""
    patches_per_pack: Counter[int] = field(default_factory=Counter)
    """How many packs have how many ViT patches."""
    attention: int = 0
    """Sum of squared sample lengths: what the language model's attention costs, in pairs of tokens."""
    total_delay: int = 0
    """Sum over samples of how many samples arrived between a sample and its pack."""
    max_delay: int = 0
    """The longest such wait."""
    num_shrunk: int = 0
    """Samples that were over a limit and were made to fit, with fewer tiles or less text."""
    num_tokens_removed: int = 0
    """Tokens that went with that."""
    num_refused: Counter[str] = field(default_factory=Counter)
    """Rows refused, by reason."""
    refusals: list[Refusal] = field(default_factory=list)
    """The first `MAX_EXAMPLES` refusals of each reason, long texts cut."""
    decoders: dict[str, str | None] = field(default_factory=dict)
    """The packages that decode and resize here, with versions, None for what Pillow does instead; empty where
    no picture was decoded. No pixel depends on it, the speed does."""
    num_texts_with_image_token: int = 0
    """Texts out of which an image token was removed."""
    by_source: Counter[str] = field(default_factory=Counter)
    """Of a `Mixture`: rows read, packed and refused, and packed tokens, by "source/read" and so on."""

    def refuse(self, refusal: Refusal) -> None:
        """Count a refusal."""
        self.num_refused[refusal.reason] += 1
        if self.num_refused[refusal.reason] <= MAX_EXAMPLES:
            self.refusals.append(_short(refusal))

    def add_pack(
        self, costs: Sequence[SampleCost], *, num_tiles: int, num_supervised: int, num_appended: int
    ) -> None:
        """Count a finished pack.

        Args:
            costs: One for each sample in it, appended padding included.
            num_tiles: Its tiles.
            num_supervised: Its tokens with a label.
            num_appended: Its appended padding tokens.
        """
        load = sum(costs, NO_COST)
        self.num_packs += 1
        self.num_packed += len(costs)
        self.samples_per_pack[len(costs)] += 1
        self.tokens_per_pack[load.num_tokens] += 1
        self.patches_per_pack[load.num_patches] += 1
        self.attention += sum(cost.num_tokens**2 for cost in costs)
        self.load += load
        self.max_load = _larger(self.max_load, load.as_tuple())
        self.num_tiles += num_tiles
        self.num_supervised += num_supervised
        self.num_appended += num_appended

    def add_delays(self, delays: Iterable[int]) -> None:
        """Count how long the samples of a planned pack waited.

        Args:
            delays: Samples that arrived after each of them until the pack was planned.
        """
        for delay in delays:
            self.total_delay += delay
            self.max_delay = max(self.max_delay, delay)

    def why_nothing(self) -> str:
        """Return what to tell a person when no row could be packed."""
        if not self.num_read:
            return "the data set is empty: it yielded no row (an iterator yields its rows only once)"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.num_refused.most_common())
        told = "".join(
            f". The first refusal, of row {first.key}: {first.message}" for first in self.refusals[:1]
        )
        return f"none of {self.num_read} rows can be packed: {reasons}{told}"

    @property
    def total_refused(self) -> int:
        """Rows refused, for whatever reason."""
        return sum(self.num_refused.values())

    @property
    def fill(self) -> dict[str, float | None]:
        """Used / capacity for each axis over all packs; None on an axis without a limit or packs."""
        limits = self.budget.as_tuple()
        return {
            axis: used / (limit * self.num_packs) if limit and self.num_packs else None
            for axis, used, limit in zip(AXES, self.load.as_tuple(), limits, strict=True)
        }

    @property
    def lower_bound(self) -> int:
        """Packs that any packing of these samples needs: the largest total over capacity, rounded up."""
        limits = self.budget.as_tuple()
        pairs = zip(self.load.as_tuple(), limits, strict=True)
        return max((-(-used // limit) for used, limit in pairs if limit), default=0)

    @property
    def patches_per_pack_mean(self) -> float:
        """ViT patches a pack on average; 0 without packs."""
        return self.load.num_patches / self.num_packs if self.num_packs else 0.0

    @property
    def patches_per_pack_p95(self) -> int:
        """The fewest ViT patches that at least 95 % of the packs do not exceed; 0 without packs."""
        num_packs, total = 0, self.patches_per_pack.total()
        for patches, count in sorted(self.patches_per_pack.items()):
            num_packs += count
            if 100 * num_packs >= 95 * total:
                return patches
        return 0

    @property
    def patches_per_pack_max(self) -> int:
        """The most ViT patches of a pack, which decide the vision encoder's memory; 0 without packs."""
        return self.max_load[AXES.index("patches")]

    @property
    def padding(self) -> float:
        """Share of positions that are padding when packs are padded to the token budget, in [0, 1]."""
        return self._padding(self.num_packs)

    @property
    def padding_unpacked(self) -> float:
        """The same with one sample a row, as without packing, in [0, 1]."""
        return self._padding(self.num_packed)

    def _padding(self, num_rows: int) -> float:
        positions = num_rows * self.budget.max_tokens
        return 1 - (self.load.num_tokens - self.num_appended) / positions if positions else 0.0

    def plot(self, *, title: str = "", subtitle: str = "") -> Figure:
        """Draw how many packs have how many tokens, ViT patches and samples; `savefig` writes a file.

        Args:
            title: The result, in a line; the fill of each axis where empty.
            subtitle: What it is the result of, in smaller letters.

        Raises:
            ConfigError: If there is no pack, or matplotlib is not installed.
        """
        from vlmpack.packing.charts import plot_fill  # here: a report is made without a picture

        return plot_fill(self, title=title, subtitle=subtitle)

    def counts(self) -> dict[str, Any]:
        """Return the sums alone, those that are not 0: under 1 kB of JSON, for a saved position.

        Histograms and the refusals that were kept are left out.
        """
        sums: dict[str, Any] = {name: getattr(self, name) for name in (*_SUMS, "max_delay")}
        sums |= {"load": list(self.load.as_tuple()), "max_load": list(self.max_load)}
        sums |= {"num_refused": dict(self.num_refused), "by_source": dict(self.by_source)}
        return {name: value for name, value in sums.items() if value not in (0, [0, 0, 0], {})}

    @classmethod
    def of_counts(cls, budget: PackBudget, counts: Mapping[str, Any]) -> PackingReport:
        """Return a report with the sums that `counts` returned, without histograms and kept refusals.

        Args:
            budget: What a pack may hold.
            counts: From a report under the same budget.
        """
        values = dict(counts)
        tokens, images, patches = values.pop("load", (0, 0, 0))
        values["load"] = SampleCost(num_tokens=tokens, num_images=images, num_patches=patches)
        values["max_load"] = tuple(values.get("max_load", (0, 0, 0)))
        for name in ("num_refused", "by_source"):
            values[name] = Counter(values.get(name, {}))
        return cls(budget=budget, **values)

    def merge(self, other: PackingReport) -> None:
        """Add the counts of another worker or rank.

        Args:
            other: A report under the same budget.
        """
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_delay = max(self.max_delay, other.max_delay)
        self.load += other.load
        self.max_load = _larger(self.max_load, other.max_load)
        for name in _HISTOGRAMS:
            getattr(self, name).update(getattr(other, name))
        kept = Counter(refusal.reason for refusal in self.refusals)
        for refusal in other.refusals:
            kept[refusal.reason] += 1
            if kept[refusal.reason] <= MAX_EXAMPLES:
                self.refusals.append(refusal)
        self.num_refused.update(other.num_refused)
        self.by_source.update(other.by_source)
        self.decoders = self.decoders or other.decoders

    def save(self, file: str | Path) -> None:
        """Write the report as JSON; the file is either whole or what it was.

        Args:
            file: Its folder exists.

        Raises:
            StorageError: If it cannot be written.
        """
        path = Path(file)
        draft = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            draft.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
            draft.replace(path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise StorageError(why_unwritten(error, f"the report {path}")) from error

    @classmethod
    def from_file(cls, file: str | Path) -> PackingReport:
        """Return a report that `save` wrote; those of several ranks add up by `merge`.

        Args:
            file: JSON.
        """
        return cls.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values that JSON takes, with the derived figures."""
        plain: dict[str, Any] = {name.name: getattr(self, name.name) for name in fields(self)}
        plain["budget"] = asdict(self.budget)
        plain["load"] = asdict(self.load)
        plain["num_refused"] = dict(self.num_refused)
        plain["by_source"] = dict(self.by_source)
        plain["refusals"] = [asdict(refusal) for refusal in self.refusals]
        for name in _HISTOGRAMS:
            plain[name] = {str(count): packs for count, packs in sorted(getattr(self, name).items())}
        plain["max_load"] = dict(zip(AXES, self.max_load, strict=True))
        plain["derived"] = {
            "total_refused": self.total_refused,
            "fill": self.fill,
            "lower_bound": self.lower_bound,
            "patches_per_pack_mean": self.patches_per_pack_mean,
            "patches_per_pack_p95": self.patches_per_pack_p95,
            "patches_per_pack_max": self.patches_per_pack_max,
            "padding": self.padding,
            "padding_unpacked": self.padding_unpacked,
            "mean_delay": self.total_delay / self.num_packed if self.num_packed else 0.0,
        }
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> PackingReport:
        """Return the report that `as_dict` wrote."""
        values = {name.name: plain[name.name] for name in fields(cls) if name.name in plain}
        values["budget"] = PackBudget(**plain["budget"])
        values["load"] = SampleCost(**plain["load"])
        tokens, images, patches = (int(plain["max_load"][axis]) for axis in AXES)
        values["max_load"] = (tokens, images, patches)
        for name in _HISTOGRAMS:
            values[name] = Counter({int(count): packs for count, packs in plain[name].items()})
        values["num_refused"] = Counter(plain["num_refused"])
        values["by_source"] = Counter(plain["by_source"])
        values["refusals"] = [Refusal(**refusal) for refusal in plain["refusals"]]
        return cls(**values)


def count_pack(report: PackingReport, pack: PackedSequence, *, appends_pad: bool) -> None:
    """Count a pack that was built. O(tokens).

    Args:
        report: Changed in place.
        pack: Any pack.
        appends_pad: Whether a padding token was appended to each sample.
    """
    report.add_pack(
        pack.costs,
        num_tiles=sum(pack.tiles_per_image),
        num_supervised=int((pack.labels != IGNORE_INDEX).sum()),
        num_appended=len(pack.costs) * appends_pad,
    )
    if len(pack.tiles) and not report.decoders:
        from vlmpack.images import accelerators  # here: a plan without pixels needs no torch

        report.decoders = accelerators()


def _short(refusal: Refusal) -> Refusal:
    """Return the refusal with its texts cut."""
    numbers = {
        name: value[:_MAX_TEXT] if isinstance(value, str) else value
        for name, value in refusal.numbers.items()
    }
    return replace(refusal, key=refusal.key[:_MAX_TEXT], message=refusal.message[:_MAX_TEXT], numbers=numbers)


def _larger(first: tuple[int, int, int], second: tuple[int, int, int]) -> tuple[int, int, int]:
    return (max(first[0], second[0]), max(first[1], second[1]), max(first[2], second[2]))
