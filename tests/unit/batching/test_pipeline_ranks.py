"""Two ranks, balanced tasks, OOMs on one of them: the weights of one process."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from tests.toy_training import Causal, Texts, collate, memory_of, weights
from tests.unit.batching.test_pipeline import config_of
from vlmpack.batching import DynamicBatchingMonitor, DynamicBatchingTrainingPipeline, OOMSimulator

SETTINGS = {"gradient_surgery": "gradvac", "balance_rule": "gradnorm", "num_epochs": 1}


def data():
    """Texts in random steps: steps that are made by memory depend on the limit, which two ranks double."""
    return Texts(24, tasks=("T1", "T2", "T3", "T1"))


def rank_main(rank, port, folder):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    model = Causal()
    config = config_of(folder / "run", base_batch_size=2, **SETTINGS)  # 2 ranks x 2 x 2: steps of 8
    pipeline = DynamicBatchingTrainingPipeline(config, model, collator=collate, quiet=True)
    trainer = pipeline.build_trainer(data())
    simulator = OOMSimulator(memory_of, limit_bytes=220.0 if rank else float("inf"))
    with simulator.attached(model):
        trainer.train()
    if rank:
        assert simulator.num_ooms > 0
    torch.save(weights(model), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_ranks_train_as_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, (port, tmp_path), nprocs=2)
    model = Causal()
    pipeline = DynamicBatchingTrainingPipeline(
        config_of(tmp_path / "one", base_batch_size=4, **SETTINGS), model, collator=collate, quiet=True
    )
    pipeline.train(data())
    want = weights(model)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert ((got - want).norm() / want.norm()).item() < 1e-12
    recorded = DynamicBatchingMonitor.load(tmp_path / "run" / "metrics.jsonl")
    assert [each.num_samples for each in recorded.batches] == [8, 8, 8]
    assert sum(each.num_ooms for each in recorded.batches) > 0  # of the other rank
    for one, two in zip(pipeline.monitor.batches, recorded.batches, strict=True):
        assert two.task_types == one.task_types
        assert two.loss == pytest.approx(one.loss, rel=1e-12)
        assert two.task_losses == pytest.approx(one.task_losses, rel=1e-12)
        assert two.task_weights == pytest.approx(one.task_weights, rel=1e-9)
