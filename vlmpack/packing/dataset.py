"""ConstantLengthDataset: a stream of samples -> a stream of packs. The heart of the library.

Samples wait in a look-ahead buffer as token arrays and compressed images; the packer sees their
costs only. Pixels are decoded for a pack when its turn comes, in threads, a few packs ahead.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final

from torch.utils.data import IterableDataset, get_worker_info

from vlmpack.budget import PackBudget
from vlmpack.errors import ConfigError, EmptySourceError, SourceError
from vlmpack.geometry import Tiling
from vlmpack.kernels import warm_up
from vlmpack.packing.account import Account
from vlmpack.packing.assemble import Assembler, PackedSequence
from vlmpack.packing.estimate import estimate_num_packs
from vlmpack.packing.hope import Hope
from vlmpack.packing.index import IndexedPacks, build_index
from vlmpack.packing.inputs import check_least
from vlmpack.packing.ledger import Ledger
from vlmpack.packing.lookahead import LookAhead
from vlmpack.packing.pad_token import pad_token_id
from vlmpack.packing.place import (
    Latest,
    StreamPlace,
    beginning,
    check_part,
    check_settings,
    settings_of,
    why_no_place,
)
from vlmpack.packing.report import PackingReport
from vlmpack.packing.stream import StreamPacker
from vlmpack.packing.stretch import stretch_of
from vlmpack.packing.tally import RefusalLimit, Tally
from vlmpack.stages.admit import Admission, OversizePolicy
from vlmpack.stages.prefetch import map_ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vlmpack.memory.guard import BatchGuard
    from vlmpack.packing.lookahead import Chosen, SampleSource
    from vlmpack.packing.methods import Method
    from vlmpack.packing.stretch import Stretch
    from vlmpack.samples import Refusal, Sample

_SEEDS_APART: Final = 0x9E3779B1  # odd, so that a seed comes back only after 2^31 stretches


class ConstantLengthDataset(IterableDataset[PackedSequence]):
    """Packs of samples under a token, an image and a ViT patch budget at once.

    Every row ends in a pack or in `report` as a refusal with a reason. The order of packs is a function
    of the data, the settings and the worker's part of the data only.

    Args:
        dataset: Samples with known costs, from `VQADataset`.
        infinite: Begin again at the end of the data, without end.
        max_sample_length: Samples with this many tokens or more are refused; `seq_length` where None.
        seq_length: Tokens that a pack may hold.
        num_of_sequences: Packs' worth of tokens that may wait in the look-ahead buffer.
        queue_size: Packs that are assembled ahead of the consumer; each holds its pixels.
        max_images_per_example: Samples with more images are refused; None for no limit.
        max_images_per_knapsack: Images that a pack may hold; None for no limit.
        max_patches: ViT patches that a pack may hold (1,024 a tile of 512 pixels); None for no limit. It
            decides the vision encoder's memory, which the token budget does not bound.
        memory: Knows what the GPU takes; packs then hold so few ViT patches that any `batch_size` of them
            fit it, or `max_patches` where that is less. `budget.max_patches` says the number.
        batch_size: Packs of a batch on one device, for `memory`.
        lookahead: Samples that may wait in the look-ahead buffer; more fill packs better.
        method: The packing algorithm, see `vlmpack.packing.methods.METHODS`.
        delta: Spare packs that worst-fit decreasing opens; the reference pipeline opens 5, which costs fill.
        seed: Decides the order of packs.
        oversize: What to do with a sample that alone is over a limit.
        append_pad: Append one padding token to each sample, as the reference pipeline does.
        decode_threads: Threads that decode images; 0 decodes in line.
        decode: Decode images; without, packs have no tiles, which is enough to plan and to count.
        max_refusal_ratio: Stop with an error when more of the rows read are refused, from 100 rows on; each
            worker counts its own, and the last of them those of all.
        warn_refusal_ratio: Log a warning when more of them are refused.
        account: Write what became of each row into Parquet files in this folder, see
            `vlmpack.packing.account.read_account`.
        keep_images: Let packs carry their undecoded images too, for storing them.

    Raises:
        ConfigError: If a setting is invalid.
    """

    def __init__(
        self,
        dataset: SampleSource,
        infinite: bool = False,
        max_sample_length: int | None = None,
        seq_length: int = 4096,
        num_of_sequences: int = 1024,
        queue_size: int = 4,
        max_images_per_example: int | None = 4,
        max_images_per_knapsack: int | None = 18,
        *,
        max_patches: int | None = None,
        memory: BatchGuard | None = None,
        batch_size: int = 1,
        lookahead: int = 4096,
        method: Method = "auto",
        delta: int = 0,
        seed: int = 0,
        oversize: OversizePolicy = "drop",
        append_pad: bool = True,
        decode_threads: int = 2,
        decode: bool = True,
        keep_images: bool = False,
        max_refusal_ratio: float | None = None,
        warn_refusal_ratio: float | None = None,
        account: str | Path | None = None,
    ) -> None:
        check_least(1, num_of_sequences=num_of_sequences, queue_size=queue_size)
        check_least(1, batch_size=batch_size, lookahead=lookahead)
        check_least(0, delta=delta, seed=seed, decode_threads=decode_threads)
        if not all(hasattr(dataset, attribute) for attribute in ("tokenizer", "tiling", "retile")):
            raise ConfigError(
                f"ConstantLengthDataset packs samples with known costs; wrap {type(dataset).__name__} "
                "in a VQADataset first"
            )
        self.dataset = dataset
        self.infinite = infinite
        self.budget = PackBudget(
            max_tokens=seq_length, max_images=max_images_per_knapsack, max_patches=max_patches
        )
        if memory is not None:
            tiling = dataset.tiling if isinstance(dataset.tiling, Tiling) else None
            fitting = memory.pack_budget(
                rows=batch_size,
                tokens_per_row=seq_length,
                tiling=tiling,
                bounded=tiling is not None,  # a family's sizes and tokens are its own
            )
            limits = [limit for limit in (max_patches, fitting.max_patches) if limit is not None]
            self.budget = replace(self.budget, max_patches=min(limits))
        self.keep_images = keep_images
        """Whether packs carry their undecoded images; what counts is its value when a pass begins."""
        self.epoch = 0
        """The pass over the data, from 0; grows by itself only if `infinite`, else see `set_epoch`."""
        self._admit = Admission(
            budget=self.budget,
            max_sample_length=seq_length if max_sample_length is None and append_pad else max_sample_length,
            max_images_per_example=max_images_per_example,
            extra_tokens=int(append_pad),
            oversize=oversize,
            tiling=dataset.tiling,
            retile=dataset.retile,
        )
        self._assemble = Assembler(
            budget=self.budget,
            tile_size=dataset.tiling.tile_size,
            pad_token_id=pad_token_id(dataset.tokenizer),
            append_pad=append_pad,
            max_pixels=dataset.max_pixels,
            decode=decode,
            cut=getattr(getattr(dataset, "family", None), "cut", None),
        )
        self._packer_settings = {
            "lookahead": lookahead,
            "method": method,
            "seed": seed,
            "delta": delta,
            "max_waiting_tokens": seq_length * num_of_sequences,
        }
        self._new_packer()  # so that wrong settings fail here, not in a worker
        warm_up(drop_in=method == "worst_fit_decreasing")  # forked workers inherit what is compiled here
        self._lookahead = lookahead
        self._queue_size = queue_size
        self._decode_threads = decode_threads
        self._limit = RefusalLimit(max_ratio=max_refusal_ratio, warn_ratio=warn_refusal_ratio)
        self._account = None if account is None else Path(account)
        self._ledger = Ledger(self.budget)
        self._digests: dict[str, str] | None = None
        self._saved: StreamPlace | None = None
        self._latest: Latest | None = None

    @property
    def report(self) -> PackingReport:
        """The counts of the latest pass, added up over DataLoader workers.

        They are final when a pass ends; during a pass, workers' counts lag by up to half a second and
        run ahead of the consumer by what is prefetched. A resumed pass goes on counting where it was saved,
        except that histograms and the refusals that are kept begin anew.
        """
        return self._ledger.total()

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data the next one is; shuffled data comes in another order in each.

        Args:
            epoch: From 0.

        Raises:
            ConfigError: If a saved position waits to be gone on from, and is of another epoch.
        """
        if self._saved is not None and self._saved["epoch"] != epoch:
            raise ConfigError(
                f"the saved position is of epoch {self._saved['epoch']}, so set_epoch({epoch}) would throw "
                "it away; call load_state_dict(None) first if that is meant"
            )
        self.epoch = epoch

    def state_dict(self) -> StreamPlace:
        """Return where the latest pass in this process stands, behind the pack that it gave last.

        Under 4 kB of plain values whatever the look-ahead: rows that wait are read again, never stored.

        Raises:
            ConfigError: If the data set below cannot find a place again, or packs are made in workers, each
                of which has a place of its own.
        """
        if self._saved is not None:
            return self._saved
        if self._latest is not None:
            if self._latest.keeps_no_place:
                raise ConfigError(why_no_place(self.dataset))
            return self._latest.place(self._settings())
        if self._ledger.has_workers():
            raise ConfigError(
                "the packs are made in the workers of a DataLoader, each of which stands elsewhere; ask the "
                "loader: vlmpack.ResumableLoader, or torchdata's StatefulDataLoader"
            )
        return beginning(self._settings(), self.epoch)

    def check_resumable(self) -> None:
        """Check that a place in the data can be found again.

        Raises:
            ConfigError: If not; says why.
        """
        if not callable(getattr(self.dataset, "state_dict", None)):
            raise ConfigError(why_no_place(self.dataset))
        self.dataset.state_dict()  # type: ignore[attr-defined]
        self._settings()  # so that workers inherit the digests

    def load_state_dict(self, state: StreamPlace | None) -> None:
        """Let the next pass go on behind the pack that was given last when the state was saved.

        Args:
            state: From `state_dict`; None forgets one that was loaded.

        Raises:
            ConfigError: If it is of other data, another tokenizer or other settings, and says which.
        """
        if state is not None:
            check_settings(state["settings"], self._settings(), "the packs")
            self.epoch = state["epoch"]
        self._saved, self._latest = state, None

    def __iter__(self) -> Iterator[PackedSequence]:
        worker = get_worker_info()
        part = [worker.id, worker.num_workers] if worker else [0, 1]
        saved, self._saved = self._saved, None
        if saved is not None:
            check_part(saved["part"], part)
        stretch = None if saved is None or saved["stretch"] is None else stretch_of(saved["stretch"])
        report = self._ledger.start(worker.id, worker.num_workers) if worker else self._ledger.start()
        if saved is not None and stretch is not None:
            report.merge(PackingReport.of_counts(self.budget, stretch.counts))
        packed = self._ledger.add(PackingReport.of_counts(self.budget, saved["counts"] if saved else {}))
        if saved is not None and saved["ended"]:
            self._latest = Latest(saved=saved)
        else:
            yield from self._packs(part, self._tally(part, report, packed), saved, stretch)
        total = self._ledger.finish()  # None while another worker is still at it
        if total is not None:
            self._limit.check(total)
            if not total.num_packs:
                raise (SourceError if total.num_read else EmptySourceError)(total.why_nothing())

    def _packs(
        self, part: list[int], tally: Tally, saved: StreamPlace | None, stretch: Stretch | None
    ) -> Iterator[PackedSequence]:
        """Yield the packs of the rest of a pass; what becomes of rows and of packs is counted apart."""
        ahead = LookAhead(
            self.dataset,
            self._admit,
            self._new_packer,
            lookahead=self._lookahead,
            infinite=self.infinite,
            epoch=self.epoch,
            tally=tally,
            on_epoch=partial(setattr, self, "epoch"),
        )
        self._latest = Latest(saved=saved, epoch=self.epoch)
        assembled = map_ahead(
            partial(_assembled, partial(self._assemble, keep_images=self.keep_images, loading=Lock())),
            ahead.packs(stretch, *((saved["num_done"], saved["check"]) if saved else ())),
            num_threads=self._decode_threads,
            ahead=self._queue_size,
        )
        hope = Hope(self._lookahead)
        try:
            for chosen, pack, refusals in assembled:
                tally.count_pack(chosen, pack, refusals)
                if pack is None:
                    hope.lose(refusals, ahead.num_admitted)
                    continue
                hope = Hope(self._lookahead)
                self._latest = Latest(part=part, chosen=chosen, counted=(tally.packed,))
                yield pack
            counted = (tally.read, tally.packed)
            self._latest = Latest(part=part, counted=counted, epoch=self.epoch, ended=True)
        finally:
            assembled.close()  # type: ignore[attr-defined]
            tally.close()

    def _tally(self, part: list[int], report: PackingReport, packed: PackingReport) -> Tally:
        folder = self._account
        return Tally(
            self._ledger,
            report,
            packed,
            limit=self._limit,
            account=None if folder is None else Account(folder, epoch=self.epoch, part=part),
            appends_pad=self._assemble.append_pad,
            sources=getattr(self.dataset, "names", ()),
        )

    def index(self, on_row: Callable[[PackingReport], None] | None = None) -> IndexedPacks:
        """Read every row once, without pixels, and return all packs of one global plan.

        Where the data set has a length: the plan sees every sample, divides evenly over ranks, and a
        `vlmpack.ranks.PackLoader` over it resumes exactly. O(rows), about 0.35 ms each.

        Args:
            on_row: Called with the counts after each row, to show progress.

        Raises:
            ConfigError: If the data set is a stream.
            SourceError: If nothing can be packed.
        """
        settings = self._packer_settings
        index = build_index(
            self.dataset,  # type: ignore[arg-type]
            self._admit,
            method=settings["method"],  # type: ignore[arg-type]
            seed=settings["seed"],  # type: ignore[arg-type]
            limit=self._limit,
            on_row=on_row,
        )
        return IndexedPacks(
            self.dataset,  # type: ignore[arg-type]
            self._admit,
            self._assemble,
            index,
            Ledger(self.budget),
        )

    def estimate_num_packs(self, *, max_rows: int = 256) -> int:
        """Return about how many packs a pass has, from packing rows spread evenly over the data.

        A little high as a rule: more samples pack better, and 2 % are added for the packs that workers
        leave half full at the end of their part. O(max_rows).

        Args:
            max_rows: Rows to read.

        Raises:
            TypeError: If the data set is a stream, whose length nobody knows.
        """
        return estimate_num_packs(self.dataset, self._admit, self._new_packer(), max_rows)

    def _settings(self) -> dict[str, object]:
        """Return what decides the packs, in a few words and checksums."""
        if self._digests is None:
            digests = getattr(self.dataset, "digests", None)
            self._digests = {"data set": type(self.dataset).__name__} if digests is None else digests()
        return settings_of(
            self._digests, self._admit, self._assemble, self._packer_settings, infinite=self.infinite
        )

    def _new_packer(self, stretch: int = 0) -> StreamPacker:
        seed = (self._packer_settings["seed"] + stretch * _SEEDS_APART) % (1 << 31)  # type: ignore[operator]
        return StreamPacker(self.budget, **{**self._packer_settings, "seed": seed})  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, object]:
        # It refers to samples, which a worker has no use for.
        return {**self.__dict__, "_latest": None}


def _assembled(
    assemble: Callable[[list[Sample]], tuple[PackedSequence | None, list[Refusal]]], chosen: Chosen
) -> tuple[Chosen, PackedSequence | None, list[Refusal]]:
    return (chosen, *assemble(chosen.samples))
