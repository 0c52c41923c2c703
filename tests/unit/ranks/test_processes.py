"""Ranks as processes under torchrun, over gloo: what they share, and what a killed one costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

from tests.torchrun_ranks import (
    KILLED_AFTER,
    LENGTH,
    NUM_EPOCHS,
    NUM_ROWS,
    UNEVEN,
    descend,
    keys_of,
    loss_sum,
    made_model,
    pack_loader,
)

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 100


def torchrun(num_ranks: int, cases: str, folder: Path, *options: str) -> tuple[int, str]:
    """Run the cases on so many ranks; return the exit status and what torchrun said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "NUMBA_DISABLE_JIT": "1",  # compiling takes longer than all that these ranks pack
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [*command, *options, "-m", "tests.torchrun_ranks", cases, str(folder)],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f"the ranks hang: {said[-2000:]}")
    return process.returncode, said


def results(num_ranks: int, folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_nothing_is_lost_and_gradients_are_those_of_one_process(num_ranks, tmp_path):
    status, said = torchrun(num_ranks, "index,stream", tmp_path)
    assert status == 0, said[-2000:]
    ranks = results(num_ranks, tmp_path)

    indexed = [rank["index"] for rank in ranks]
    assert len({len(batches) for batches in indexed}) == 1
    assert sorted(int(key) for rank in indexed for keys in rank for key in keys) == list(range(NUM_ROWS))

    # The shards have 17 and 5 rows, with four ranks also 0 and 9: the rank with 17 is the last to end.
    streams = [rank["stream"] for rank in ranks]
    assert len({len(stream["keys"]) for stream in streams}) == 1
    for rank, stream in enumerate(streams):
        first = sum(UNEVEN[:rank])
        found = sorted(int(key) for keys in stream["keys"] for key in keys)
        assert found == list(range(first, first + UNEVEN[rank]))
        assert any(stream["empty"]) == (rank > 0)
        assert stream["difference"] < 1e-12
    if num_ranks == 4:
        assert all(streams[2]["empty"])


def uninterrupted(world_size: int) -> tuple[list, list]:
    """Return what each step trains, and the weights at the end, from loaders side by side in one process."""
    loaders = [pack_loader(rank, world_size) for rank in range(world_size)]
    model, done = made_model(), []
    for epoch in range(NUM_EPOCHS):
        for batches in zip(*loaders, strict=True):
            model.zero_grad()
            (sum(loss_sum(model, batch) for batch in batches) / LENGTH).backward()
            descend(model)
            done.append([epoch, *chain.from_iterable(map(keys_of, batches))])
    return done, list(model.parameters())


def assert_each_sample_was_trained_once_an_epoch(done: list) -> None:
    for epoch in range(NUM_EPOCHS):
        keys = [key for step, *trained in done for key in trained if step == epoch]
        assert sorted(map(int, keys)) == list(range(NUM_ROWS))


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """Return the folder of a run on two ranks of which one killed itself, two steps behind the checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    status, said = torchrun(2, "train", folder)
    assert status != 0
    assert (folder / "killed").exists(), said[-2000:]
    assert (folder / "checkpoint.pt").exists()
    return folder


# A new torchrun, and not its --max-restarts: with gloo and torch 2.13 the second life of a rank at times
# reads its first life's addresses out of the store, and cannot connect.
@pytest.mark.slow
def test_a_rank_that_is_killed_and_restarted_changes_nothing(killed, tmp_path):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    status, said = torchrun(2, "train", tmp_path)
    assert status == 0, said[-2000:]
    done, weights = uninterrupted(2)
    assert len(done) > 2 * KILLED_AFTER
    assert_each_sample_was_trained_once_an_epoch(done)
    for rank in results(2, tmp_path):
        assert rank["train"]["done"] == done
        for ours, theirs in zip(rank["train"]["weights"], weights, strict=True):
            assert torch.allclose(torch.tensor(ours, dtype=torch.float64), theirs, atol=1e-12, rtol=0)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_twice_the_ranks(killed, tmp_path):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    status, said = torchrun(4, "train", tmp_path)
    assert status == 0, said[-2000:]
    done = results(4, tmp_path)[0]["train"]["done"]
    assert_each_sample_was_trained_once_an_epoch(done)
