"""Two ranks train as one does; and what plain Trainer does on two ranks. See two_ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from tests.tiny_models import collator, fresh, packs, rows
from tests.unit.integrations.transformers.runs import losses, train
from vlmpack.families.batch import DUMMY_KEY

pytestmark = pytest.mark.slow
NAMES = sorted(map(str, range(len(rows()))))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each rank said in each scenario, and the folder that they wrote into."""
    folder = tmp_path_factory.mktemp("ranks")
    results = folder / "results.json"
    program = [sys.executable, "-m", "tests.unit.integrations.transformers.two_ranks", results, folder]
    # Compiling the kernels would take longer than interpreting them on 27 rows.
    surroundings = {**os.environ, "NUMBA_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=surroundings)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(results.read_text())


def results(said, scenario):
    """Return what both ranks came to."""
    ranks = said[1][scenario]
    assert all("result" in rank for rank in ranks), ranks
    return [rank["result"] for rank in ranks]


def error(said, scenario):
    """Return why the first rank stopped; the other must have stopped too."""
    ranks = said[1][scenario]
    assert all("error" in rank for rank in ranks), ranks
    return ranks[0]["error"]


@pytest.mark.parametrize("rule", ["token", "sample", "sqrt"])
def test_a_step_on_two_ranks_is_the_step_on_one(rule, said, tmp_path):
    """The first step has 4 packs, 2 a rank; the one rank has 4 in one batch."""
    first, second = (rank[rule] for rank in results(said, "ours"))
    one, gradients = train(
        tmp_path, fresh(), packs().index(), collator(), loss_weighting=rule, per_device_train_batch_size=4
    )
    assert sorted(one.keys[0]) == sorted(first["keys"][0] + second["keys"][0])
    for rank in (0, 1):
        gradient = torch.load(said[0] / "ours" / f"gradient_{rule}_{rank}.pt")
        assert float((gradient - gradients[0]).abs().max()) < 1e-5
    assert first["losses"][0] == second["losses"][0] == pytest.approx(losses(one)[0], abs=1e-5)


def test_a_step_of_trl_on_two_ranks_is_that_of_packed_trainer(said):
    results(said, "sft")
    expected = torch.load(said[0] / "ours" / "gradient_token_0.pt")
    for rank in (0, 1):
        gradient = torch.load(said[0] / "sft" / f"gradient_{rank}.pt")
        assert float((gradient - expected).abs().max()) < 1e-5


def test_two_ranks_train_on_every_sample_once_an_epoch(said):
    ranks = results(said, "ours")
    assert sorted(key for rank in ranks for step in rank["token"]["keys"] for key in step) == NAMES
    assert [len(rank["token"]["keys"]) for rank in ranks] == [3, 3]
    assert ranks[0]["token"]["counts"] == ranks[1]["token"]["counts"]
    assert ranks[0]["token"]["counts"][0] == len(NAMES)


def test_two_ranks_evaluate_to_the_same_loss(said):
    first, second = (rank["token"]["eval_loss"] for rank in results(said, "ours"))
    assert first == second


def test_a_run_on_two_ranks_resumes_exactly(said):
    for rank in results(said, "resumed"):
        assert rank["keys_again"] == rank["keys"][2:]
        assert rank["losses_again"] == rank["losses"]
        assert rank["equal"]


def test_one_rank_goes_on_where_two_stood(said, tmp_path):
    """After 2 of 3 steps; the third has 4 packs on one rank as on two."""
    checkpoint = said[0] / "resumed" / "whole" / "checkpoint-2"
    one, _ = train(
        tmp_path,
        fresh(),
        packs().index(),
        collator(),
        per_device_train_batch_size=4,
        max_steps=-1,
        num_train_epochs=1,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        resume=str(checkpoint),
    )
    both = [rank["keys"][2] for rank in results(said, "resumed")]
    assert [sorted(step) for step in one.keys] == [sorted(both[0] + both[1])]


def test_streams_of_unlike_length_do_not_hang(said):
    first, second = results(said, "streams")
    assert first["steps"] == second["steps"] == 7
    passes = [Counter(key for step in rank["keys"] for key in step) for rank in (first, second)]
    assert max(passes[0].values()) > max(passes[1].values()) >= 1


def test_even_ranks_end_their_passes_together_and_may_evaluate(said):
    first, second = results(said, "even_streams")
    short = [key for step in first["keys"] for key in step if key != DUMMY_KEY]
    assert sorted(short, key=int) == sorted(map(str, range(9)), key=int), "once, though its pass was shorter"
    assert len(second["keys"]) == 5
    assert first["counts"] == second["counts"]
    assert first["counts"][0] == len(NAMES)
    assert first["eval_loss"] == second["eval_loss"]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("same_stream", "ConfigError: 2 ranks began with 1 different batches"),
        ("uneven_evaluation", "ConfigError: evaluation on 2 ranks needs as many batches on each"),
        ("wrong_rank", "ConfigError: the PackLoader is for rank 0 of 1, this process is rank 0 of 2"),
    ],
)
def test_what_would_hang_or_repeat_is_refused_on_every_rank(scenario, message, said):
    assert error(said, scenario).startswith(message)


def test_plain_trainer_cannot_dispatch_ragged_batches(said):
    """Where sizes happen to agree, each rank gets half of the images and fails on their number."""
    first = said[1]["plain_dispatch"][0]["error"]
    assert "batches of different size with `dispatch_batches=True`" in first or "do not match" in first


def test_plain_trainer_without_dispatch_reads_everything_on_every_rank(said):
    first, second = results(said, "plain_shards")
    assert first["read"] == second["read"], "the defect: nothing is split before it is packed"


def test_plain_trainer_averages_means_without_a_global_count(said, tmp_path):
    _, gradients = train(tmp_path, fresh(), packs().index(), collator(), per_device_train_batch_size=4)
    gradient = torch.load(said[0] / "plain_means" / "gradient_0.pt")
    assert float((gradient - gradients[0]).abs().max()) > 1e-2 * float(gradients[0].abs().max())


def test_plain_trainer_waits_for_a_rank_that_has_ended(said):
    assert said[1]["plain_uneven"] == [{"hangs": True}, {"result": None}], "the defect"
