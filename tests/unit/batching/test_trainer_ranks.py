"""Two gloo ranks: one runs out of memory, the other waits; the gradient is that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.toy_training import relative, weights
from tests.unit.batching.rank_worker import Branches, scenario

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
NAMES = ("plain", "single", "mean", "weights", "sample", "branches", "pcgrad", "gradnorm", "resume", "bug")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Run every scenario on two ranks, in one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "-m", "tests.unit.batching.rank_worker", str(folder), ",".join(NAMES)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert (folder / "found-1.json").exists(), done.stderr[-3000:]
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]
    return folder, found


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bug"])
def test_two_ranks_train_as_one_process_does(two_ranks, tmp_path, name):
    folder, found = two_ranks
    first, second = (torch.load(folder / f"{name}-{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)  # ranks never drift apart
    alone = scenario(name, tmp_path)
    gradient = torch.load(folder / f"{name}-gradient-1.pt")
    bound = 1e-6 if name == "single" else 1e-12
    assert relative(gradient, alone.gradient) < bound
    assert relative(first, weights(alone.model)) < bound
    assert found[1][name]["num_ooms"] > 0
    if name not in {"weights", "sample", "resume"}:
        assert found[0][name]["num_ooms"] == 0  # only one rank failed, and nothing hung


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bug"])
def test_every_sample_is_trained_once_an_epoch_over_both_ranks(two_ranks, name):
    _, found = two_ranks
    steps = [first + second for first, second in zip(*(each[name]["trained"] for each in found), strict=True)]
    assert len(steps) == 6  # 17 samples in steps of 8, twice
    assert found[1][name]["trained"][2] == []  # one sample is left, and the second rank has none
    assert Counter(key for step in steps for key in step) == Counter({f"s{index}": 2 for index in range(17)})


def test_a_resumed_run_ends_with_the_same_bits_on_two_ranks(two_ranks):
    folder, found = two_ranks
    for rank in range(2):
        whole, rest = (torch.load(folder / f"{name}-{rank}.pt") for name in ("resume", "resumed"))
        assert torch.equal(whole, rest)
        assert found[rank]["resumed"]["trained"] == found[rank]["resume"]["trained"][2:]


def test_a_parameter_that_one_rank_reached_counts_and_one_that_none_did_does_not(two_ranks):
    folder, _ = two_ranks
    model = Branches()
    before = weights(model)
    after = torch.load(folder / "branches-0.pt")
    sizes = [parameter.numel() for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    changed = {
        name: not torch.equal(old, new)
        for name, old, new in zip(names, before.split(sizes), after.split(sizes), strict=True)
    }
    assert changed["second.weight"]
    assert not changed["unused.weight"]


def test_an_error_on_one_rank_ends_the_other_with_a_reason(two_ranks):
    _, found = two_ranks
    assert found[1]["bug"]["error"] == 'KeyError: "a bug in rank 1\'s data"'
    assert found[0]["bug"]["error"].startswith("StepRefusedError: another rank could not collate its part")
