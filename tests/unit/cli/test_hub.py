from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    return subprocess.run(
        [Path(sys.executable).with_name("vlmpack"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**kept, **environment},
    )


def test_offline_a_name_on_the_hub_fails_at_once(vlmpack):
    result = vlmpack("pack", "owner/name", "--streaming")
    assert result.exit_code == 1
    assert "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_offline_a_tokenizer_on_the_hub_fails_at_once(vlmpack, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"texts": [{"user": "Hello?", "assistant": "Yes."}]}\n')
    result = vlmpack("pack", tmp_path / "rows.jsonl", "--tokenizer", "owner/name-that-is-in-no-cache")
    assert result.exit_code == 1
    assert "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids" in result.stderr


@pytest.mark.parametrize("answers", [False, True], ids=["refused", "silent"])
def test_a_hub_that_cannot_be_reached_is_an_error_not_a_hang(answers):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen()  # connections are taken, and nobody ever says a word
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = run("pack", "owner/name", "--streaming", HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="1")
    assert done.returncode == 1
    assert f"the dataset 'owner/name' is no local path and cannot be had from {endpoint}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
