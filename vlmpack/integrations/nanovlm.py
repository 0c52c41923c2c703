"""Drop-in for nanoVLM's data code: the same names, arguments, keys, dtypes, label shift and padding.

    - from data.processors import get_image_processor, get_tokenizer
    - from data.datasets import VQADataset
    - from data.advanced_datasets import ConstantLengthDataset
    - from data.collators import VQACollator
    - from data.data_utils import synchronized_dataloader_step
    + from vlmpack.integrations.nanovlm import (
    +     ConstantLengthDataset, VQACollator, VQADataset, get_image_processor, get_tokenizer,
    +     synchronized_dataloader_step,
    + )

What differs, on purpose: nothing hangs (a failure is raised at the consumer), every dropped row is
counted in `ConstantLengthDataset.report`, the image limit holds for a sample alone, no spare packs are
opened, pixels are decoded only for what is packed, transparent pixels become white instead of their
hidden colour, and `queue_size` counts packs, of which at most 8 are held.
The batch has no positions: nanoVLM's model does not isolate samples. `vlmpack.pipeline` does.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, TypedDict

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoTokenizer

from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling
from vlmpack.images import DynamicResize, GlobalAndSplitImages, SplitImage, to_float, to_rgb
from vlmpack.packing import Assembler, PackedSequence
from vlmpack.packing import ConstantLengthDataset as PackDataset
from vlmpack.packing.dataset import pad_token_id
from vlmpack.samples import Refusal, Sample
from vlmpack.stages import RatingMinima
from vlmpack.stages import VQADataset as SampleDataset
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from PIL import Image
    from transformers import PreTrainedTokenizerBase

    from vlmpack.packing import PackingReport
    from vlmpack.packing.methods import Method
    from vlmpack.stages import OversizePolicy

logger = logging.getLogger(__name__)

_MAX_PACKS_AHEAD: Final = 8
_ROWS_FOR_LENGTH: Final = 256
_tokenizers: dict[object, PreTrainedTokenizerBase] = {}


class Item(TypedDict):
    """One sample or one pack. T tokens, tiles of P pixels a side."""

    input_ids: torch.Tensor
    """int64 [T]."""
    labels: torch.Tensor
    """int64 [T], already shifted: labels[t] is the target of position t."""
    attention_mask: torch.Tensor
    """int64 [T], 0 on padding."""
    images: list[torch.Tensor]
    """float32 [num_tiles, 3, P, P] in [0, 1] for each image."""


def get_tokenizer(
    name: str,
    extra_special_tokens: Mapping[str, str] | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, with end-of-sequence as padding; one object for the same arguments.

    Args:
        name: A folder or a hub name.
        extra_special_tokens: Attribute name to token, such as {"image_token": "<|image|>"}.
        chat_template: Instead of the tokenizer's own.
    """
    tokens = dict(extra_special_tokens or {})
    identity = (name, tuple(sorted(tokens.items())), chat_template)
    if identity not in _tokenizers:
        options: dict[str, object] = {"use_fast": True}
        if tokens:
            options["extra_special_tokens"] = tokens
        if chat_template is not None:
            options["chat_template"] = chat_template
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
        tokenizer.pad_token = tokenizer.eos_token
        _tokenizers[identity] = tokenizer
    return _tokenizers[identity]


class ImageProcessor:
    """PIL image -> (float32 [num_tiles, 3, P, P] in [0, 1], (rows, columns)).

    Args:
        max_img_size: Largest side in pixels.
        splitted_image_size: Side of a tile in pixels; must divide `max_img_size`.
        resize_to_max_side_len: Scale small images up to `max_img_size` too.

    Raises:
        ConfigError: If the tile size does not divide the largest side.
    """

    def __init__(
        self, max_img_size: int, splitted_image_size: int, resize_to_max_side_len: bool = False
    ) -> None:
        self.max_img_size = max_img_size
        self.splitted_image_size = splitted_image_size
        self.resize_to_max_side_len = resize_to_max_side_len
        self._resize = DynamicResize(splitted_image_size, max_img_size, resize_to_max_side_len)
        self._split = GlobalAndSplitImages(splitted_image_size)

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the tiles, global one first, and the grid.

        Args:
            image: Any mode.
        """
        tiles, grid = self._split(self._resize(to_rgb(image)))
        return to_float(tiles), grid

    def tiling(self, tokens_per_tile: int, *, global_tile: bool) -> Tiling:
        """Return the same rule as a `Tiling`.

        Args:
            tokens_per_tile: Image tokens a tile.
            global_tile: Whether the tokenizer has a token for the global tile.
        """
        side = self.splitted_image_size
        patch = next((size for size in (16, 14) if side % size == 0), side)
        return Tiling(
            tile_size=side,
            max_side=self.max_img_size,
            resize_to_max_side=self.resize_to_max_side_len,
            patch_size=patch,
            tokens_per_tile=tokens_per_tile,
            global_tile=global_tile,
            reference_rounding=True,
        )


def get_image_processor(
    max_img_size: int, splitted_image_size: int, resize_to_max_side_len: bool = False
) -> ImageProcessor:
    """Return the image processor; see `ImageProcessor`."""
    return ImageProcessor(max_img_size, splitted_image_size, resize_to_max_side_len)


def get_image_string(
    tokenizer: PreTrainedTokenizerBase,
    splitted_image_counts: Sequence[tuple[int, int]],
    mp_image_token_length: int,
) -> str:
    """Return the text that stands for the images of one sample.

    Args:
        tokenizer: With `image_token`, `r1c1` ... and perhaps `global_image_token`.
        splitted_image_counts: (rows, columns) of each image.
        mp_image_token_length: Image tokens a tile.

    Raises:
        ConfigError: If the tokenizer has no token for a grid this large.
    """
    tile = tokenizer.image_token * mp_image_token_length
    has_global = hasattr(tokenizer, "global_image_token")
    parts: list[str] = []
    for index, (rows, columns) in enumerate(splitted_image_counts):
        if len(splitted_image_counts) > 1:
            parts.append(f"<image: {index}>")
        if has_global:
            parts += [tokenizer.global_image_token, tile]
            if rows == columns == 1:
                continue
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                mark = getattr(tokenizer, f"r{row}c{column}", None)
                if mark is None:
                    raise ConfigError(
                        f"image {index} has {rows} x {columns} tiles but the tokenizer has no token "
                        f"r{row}c{column}; lower max_img_size or add the token"
                    )
                parts += [mark, tile]
    return "".join(parts)


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
        return None if pack is None else _item(pack)


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
            yield _item(pack)

    def __len__(self) -> int:
        """Return about how many packs a pass has, from the costs of up to 256 rows spread over the data.

        Raises:
            TypeError: For a streaming data set.
        """
        if self._length is None:
            self._length = self.packs.estimate_num_packs(max_rows=_ROWS_FOR_LENGTH)
        return self._length


class VQACollator:
    """Items -> a batch padded on the LEFT to `max_length`; longer items are discarded and counted.

    Args:
        tokenizer: Gives the padding token.
        max_length: Length of every row; the longest item's where None.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.num_discarded = 0
        """Items longer than `max_length`, in this process."""

    def __call__(self, batch: Sequence[Item | None]) -> dict[str, Any]:
        """Return input_ids, labels, attention_mask int64 [B, max_length] and images (a list a row).

        Args:
            batch: Items; None is left out. Lists are empty if nothing is left.
        """
        items = [item for item in batch if item is not None]
        limit = self.max_length
        if limit is not None:
            fitting = [item for item in items if len(item["input_ids"]) <= limit]
            if len(fitting) < len(items):
                self.num_discarded += len(items) - len(fitting)
                logger.warning("discarded %d items longer than %d tokens", len(items) - len(fitting), limit)
            items = fitting
        if not items:
            return {"input_ids": [], "labels": [], "attention_mask": [], "images": []}
        length = limit if limit is not None else max(len(item["input_ids"]) for item in items)
        pad_id = pad_token_id(self.tokenizer)

        def pad(name: str, value: int) -> torch.Tensor:
            tensors: list[torch.Tensor] = [item[name] for item in items]  # type: ignore[literal-required]
            return torch.stack([F.pad(tensor, (length - len(tensor), 0), value=value) for tensor in tensors])

        return {
            "input_ids": pad("input_ids", pad_id),
            "labels": pad("labels", IGNORE_INDEX),
            "attention_mask": pad("attention_mask", 0),
            "images": [item["images"] for item in items],
        }


def synchronized_dataloader_step(train_loader: Any, is_dist: bool) -> Iterator[Any]:
    """Yield batches until the first rank runs out, so that no rank waits for another for ever.

    Args:
        train_loader: Any iterable of batches.
        is_dist: Whether torch.distributed runs; otherwise every batch is yielded.
    """
    if not is_dist:
        yield from train_loader
        return
    from torch import distributed  # not built into every torch

    on_gpu = distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    batches = iter(train_loader)
    while True:
        batch = next(batches, None)
        ranks_with_data = torch.tensor(int(batch is not None), device=device)
        distributed.all_reduce(ranks_with_data)
        if int(ranks_with_data) < distributed.get_world_size():
            if batch is not None:
                logger.warning("another rank ran out of data; this rank leaves at least one batch unused")
            return
        yield batch


def _item(pack: PackedSequence) -> Item:
    """Return the pack in nanoVLM's form: shifted labels, float tiles."""
    labels = pack.labels.roll(-1)
    labels[-1] = IGNORE_INDEX  # the first label of each segment is masked, so no other shift leaks
    return Item(
        input_ids=pack.input_ids,
        labels=labels,
        attention_mask=(pack.segment_ids != 0).to(torch.int64),
        images=[to_float(tiles) for tiles in torch.split(pack.tiles, list(pack.tiles_per_image))],
    )


__all__ = [
    "ConstantLengthDataset",
    "DynamicResize",
    "GlobalAndSplitImages",
    "ImageProcessor",
    "Item",
    "SplitImage",
    "VQACollator",
    "VQADataset",
    "get_image_processor",
    "get_image_string",
    "get_tokenizer",
    "synchronized_dataloader_step",
]
