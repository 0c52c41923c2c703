"""Together: the few things that ranks tell each other."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from vlmpack.errors import ConfigError
from vlmpack.ranks import EvenRanks, PackLoader
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from accelerate import Accelerator
    from transformers import TrainingArguments


def add_over_ranks(
    numbers: Sequence[float], args: TrainingArguments, accelerator: Accelerator
) -> list[float]:
    """Return the sums over ranks, in float64. One collective, none on one rank.

    Args:
        numbers: As many on every rank.
        args: The number of ranks.
        accelerator: Communicates.
    """
    if args.world_size == 1:
        return list(numbers)
    mine = torch.tensor([list(numbers)], dtype=torch.float64, device=args.device)
    total: list[float] = accelerator.gather(mine).sum(dim=0).tolist()
    return total


def check_own_data(batch: Mapping[str, Any], args: TrainingArguments) -> None:
    """Check, by their first batches, that ranks do not all read the same data. One collective.

    Args:
        batch: This rank's first.
        args: The number of ranks.

    Raises:
        ConfigError: On every rank, if two of them have the same batch.
    """
    if args.world_size == 1:
        return
    digest = f"rank {args.process_index} has none yet"  # EvenRanks fills in for it
    if (batch["labels"] != IGNORE_INDEX).any():
        digest = hashlib.sha256(batch["input_ids"].cpu().numpy().tobytes()).hexdigest()
    digests = gather_object([digest])
    if len(set(digests)) < len(digests):
        raise ConfigError(
            f"{len(digests)} ranks began with {len(set(digests))} different batches, so they read the same "
            "data: give the trainer packs by index (ConstantLengthDataset.index), or split the data before "
            "it is packed (datasets.distributed.split_dataset_by_node)"
        )


def check_even_evaluation(loader: Any, args: TrainingArguments) -> None:
    """Check that ranks will have as many batches in an evaluation; they wait for each other in each.

    Args:
        loader: Of this rank.
        args: The number of ranks.

    Raises:
        ConfigError: If nobody can know.
    """
    if args.world_size > 1 and not isinstance(loader, (PackLoader, EvenRanks)):
        raise ConfigError(
            f"evaluation on {args.world_size} ranks needs as many batches on each, or it hangs; nobody knows "
            f"that of a {type(loader).__name__}. Give packs by index (eval_dataset=packs.index()), or wrap "
            "the loader in EvenRanks"
        )
