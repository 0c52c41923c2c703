"""Trains on one of two ranks; started by test_trainer_ranks.py through torchrun. Writes what it saw."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from tests.toy_training import VOCAB, Causal, MeanLoss, Texts, arguments, collate, memory_of, weights
from vlmpack.batching import DynamicBatchingTrainer, GradNormBalancer, MemoryFault, OOMSimulator, PCGrad
from vlmpack.batching.task_gradients import TaskBalancing, TaskGradients
from vlmpack.errors import VlmpackError

TASKS = ("T1", "T2", "T3")


class Branches(Causal):
    """A branch that only samples of T2 reach, and one that nobody reaches."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.second = torch.nn.Linear(VOCAB, VOCAB, dtype=torch.float64)
        self.unused = torch.nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, input_ids, labels=None, is_second=None, num_items_in_batch=None, **kwargs):
        output = super().forward(input_ids)
        logits = output["logits"]
        if is_second is not None and is_second.any():
            logits = logits + self.second(logits) * is_second[:, None, None]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        return {"loss": losses / num_items_in_batch, "logits": logits}


def collate_branches(samples):
    return {
        **collate(samples),
        "is_second": torch.tensor([sample["task_type"] == "T2" for sample in samples]),
    }


def collate_only_here(samples):
    """Fails on the second rank."""
    if os.environ.get("RANK") == "1":
        raise KeyError("a bug in rank 1's data")
    return collate(samples)


class Recording(DynamicBatchingTrainer):
    """Notes which samples' gradients each step was made of, and the first step's gradient."""

    def _finish(self, step, inputs, report):
        if not self.state.global_step:
            found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.model.parameters()]
            self.gradient = torch.cat([each.flatten() for each in found])
        self.trained = [
            *getattr(self, "trained", []),
            sorted(shape.key for _, part in step.losses for shape in part.shapes),
        ]
        return super()._finish(step, inputs, report)


def balancing_for(model, kind: str) -> TaskBalancing:
    gradients = TaskGradients(model.parameters(), TASKS)
    if kind == "pcgrad":
        return TaskBalancing(gradients, surgery=PCGrad(seed=1))
    return TaskBalancing(gradients, balancer=GradNormBalancer(TASKS))


def scenario(name: str, folder: Path, resume: str | None = None) -> DynamicBatchingTrainer:
    """Return the trainer after one run."""
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    more: dict = {"num_train_epochs": 2, "per_device_train_batch_size": 8 // world}
    own: dict = {"data_collator": collate}
    model: torch.nn.Module = Causal()
    faults = [MemoryFault(call=call, phase="backward") for call in (0, 2, 5)] if rank == world - 1 else []
    limit = float("inf")
    if name == "mean":
        model, more["average_tokens_across_devices"] = MeanLoss(), False
    if name == "single":
        model = Causal(dtype=torch.float32)
    if name in {"weights", "sample"}:
        own |= {"task_loss_weights": {"T1": 0.5, "T2": 2.0, "T3": 1.0}}
        own |= {"loss": "sample"} if name == "sample" else {}
        limit = 250.0
    if name == "branches":
        model, own["data_collator"] = Branches(), collate_branches
        more["remove_unused_columns"] = False  # the collator wants the task
    if name in {"pcgrad", "gradnorm"}:
        own["balancing"] = balancing_for(model, name)
    if name == "bug":
        own["data_collator"] = collate_only_here
    if name in {"resume", "resumed"}:
        more |= {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 1.0}
        faults, limit = [], 200.0
    tasks = TASKS if name not in {"plain", "single", "mean"} else ("T1",)
    trainer = Recording(
        model,
        arguments(folder, ddp_backend="gloo" if world > 1 else None, **more),
        train_dataset=Texts(17, tasks=tasks, seed=4),  # the last step of an epoch has one sample
        **own,
    )
    with OOMSimulator(memory_of, limit_bytes=limit, faults=faults, phase="backward").attached(model):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(folder: Path, names: list[str]) -> None:
    rank = os.environ["RANK"]
    found: dict = {}
    for name in names:
        try:
            trainer = scenario(name, folder / name)
        except (VlmpackError, KeyError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        found[name] = {
            "trained": trainer.trained,
            "num_ooms": trainer.guardian.num_ooms,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }
        torch.save(weights(trainer.model), folder / f"{name}-{rank}.pt")
        torch.save(trainer.gradient, folder / f"{name}-gradient-{rank}.pt")
        if name == "resume":
            began = time.perf_counter()
            again = scenario("resumed", folder / "again", str(folder / name / "checkpoint-2"))
            torch.save(weights(again.model), folder / f"resumed-{rank}.pt")
            found["resumed"] = {"trained": again.trained, "seconds": time.perf_counter() - began}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
