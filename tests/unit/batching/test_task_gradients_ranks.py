"""Two ranks with different tasks give the gradient, weights and projections of one process."""

from __future__ import annotations

import os
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.unit.batching.test_task_gradients import Net, balancing, step_of
from vlmpack.batching import PCGrad


def gradients(model, rows):
    balanced, data = balancing(model, PCGrad(seed=5), "legacy"), step_of()
    for step in range(2):
        model.zero_grad()
        balanced.begin_step()
        if rows:
            balanced.backward(model.losses(*data, rows))
        balanced.finish_step(step)
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return flat, balanced.balancer.weights


def rank_main(rank, port, shares, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    flat, weights = gradients(Net(), shares[rank])
    with open(folder / f"{rank}.pkl", "wb") as file:
        pickle.dump((flat.tolist(), weights), file)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("only_t1", [False, True])
def test_two_ranks_equal_one_process(tmp_path, only_t1):
    # rows take the tasks in turn: T1, T2, T3, T1, ...
    first = [row for row in range(24) if row % 3 == 0] if only_t1 else list(range(7))
    shares = [first, [row for row in range(24) if row not in first]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, (port, shares, tmp_path), nprocs=2)
    flat, weights = gradients(Net(), list(range(24)))
    for rank in range(2):
        with open(tmp_path / f"{rank}.pkl", "rb") as file:
            got, their_weights = pickle.load(file)  # noqa: S301  # written above
        assert ((torch.tensor(got, dtype=torch.float64) - flat).norm() / flat.norm()).item() < 1e-12
        assert their_weights == pytest.approx(weights, rel=1e-12)
