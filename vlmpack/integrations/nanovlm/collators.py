"""`VQACollator` and `synchronized_dataloader_step` with nanoVLM's signatures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from vlmpack.errors import SourceError
from vlmpack.packing.pad_token import pad_token_id
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from vlmpack.integrations.nanovlm.items import Item

logger = logging.getLogger(__name__)


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

    A batch that the collator left empty is left out. On several ranks so is one without images: its rank
    would have no gradient for the vision encoder, and the others would wait for it. Both are logged.

    Args:
        train_loader: Any iterable of batches.
        is_dist: Whether torch.distributed runs; otherwise the end of the data is the end.

    Raises:
        SourceError: If another rank's data failed; that rank raises its own error.
        Exception: Whatever this rank's data raised, after the other ranks were told.
    """
    batches = _usable(train_loader, needs_images=is_dist)
    if not is_dist:
        yield from batches
        return
    while True:
        failure: Exception | None = None
        batch = None
        try:
            batch = next(batches, None)
        except Exception as error:
            failure = error
        ranks_with_data, world_size = _agree(batch is not None, failed=failure is not None)
        if failure is not None:
            raise failure
        if ranks_with_data < 0:
            raise SourceError("the data of another rank failed, see its log; this rank stops with it")
        if ranks_with_data < world_size:
            if batch is not None:
                logger.warning("another rank ran out of data; this rank leaves at least one batch unused")
            return
        yield batch


def _agree(has_data: bool, *, failed: bool) -> tuple[int, int]:
    """Return how many ranks have data, negative if one failed, and how many ranks there are."""
    from torch import distributed  # not built into every torch

    on_gpu = distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    world_size = distributed.get_world_size()
    ranks_with_data = torch.tensor(-world_size if failed else int(has_data), device=device)
    distributed.all_reduce(ranks_with_data)
    return int(ranks_with_data), world_size


def _usable(loader: Any, *, needs_images: bool) -> Iterator[Any]:
    num_left_out = 0
    for batch in loader:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            fault = ""  # not of our collator: nothing can be said about it
        elif not len(batch["input_ids"]):
            fault = "it is empty, every item was longer than the collator's max_length"
        elif needs_images and not any(batch.get("images", ())):
            fault = "it is without images, for which the other ranks would wait"
        else:
            fault = ""
        if fault:
            num_left_out += 1
            logger.warning("batch left out (%d so far): %s", num_left_out, fault)
        else:
            yield batch
