"""`VQACollator` and `synchronized_dataloader_step` with nanoVLM's signatures."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from vlmpack.packing.dataset import pad_token_id
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
