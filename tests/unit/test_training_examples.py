"""The training examples: the loss falls on one rank and on two, and resuming changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
)


def run(script, output, *options, launcher=()):
    """Return what the script says at its end; it must succeed."""
    # Compiling the kernels would take longer than all that is trained here.
    surroundings = {**os.environ, "NUMBA_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, EXAMPLES / script, "--output", output, *options],
        capture_output=True,
        text=True,
        check=False,
        env=surroundings,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "loss " in line and " -> " in line]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("script", ["train_smolvlm.py", "train_qwen_vl.py"])
def test_one_rank_and_resumed_in_the_middle(script, tmp_path):
    said = run(script, tmp_path / "whole")
    again = run(script, tmp_path / "again", "--resume", tmp_path / "whole" / "checkpoint-6")
    assert said
    assert again == said
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


@pytest.mark.parametrize("script", ["train_smolvlm.py", "train_qwen_vl.py"])
def test_two_ranks(script, tmp_path):
    """Resuming on two ranks is tested, without a launcher, in integrations/transformers/test_two_ranks.py."""
    assert run(script, tmp_path, launcher=(*TORCHRUN, "127.0.0.1:0"))
