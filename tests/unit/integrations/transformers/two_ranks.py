"""Training on two ranks over gloo, each scenario in two forked processes; results go to a JSON file.

python -m tests.unit.integrations.transformers.two_ranks RESULTS.json FOLDER

Run as a program of its own, since forking is safe only before torch has started threads.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import SFTConfig

from tests.family_models import tokenizer_of
from tests.tiny_models import collator, fresh, packs, rows
from tests.unit.integrations.transformers.runs import (
    Gradients,
    Without,
    arguments,
    losses,
    train,
    weights_of,
)
from vlmpack.integrations.trl import PackedSFTTrainer
from vlmpack.ranks import EvenRanks, PackLoader

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_S = 100
PATIENCE_S = 15
DATA = packs().index()
STEPS = {"gradient_accumulation_steps": 1, "max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-2}
"""11 packs are made 12; 2 ranks x 2 packs a step: 3 steps an epoch."""


def ours(folder: Path, rank: int) -> dict[str, Any]:
    """Two epochs; each rank's samples, the gradients, which DDP has averaged, and an evaluation."""
    results = {}
    for rule in ("token", "sample", "sqrt"):
        trainer, gradients = train(
            folder / rule,
            fresh(),
            DATA,
            collator(dummy_image=True),
            loss_weighting=rule,
            eval_dataset=DATA,
            ddp_find_unused_parameters=False,
            **{**STEPS, "num_train_epochs": 1},
        )
        torch.save(gradients[0], folder / f"gradient_{rule}_{rank}.pt")
        results[rule] = {
            "keys": trainer.keys,
            "losses": losses(trainer),
            "counts": trainer.counts.as_list(),
            "eval_loss": trainer.evaluate()["eval_loss"],
        }
    return results


def sft(folder: Path, rank: int) -> dict[str, Any]:
    """One step with TRL's trainer."""
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    gradients = Gradients()
    settings = arguments(folder).to_dict()
    names = ("max_steps", "optim", "learning_rate", "lr_scheduler_type", "max_grad_norm", "report_to")
    trainer = PackedSFTTrainer(
        fresh(),
        SFTConfig(
            str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            save_strategy="no",
            per_device_train_batch_size=2,
            **{name: settings[name] for name in names},
        ),
        train_dataset=DATA,
        data_collator=collator(dummy_image=True),
        processing_class=tokenizer_of("smolvlm"),
        callbacks=[gradients],
    )
    trainer.train()
    torch.save(gradients.steps[0], folder / f"gradient_{rank}.pt")
    return {}


def resumed(folder: Path, rank: int) -> dict[str, Any]:
    """The same run with a checkpoint, and again from there."""
    settings = {**STEPS, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
    whole, _ = train(
        folder / "whole", fresh(), DATA, collator(), save_strategy="steps", save_steps=2, **settings
    )
    again, _ = train(
        folder / "again", fresh(), DATA, collator(), resume=str(folder / "whole" / "checkpoint-2"), **settings
    )
    return {
        "keys": whole.keys,
        "keys_again": again.keys,
        "equal": bool(torch.equal(weights_of(whole.model), weights_of(again.model))),
        "losses": losses(whole),
        "losses_again": losses(again),
    }


def streams(folder: Path, rank: int) -> dict[str, Any]:
    """Each rank has its own rows, of different number: the ranks' passes end at different steps."""
    mine = [row for number, row in enumerate(rows()) if (number % 3 == 0) == (rank == 0)]
    trainer, _ = train(folder, fresh(), packs(data=mine), collator(dummy_image=True), max_steps=7)
    return {"steps": trainer.state.global_step, "keys": trainer.keys}


def even_streams(folder: Path, rank: int) -> dict[str, Any]:
    """The same wrapped in EvenRanks: passes end together; and an evaluation."""
    mine = [row for number, row in enumerate(rows()) if (number % 3 == 0) == (rank == 0)]
    weighing = collator(dummy_image=True, loss_weighting="token")

    def loader() -> EvenRanks[Any]:
        return EvenRanks(DataLoader(packs(data=mine), batch_size=2, collate_fn=weighing))

    trainer, _ = train(folder, fresh(), loader(), weighing, eval_dataset=loader(), max_steps=5)
    return {
        "counts": trainer.counts.as_list(),
        "keys": trainer.keys,
        "eval_loss": trainer.evaluate()["eval_loss"],
    }


def same_stream(folder: Path, rank: int) -> None:
    """Nobody split the data."""
    train(folder, fresh(), packs(), collator(), max_steps=2)


def uneven_evaluation(folder: Path, rank: int) -> None:
    """A stream may have other numbers of batches on each rank."""
    trainer, _ = train(folder, fresh(), DATA, collator(), eval_dataset=packs())
    trainer.evaluate()


def wrong_rank(folder: Path, rank: int) -> None:
    """A loader that was made without saying which rank it is for."""
    train(folder, fresh(), PackLoader(DATA, batch_size=2, collate_fn=collator(loss_weighting="token")), None)


def plain_dispatch(folder: Path, rank: int) -> None:
    """Plain Trainer, an iterable data set, default settings; the ranks' tensors differ in size."""
    numbers = ("use_cache", "max_length_q", "max_length_k")  # these alone it would refuse as well
    _plain(folder, packs(), Without(collator(), *numbers), remove_unused_columns=False)


def plain_shards(folder: Path, rank: int) -> dict[str, Any]:
    """Plain Trainer without the dispatcher: each rank reads everything."""
    data = packs()
    read: list[tuple[str, ...]] = []
    _plain(
        folder,
        _Reads(data, read),
        collator(),
        remove_unused_columns=False,
        max_steps=3,
        accelerator_config={"dispatch_batches": False},
    )
    return {"read": read}


def plain_means(folder: Path, rank: int) -> dict[str, Any]:
    """Plain Trainer without a global count: the mean of the ranks' means."""
    _, gradients = _plain(
        folder,
        None,
        None,
        loader=_mine(rank),
        average_tokens_across_devices=False,
        max_steps=1,
    )
    torch.save(gradients[0], folder / f"gradient_{rank}.pt")
    return {}


def plain_uneven(folder: Path, rank: int) -> None:
    """Plain Trainer, each rank its own loader, of 3 and of 2 batches: the first waits for ever."""
    batches = list(_mine(rank))[: 3 - rank]
    loader = DataLoader(batches, batch_size=None, collate_fn=dict)
    _plain(folder, None, None, loader=loader, max_steps=-1, num_train_epochs=1)


def _mine(rank: int) -> PackLoader:
    return PackLoader(DATA, batch_size=2, collate_fn=collator(), rank=rank, world_size=2, seed=42)


class _Reads(torch.utils.data.IterableDataset[Any]):
    """Writes down which packs are read."""

    def __init__(self, data: Any, read: list[tuple[str, ...]]) -> None:
        self.data, self.read = data, read

    def __iter__(self) -> Any:
        for pack in self.data:
            self.read.append(pack.keys)
            yield pack


def _plain(folder: Path, data: Any, collate: Any, *, loader: Any = None, **settings: Any) -> Any:
    gradients = Gradients()

    class Plain(Trainer):
        def get_train_dataloader(self) -> Any:
            return super().get_train_dataloader() if loader is None else loader

    trainer = Plain(
        fresh(),
        arguments(folder, **settings),
        train_dataset=data or [0],
        data_collator=collate,
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients.steps


SCENARIOS = [
    ours,
    sft,
    resumed,
    streams,
    even_streams,
    same_stream,
    uneven_evaluation,
    wrong_rank,
    plain_dispatch,
    plain_shards,
    plain_means,
    plain_uneven,
]


def on_two_ranks(scenario: Callable[[Path, int], Any], folder: Path) -> list[dict[str, Any]]:
    """Return what each rank says: {"result": ...}, {"error": ...} or {"hangs": True}."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(scenario, folder, rank, port)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    paths = [folder / f"rank_{rank}.json" for rank in (0, 1)]
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and not all(path.exists() for path in paths):
        if any(path.exists() for path in paths):  # what one has finished the other finishes soon
            deadline = min(deadline, time.monotonic() + PATIENCE_S)
        time.sleep(0.1)
    for process in ranks:
        process.kill()
        process.join()
    return [json.loads(path.read_text()) if path.exists() else {"hangs": True} for path in paths]


def _rank(scenario: Callable[[Path, int], Any], folder: Path, rank: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        said = {"result": scenario(folder, rank)}
    except Exception as error:
        said = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    draft = folder / f"draft_{rank}.json"
    draft.write_text(json.dumps(said))
    draft.rename(folder / f"rank_{rank}.json")
    time.sleep(TIMEOUT_S)  # ends by being killed: closing its connections would wake a rank that waits


def main() -> None:
    results, folder = Path(sys.argv[1]), Path(sys.argv[2])
    wanted = sys.argv[3:] or [scenario.__name__ for scenario in SCENARIOS]
    torch.set_num_threads(1)
    said = {
        scenario.__name__: on_two_ranks(scenario, folder / scenario.__name__)
        for scenario in SCENARIOS
        if scenario.__name__ in wanted
    }
    results.write_text(json.dumps(said))


if __name__ == "__main__":
    main()
