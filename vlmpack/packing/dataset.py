"""ConstantLengthDataset: a stream of samples -> a stream of packs. The heart of the library.

Samples wait in a look-ahead buffer as token arrays and compressed images; the packer sees their
costs only. Pixels are decoded for a pack when its turn comes, in threads, a few packs ahead.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from vlmpack.budget import PackBudget
from vlmpack.errors import ConfigError, EmptySourceError, SourceError
from vlmpack.geometry import Tiling
from vlmpack.kernels import warm_up
from vlmpack.packing.assemble import Assembler, PackedSequence
from vlmpack.packing.index import IndexedPacks, build_index
from vlmpack.packing.ledger import Ledger
from vlmpack.packing.report import PackingReport, count_pack
from vlmpack.packing.stream import StreamPacker
from vlmpack.samples import Refusal, Sample
from vlmpack.stages.admit import Admission, OversizePolicy
from vlmpack.stages.prefetch import map_ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerBase

    from vlmpack.geometry import ImageRule
    from vlmpack.memory.guard import BatchGuard
    from vlmpack.packing.methods import Method

logger = logging.getLogger(__name__)


class SampleSource(Protocol):
    """What `ConstantLengthDataset` packs; `VQADataset` is one."""

    tokenizer: PreTrainedTokenizerBase
    tiling: ImageRule
    max_pixels: int

    def __iter__(self) -> Iterator[Sample | Refusal]:
        """Yield a sample or a refusal for each row of this worker's part."""
        ...

    def retile(self, sample: Sample, tiling: ImageRule) -> Sample:
        """Return the sample with its images cut by another rule."""
        ...


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
    ) -> None:
        for name, value, least in (
            ("num_of_sequences", num_of_sequences, 1),
            ("queue_size", queue_size, 1),
            ("batch_size", batch_size, 1),
            ("lookahead", lookahead, 1),
            ("delta", delta, 0),
            ("seed", seed, 0),
            ("decode_threads", decode_threads, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        for attribute in ("tokenizer", "tiling", "retile"):
            if not hasattr(dataset, attribute):
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
        """Passes over the data that this process finished; grows only if `infinite`."""
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
        self._ledger = Ledger(self.budget)
        self._num_admitted: int | None = None  # in the latest whole reading of the data, if `infinite`

    @property
    def report(self) -> PackingReport:
        """The counts of the latest pass, added up over DataLoader workers.

        They are final when a pass ends; during a pass, workers' counts lag by up to half a second and
        run ahead of the consumer by what is prefetched.
        """
        return self._ledger.total()

    def __iter__(self) -> Iterator[PackedSequence]:
        worker = get_worker_info()
        report = self._ledger.start(worker.id, worker.num_workers) if worker else self._ledger.start()
        removed_before = self._num_texts_with_image_token()
        assembled = map_ahead(
            partial(self._assemble, keep_images=self.keep_images, loading=Lock()),
            self._chosen(report),
            num_threads=self._decode_threads,
            ahead=self._queue_size,
        )
        lost: set[str] = set()
        num_lost = 0
        try:
            for pack, refusals in assembled:
                for refusal in refusals:
                    report.refuse(refusal)
                if pack is None:
                    lost.update(refusal.key for refusal in refusals)
                    num_lost += len(refusals)
                    self._check_hope(len(lost), num_lost, refusals[-1])
                    continue
                lost, num_lost = set(), 0
                count_pack(report, pack, appends_pad=self._assemble.append_pad)
                self._ledger.write()
                yield pack
        finally:
            assembled.close()  # type: ignore[attr-defined]
            report.num_texts_with_image_token = self._num_texts_with_image_token() - removed_before
            self._ledger.write(now=True)
        total = self._ledger.finish()  # None while another worker is still at it
        if total is not None and not total.num_packs:
            raise (SourceError if total.num_read else EmptySourceError)(total.why_nothing())

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
        num_rows = getattr(self.dataset, "num_rows", None)
        if num_rows is None:
            raise TypeError("a streaming data set has no length, so its packs cannot be counted ahead")
        indices = np.unique(np.linspace(0, num_rows - 1, min(max_rows, num_rows)).astype(int)).tolist()
        packer, num_packs = self._new_packer(), 0
        for index in indices:
            item = self.dataset[index]  # type: ignore[index]
            sample = item if isinstance(item, Refusal) else self._admit(item)
            if isinstance(sample, Sample):
                num_packs += len(packer.push(self._admit.packed_cost(sample)))
        num_packs += len(packer.flush())
        return math.ceil(1.02 * num_packs * int(num_rows) / max(len(indices), 1))

    def _check_hope(self, num_keys: int, num_lost: int, latest: Refusal) -> None:
        """Stop a pass without end in which whole readings of the data give nothing any more.

        Args:
            num_keys: Samples since the latest pack, all of them with images that cannot be decoded.
            num_lost: The same, a sample counted each time that it came.
            latest: The last of them.

        Raises:
            SourceError: If they are all samples that there are.
        """
        if not self.infinite or self._num_admitted is None:
            return
        # Where keys repeat there are never enough of them; then the number decides.
        if num_keys < self._num_admitted and num_lost < 2 * (self._num_admitted + self._lookahead):
            return
        raise SourceError(
            f"no image of any sample can be decoded any more, {num_lost} samples in a row; the latest is "
            f"row {latest.key} ({latest.reason}): {latest.message}"
        )

    def _chosen(self, report: PackingReport) -> Iterator[list[Sample]]:
        """Yield the samples of each pack, planned from their costs.

        Raises:
            SourceError: If the pass is without end and a later reading of the data gives no sample.
        """
        packer = self._new_packer()
        waiting: dict[int, Sample] = {}
        num_arrived = 0
        while True:
            num_before, num_read_before = num_arrived, report.num_read
            for item in self.dataset:
                report.num_read += 1
                self._ledger.write()
                sample = item if isinstance(item, Refusal) else self._admit(item)
                if isinstance(sample, Refusal):
                    logger.info("refused %s (%s): %s", sample.key, sample.reason, sample.message)
                    report.refuse(sample)
                    continue
                if isinstance(item, Sample) and sample is not item:
                    report.num_shrunk += 1
                    report.num_tokens_removed += item.cost.num_tokens - sample.cost.num_tokens
                waiting[num_arrived] = sample
                num_arrived += 1
                for pack in packer.push(self._admit.packed_cost(sample)):
                    report.add_delays(num_arrived - 1 - arrival for arrival in pack)
                    yield [waiting.pop(arrival) for arrival in pack]
            if not self.infinite:
                break
            self._num_admitted = num_arrived - num_before
            if not self._num_admitted:
                break
            self.epoch += 1
        for pack in packer.flush():
            report.add_delays(num_arrived - 1 - arrival for arrival in pack)
            yield [waiting.pop(arrival) for arrival in pack]
        assert not waiting, f"{len(waiting)} samples were left behind by the packer"
        if self.infinite and num_arrived:  # otherwise this worker has no part of the data; others may
            num_rows = report.num_read - num_read_before
            raise SourceError(
                f"the data set gave {num_arrived} samples, and none of {num_rows} rows when it was read once "
                "more. An iterator can be read only once: pass a data set that begins again, or "
                "infinite=False."
            )

    def _new_packer(self) -> StreamPacker:
        return StreamPacker(self.budget, **self._packer_settings)  # type: ignore[arg-type]

    def _num_texts_with_image_token(self) -> int:
        return int(getattr(self.dataset, "num_texts_with_image_token", 0))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokenizer's padding token, or its end-of-sequence token where it has none.

    Args:
        tokenizer: Any tokenizer.

    Raises:
        ConfigError: If it has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        "the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token"
    )
