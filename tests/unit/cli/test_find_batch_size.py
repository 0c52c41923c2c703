"""`vlmpack find-batch-size`: the documented flags, on a real class with random weights."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def test_the_documented_flags_find_a_size_for_each_number_of_crops(vlmpack, tmp_path, capsys):
    out = tmp_path / "results.json"
    result = vlmpack(
        "find-batch-size", "--batch_size", 64, "--auto_adjust_batch_size", "--max_crops_list", 12, 13, 14,
        "--start_from_max_crops", 13, "--memory-limit", 0.02, "--json", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads(out.read_text())["summary"]
    assert [row["max_crops"] for row in summary] == [13, 14]
    assert [row["estimate"] for row in summary] == [16, 16]
    assert summary[0]["batch_size_used"] >= summary[1]["batch_size_used"] > 16
    assert all(row["probe_peak_bytes"] <= 0.02 * 2**30 for row in summary)
    assert all(0 <= row["accuracy"] <= 1 for row in summary)
    assert "INFO:__main__:Testing max_crops=13" in result.stderr
    assert "INFO:__main__:Measuring accuracy for max_crops=14..." in result.stderr
    assert "max_crops=14" in result.stdout


def test_a_fixed_size_is_used_as_it_is_or_refused(vlmpack, tmp_path):
    options = ("--no_auto_adjust_batch_size", "--max-crops-list", 2, "--generate-tokens", 0)
    out = tmp_path / "results.json"
    assert (
        vlmpack(
            "find-batch-size", "--batch_size", 3, *options, "--memory-limit", 0.02, "--json", out
        ).exit_code
        == 0
    )
    assert json.loads(out.read_text())["summary"][0]["batch_size_used"] == 3
    refused = vlmpack("find-batch-size", "--batch_size", 64, *options, "--memory-limit", 0.005)
    assert refused.exit_code == 1
    assert "no batch size fits, tried 64" in refused.stderr


def test_tries_are_kept_for_the_next_run(vlmpack, tmp_path):
    tries = tmp_path / "tries.jsonl"
    arguments = ("find-batch-size", "--max_crops_list", 12, "--memory-limit", 0.02, "--resume", tries)
    first = vlmpack(*arguments)
    kept = tries.read_text()
    again = vlmpack(*arguments)
    assert first.exit_code == again.exit_code == 0
    assert first.stdout == again.stdout
    assert tries.read_text() == kept, "nothing was tried again"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory-limit", "0.02", "--method", "random"], "method"),
        (["--max_crops_list", "2"], "--memory-limit"),
        (["--memory-limit", "0.02", "--max_crops_list", "2", "--start_from_max_crops", "3"], "all below 3"),
        (["--memory-limit", "0.02", "--max_crops_list", "2", "many"], "not understood: many"),
        (["--memory-limit", "0.02", "12"], "not understood: 12"),
        (["--memory-limit", "0.02", "--model", "nowhere"], "no model configuration"),
        (["--memory-limit", "0.02", "--json", "nowhere/x.json"], "no folder"),
    ],
)
def test_what_cannot_be_searched_says_why(vlmpack, arguments, words):
    result = vlmpack("find-batch-size", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.slow
def test_two_ranks_agree_on_every_try(tmp_path):
    out = tmp_path / "results.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "vlmpack",
        "find-batch-size", "--max_crops_list", "12", "13", "--memory-limit", "0.02", "--json", str(out),
        "--resume", str(tmp_path / "tries"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["batch_size_used"] for row in json.loads(out.read_text())["summary"]] == [28, 26]
    assert done.stdout.count("Largest batch sizes") == 1, "rank 0 alone speaks"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "tries", "tries.rank1"}
