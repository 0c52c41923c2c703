"""`VQADataset` and `ConstantLengthDataset` with nanoVLM's arguments, on our stages."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from torch.utils.data import Dataset, IterableDataset

from vlmpack.errors import ConfigError
from vlmpack.integrations.nanovlm.items import Item, as_item
from vlmpack.integrations.nanovlm.processors import ImageProcessor
from vlmpack.packing import Assembler
from vlmpack.packing import ConstantLengthDataset as PackDataset
from vlmpack.packing.pad_token import pad_token_id
from vlmpack.samples import Refusal, Sample
from vlmpack.stages import RatingMinima
from vlmpack.stages import VQADataset as SampleDataset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from vlmpack.packing import PackingReport
    from vlmpack.packing.methods import Method
    from vlmpack.stages import OversizePolicy

logger = logging.getLogger(__name__)

_MAX_PACKS_AHEAD: Final = 8
_ROWS_FOR_LENGTH: Final = 256


class VQADataset(Dataset["Item | None"]):
    """Rows -> tokenised samples with float tiles; None for a row that is refused, logged and counted.

    Args:
        dataset: Rows with `images` and `texts`, map-style or streaming.
        tokenizer: From `get_tokenizer`.
        image_processor: From `get_image_processor`.
        mp_image_token_length: Image tokens a tile.
        relevance_min_rating: Turns rated lower are dropped.
        image_correspondence_min_rating: Likewise.
        visual_dependency_min_rating: Likewise.
        formatting_min_rating: Likewise.

    Raises:
        ConfigError: If the image processor is not ours, or the tokenizer lacks a token.
    """

    def __init__(
        self,
        dataset: object,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: ImageProcessor,
        mp_image_token_length: int,
        relevance_min_rating: int = 1,
        image_correspondence_min_rating: int = 1,
        visual_dependency_min_rating: int = 1,
        formatting_min_rating: int = 1,
    ) -> None:
        if not isinstance(image_processor, ImageProcessor):
            raise ConfigError(
                "packing is planned from image sizes, so the image processor must come from "
                f"vlmpack.integrations.nanovlm.get_image_processor, not {type(image_processor).__name__}"
            )
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.mp_image_token_length = mp_image_token_length
        tiling = image_processor.tiling(
            mp_image_token_length, global_tile=hasattr(tokenizer, "global_image_token")
        )
        self.samples = SampleDataset(
            dataset,
            tokenizer,
            tiling=tiling,
            image_marker=None,
            ratings=RatingMinima(
                relevance=relevance_min_rating,
                image_correspondence=image_correspondence_min_rating,
                visual_dependency=visual_dependency_min_rating,
                formatting=formatting_min_rating,
            ),
        )
        self._assemble = Assembler(
            budget=None,
            tile_size=tiling.tile_size,
            pad_token_id=pad_token_id(tokenizer),
            append_pad=False,
            max_pixels=self.samples.max_pixels,
        )
        self.num_refused = 0
        """Rows for which this process returned None."""

    def __len__(self) -> int:
        if self.samples.num_rows is None:
            raise TypeError("a streaming data set has no length")
        return self.samples.num_rows

    def __getitem__(self, idx: int) -> Item | None:
        return self._item(self.samples[idx])

    def iter_for_worker(self) -> Iterator[Item | None]:
        """Yield this worker's items, None for each row that is refused."""
        for sample in self.samples:
            yield self._item(sample)

    def _item(self, sample: Sample | Refusal) -> Item | None:
        refusals = [sample] if isinstance(sample, Refusal) else []
        pack = None
        if isinstance(sample, Sample):
            pack, refusals = self._assemble([sample])
        for refusal in refusals:
            self.num_refused += 1
            logger.warning("row %s is left out (%s): %s", refusal.key, refusal.reason, refusal.message)
        return None if pack is None else as_item(pack)


class ConstantLengthDataset(IterableDataset[Item]):
    """Packs of `seq_length` tokens at most, as nanoVLM's training script takes them.

    Args:
        dataset: A `VQADataset` of this module.
        infinite: Begin again at the end of the data.
        max_sample_length: Samples with this many tokens or more are refused.
        seq_length: Tokens that a pack may hold.
        num_of_sequences: Packs' worth of tokens in the look-ahead buffer.
        queue_size: Packs assembled ahead; at most 8 are, since each holds its pixels.
        max_images_per_example: Samples with more images are refused.
        max_images_per_knapsack: Images that a pack may hold.
        max_patches: ViT patches that a pack may hold; None for no limit.
        lookahead: Samples in the look-ahead buffer.
        method: The packing algorithm.
        seed: Decides the order of packs.
        oversize: What to do with a sample that is over a limit alone.
        decode_threads: Threads that decode images.

    Raises:
        ConfigError: If `dataset` is not a `VQADataset` of this module, or a setting is invalid.
    """

    def __init__(
        self,
        dataset: VQADataset,
        infinite: bool = False,
        max_sample_length: int = 1024,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        queue_size: int = 2048,
        max_images_per_example: int | None = 4,
        max_images_per_knapsack: int | None = 18,
        *,
        max_patches: int | None = None,
        lookahead: int = 4096,
        method: Method = "auto",
        seed: int = 0,
        oversize: OversizePolicy = "drop",
        decode_threads: int = 2,
    ) -> None:
        if not isinstance(dataset, VQADataset):
            raise ConfigError(
                f"wrap the data in vlmpack.integrations.nanovlm.VQADataset, got {type(dataset).__name__}"
            )
        self.dataset = dataset
        self.packs = PackDataset(
            dataset.samples,
            infinite=infinite,
            max_sample_length=max_sample_length,
            seq_length=seq_length,
            num_of_sequences=num_of_sequences,
            queue_size=min(queue_size, _MAX_PACKS_AHEAD),
            max_images_per_example=max_images_per_example,
            max_images_per_knapsack=max_images_per_knapsack,
            max_patches=max_patches,
            lookahead=lookahead,
            method=method,
            seed=seed,
            oversize=oversize,
            decode_threads=decode_threads,
        )
        self._length: int | None = None

    @property
    def report(self) -> PackingReport:
        """What became of every row in the latest pass."""
        return self.packs.report

    @property
    def epoch(self) -> int:
        """Passes over the data that this process finished."""
        return self.packs.epoch

    def __iter__(self) -> Iterator[Item]:
        for pack in self.packs:
            yield as_item(pack)

    def __len__(self) -> int:
        """Return about how many packs a pass has, from the costs of up to 256 rows spread over the data.

        Raises:
            TypeError: For a streaming data set.
        """
        if self._length is None:
            self._length = self.packs.estimate_num_packs(max_rows=_ROWS_FOR_LENGTH)
        return self._length
