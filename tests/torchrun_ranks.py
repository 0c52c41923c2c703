"""What each rank runs under torchrun in tests/unit/ranks/test_processes.py: CASES, FOLDER for results."""

from __future__ import annotations

import json
import os
import signal
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from tests.fakes import row, samples_of, tokenizer
from vlmpack.collate import VQACollator
from vlmpack.packing import ConstantLengthDataset
from vlmpack.ranks import EvenRanks, PackLoader

if TYPE_CHECKING:
    from collections.abc import Iterator

LENGTH = 64
NUM_ROWS = 61
NUM_EPOCHS = 2
CHECKPOINT_EVERY = 3
KILLED_AFTER = 5
"""Steps, of which the latest checkpoint has three: two are lost, and done again."""
UNEVEN = (17, 5, 0, 9)
"""Rows of each shard; the first as many as there are ranks."""


def text_row(number: int) -> dict:
    return row("Why? " * (1 + number % 4), "Yes. " * (1 + number % 7)) | {"key": str(number)}


def collator() -> VQACollator:
    return VQACollator(tokenizer(), LENGTH)


def packs_of(dataset: object) -> ConstantLengthDataset:
    return ConstantLengthDataset(samples_of(dataset, key_column="key"), seq_length=LENGTH, decode=False)


def made_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50)).double()


def loss_sum(model: nn.Module, batch: dict) -> torch.Tensor:
    labels = batch["labels"][:, 1:].flatten()
    labels = torch.where(labels == -100, -100, labels % 50)
    logits = model(batch["input_ids"] % 50)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def keys_of(batch: dict) -> list[str]:
    return [key for pack in batch["keys"] for key in pack]


def gathered(value: object) -> list:
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def pack_loader(rank: int, world_size: int, batch_size: int = 1) -> PackLoader:
    packs = packs_of([text_row(number) for number in range(NUM_ROWS)]).index()
    return PackLoader(
        packs,
        batch_size=batch_size,
        collate_fn=collator(),
        rank=rank,
        world_size=world_size,
        balance="attention",
    )


def index() -> object:
    """Return the keys of each batch of this rank."""
    return [keys_of(batch) for batch in pack_loader(dist.get_rank(), dist.get_world_size(), 2)]


def generated(sizes: list[tuple[int, int]]) -> Iterator[dict]:
    for start, size in sizes:
        for number in range(start, start + size):
            yield text_row(number)


def stream() -> object:
    """Return the keys of each batch, whether it is empty, and how far gradients are from one process's."""
    world_size = dist.get_world_size()
    starts = [sum(UNEVEN[:shard]) for shard in range(world_size)]
    shards = list(zip(starts, UNEVEN, strict=False))
    whole = IterableDataset.from_generator(generated, gen_kwargs={"sizes": shards})
    part = split_dataset_by_node(whole, dist.get_rank(), world_size)
    loader = DataLoader(packs_of(part), batch_size=1, collate_fn=collator())
    model, alone = DistributedDataParallel(made_model()), made_model()
    ranks = EvenRanks(loader)
    keys, empty, differences = [], [], []
    for batch in ranks:
        model.zero_grad()
        (loss_sum(model, batch) * ranks.loss_scale).backward()
        batches = [other for other, is_empty in gathered((batch, ranks.is_empty)) if not is_empty]
        alone.zero_grad()
        num_tokens = sum(int((other["labels"] != -100).sum()) for other in batches)
        (sum(loss_sum(alone, other) for other in batches) / num_tokens).backward()
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        differences.append(max(float((ours.grad - theirs.grad).abs().max()) for ours, theirs in pairs))
        keys.append(keys_of(batch))
        empty.append(ranks.is_empty)
    return {"keys": keys, "empty": empty, "difference": max(differences)}


def train() -> object:
    """Train for some epochs from the last checkpoint; one rank kills itself once. Return what was trained."""
    folder, rank = Path(sys.argv[2]), dist.get_rank()
    checkpoint = folder / "checkpoint.pt"
    loader, model = pack_loader(rank, dist.get_world_size()), made_model()
    done: list[list] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        loader.load_state_dict(saved["loader"])
        model.load_state_dict(saved["model"])
        done = saved["done"]
    parallel = DistributedDataParallel(model)
    while (epoch := loader.state_dict()["epoch"]) < NUM_EPOCHS:
        for batch in loader:
            parallel.zero_grad()
            (loss_sum(parallel, batch) * dist.get_world_size() / LENGTH).backward()
            descend(parallel)
            done.append([epoch, *chain.from_iterable(gathered(keys_of(batch)))])
            if rank == 0 and len(done) % CHECKPOINT_EVERY == 0:
                saved = {"loader": loader.state_dict(), "model": model.state_dict(), "done": done}
                torch.save(saved, f"{checkpoint}.new")
                os.replace(f"{checkpoint}.new", checkpoint)
            dist.barrier()
            is_first_life = not (folder / "killed").exists()
            if is_first_life and rank == 1 and len(done) == KILLED_AFTER:
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
    return {"done": done, "weights": [parameter.tolist() for parameter in model.parameters()]}


def descend(model: nn.Module) -> None:
    """Take a step of gradient descent."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad


def main() -> None:
    dist.init_process_group("gloo")
    results = {case: globals()[case]() for case in sys.argv[1].split(",")}
    Path(sys.argv[2], f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
