"""A map-style data set of mixed tasks: costs are known at once, pixels are read when they are asked for.

    rows --tokenise, image headers--> metadata: task, images, tokens, patches      at construction
    dataset[i] --decode, scale-----> images float [3, S, S], input_ids, labels     when a step is made

Each image becomes one picture of one size, as models without tiles take it. With tiles, pack instead:
`ConstantLengthDataset` or `PackIndex`.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import Dataset

from vlmpack.batching.records import SampleMetadata, infer_task_type
from vlmpack.errors import ConfigError, SampleError
from vlmpack.geometry import Tiling
from vlmpack.images import MAX_PIXELS
from vlmpack.packing.assemble import Assembler
from vlmpack.packing.pad_token import pad_token_id
from vlmpack.samples import Refusal, Sample
from vlmpack.stages import VQADataset

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ONE_PICTURE: Final = Tiling(tile_size=224, max_side=224)
"""Each image as one picture of 224 x 224 pixels and 64 image tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """What is known of a usable row."""

    row: int
    metadata: SampleMetadata


def task_by_images(row: Mapping[str, Any]) -> str:
    """Return T3 for several subjects, else T2 for several images, else T1.

    Args:
        row: With `subject_id`, or with `images`.
    """
    images = row.get("images")
    return infer_task_type({**row, "images": images if isinstance(images, list | tuple) else []})


class HeterogeneousTaskDataset(Dataset[dict[str, Any]]):
    """Samples of several tasks, for `DynamicBatchingTrainer` and `MemoryAwareBatchSampler`.

    A row that cannot be used is refused at construction, counted in `num_refused` by reason.

    Args:
        rows: A data set with a length: of Hugging Face, or a list of rows; its columns are described in
            `vlmpack.stages.rows`.
        tokenizer: With the image tokens of the tiling; see `add_image_tokens`.
        tiling: Its `tile_size` is the side in pixels that every image is scaled to, its proportions lost, and
            `max_side` the same: one tile is one picture.
        task_of: Names a row's task; None: T1, T2 and T3 by images and subjects.
        max_length: Longer samples are refused.
        max_images: Samples with more images are refused.
        verify: Decode every image once at construction, so that a broken one cannot stop the run.
        image_root: The folder that image paths in the data may lead into.
        image_marker: What stands for an image in a text.

    Raises:
        ConfigError: If a setting is invalid, or no row can be used.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tiling: Tiling = ONE_PICTURE,
        task_of: Callable[[Mapping[str, Any]], str] = task_by_images,
        max_length: int | None = None,
        max_images: int | None = 3,
        verify: bool = False,
        image_root: str | Path | None = None,
        image_marker: str | None = "<image>",
    ) -> None:
        if tiling.max_side != tiling.tile_size:
            raise ConfigError(
                f"images of up to {tiling.max_side} pixels would be cut into tiles of {tiling.tile_size}: "
                f"here each image is one picture, so say max_side={tiling.tile_size}, or pack the data set"
            )
        self._samples = VQADataset(
            rows, tokenizer, tiling=tiling, image_root=image_root, image_marker=image_marker
        )
        self._rows = rows
        self._task_of = task_of
        self._max_length = max_length
        self._max_images = max_images
        self._assemble = Assembler(
            budget=None,
            tile_size=tiling.tile_size,
            pad_token_id=pad_token_id(tokenizer),
            append_pad=False,
            max_pixels=MAX_PIXELS,
        )
        self.num_refused: Counter[str] = Counter()
        """Rows that cannot be used, by reason."""
        self.refusals: list[Refusal] = []
        """Their keys and messages."""
        self._entries = self._scan(verify)

    def _scan(self, verify: bool) -> list[_Entry]:
        number = self._samples.num_rows
        if number is None:
            raise ConfigError("a stream has no length: make it a list, or pack it (ConstantLengthDataset)")
        entries = []
        for row in range(number):
            try:
                sample = self._sample(row)
                if verify:
                    self._decoded(sample)
            except SampleError as error:
                self._refuse(Refusal.of(str(row), error))
                continue
            entries.append(_Entry(row=row, metadata=self._metadata(row, sample)))
        if not entries:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.num_refused.most_common())
            raise ConfigError(f"none of {number} rows can be used ({reasons or 'there is no row'})")
        return entries

    def _refuse(self, refusal: Refusal) -> None:
        self.num_refused[refusal.reason] += 1
        self.refusals.append(refusal)
        logger.info("row %s is refused: %s", refusal.key, refusal.message)

    def _sample(self, row: int) -> Sample:
        """Return a row's sample within the limits.

        Raises:
            SampleError: If it is over one.
        """
        sample = self._samples[row]
        if isinstance(sample, Refusal):
            raise SampleError(sample.reason, sample.message, **sample.numbers)
        length, images = sample.cost.num_tokens, sample.cost.num_images
        if self._max_length is not None and length > self._max_length:
            raise SampleError(
                "sample_too_long",
                f"{length} tokens; the limit is {self._max_length} (max_length)",
                num_tokens=length,
                limit=self._max_length,
            )
        if self._max_images is not None and images > self._max_images:
            raise SampleError(
                "too_many_images",
                f"{images} images; the limit is {self._max_images} (max_images)",
                num_images=images,
                limit=self._max_images,
            )
        return sample

    def _metadata(self, row: int, sample: Sample) -> SampleMetadata:
        task = self._task_of(self._rows[row])
        if not isinstance(task, str) or not task:
            raise ConfigError(f"row {sample.key}: task_of must return a name, got {task!r}")
        return SampleMetadata(
            task_type=task,
            num_images=sample.cost.num_images,
            num_tokens=sample.cost.num_tokens,
            num_patches=sample.cost.num_patches,
            key=sample.key,
        )

    def __len__(self) -> int:
        return len(self._entries)

    def get_sample_metadata(self, idx: int) -> SampleMetadata:
        """Return task, images, tokens and ViT patches of a sample, without reading its pixels.

        Args:
            idx: Its position.
        """
        return self._entries[idx].metadata

    @property
    def task_types(self) -> tuple[str, ...]:
        """The tasks that occur, sorted."""
        return tuple(sorted({entry.metadata["task_type"] for entry in self._entries}))

    @property
    def task_distribution(self) -> dict[str, float]:
        """The share of each task."""
        counts = Counter(entry.metadata["task_type"] for entry in self._entries)
        return {task: counts[task] / len(self) for task in self.task_types}

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Return a sample: images [3, S, S] in -1 to 1, input_ids and labels [T], task_type, key.

        Args:
            idx: Its position.

        Raises:
            SampleError: If an image is broken in its body, which its header did not show; `verify=True`
                refuses such rows beforehand.
        """
        entry = self._entries[idx]
        try:
            pack = self._decoded(self._sample(entry.row))
        except SampleError as error:
            raise SampleError(
                error.reason,
                f"row {entry.metadata['key']}: {error.message}. verify=True refuses such rows beforehand",
            ) from error
        return {
            "images": [tile.float().div_(127.5).sub_(1.0) for tile in pack.tiles],
            "input_ids": pack.input_ids,
            "labels": pack.labels,
            "task_type": entry.metadata["task_type"],
            "key": entry.metadata["key"],
        }

    def _decoded(self, sample: Sample) -> Any:
        pack, refusals = self._assemble([sample])
        if pack is None:
            raise SampleError(refusals[0].reason, refusals[0].message)
        return pack
