from __future__ import annotations

import json

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_whole_loop_runs_and_ends_in_the_report(vlmpack, tmp_path):
    out = tmp_path / "run"
    done = vlmpack("train-demo", "--epochs", "1", "--formula", "--surgery", "gradvac", "--out", out)
    assert done.exit_code == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "Trained a tiny SmolVLM" in shown
    assert "128 rows are usable, 34 are refused" in shown
    assert "picture " in shown
    assert f"report: {out / 'report.html'}" in shown
    saved = json.loads((out / "metrics.json").read_text())
    assert saved["settings"]["gradient_surgery"] == "gradvac"
    assert saved["summary"]["num_samples"] == sum(each["num_samples"] for each in saved["batches"])
    assert (out / "report.html").read_text().count("<figure>") > 8


def test_wrong_settings_are_refused_before_the_work(vlmpack):
    for wrong in (["--epochs", "0"], ["--memory-gb", "1"], ["--surgery", "both"]):
        assert vlmpack("train-demo", *wrong).exit_code == 2
