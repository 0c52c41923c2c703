from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests import fakes
from vlmpack.budget import PackBudget, SampleCost
from vlmpack.cli.console import plain_message
from vlmpack.cli.job import progress_line, run_job
from vlmpack.cli.summary import show_summary
from vlmpack.errors import ConfigError, SourceError
from vlmpack.packing import PackingReport
from vlmpack.pipeline import PipelineConfig, build_pipeline
from vlmpack.samples import Refusal


def report() -> PackingReport:
    """Two packs of 60 and 40 of 100 tokens, and a refusal, out of 5 rows."""
    made = PackingReport(budget=PackBudget(max_tokens=100), num_read=5)
    for tokens in ((30, 30), (20, 20)):
        costs = [SampleCost(num_tokens=count, num_images=0, num_patches=0) for count in tokens]
        made.add_pack(costs, num_tiles=0, num_supervised=10, num_appended=0)
    made.refuse(Refusal(key="row [4]", reason="no_text", message="column texts is an empty list"))
    return made


def shown(renderable: object, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_progress_says_what_was_read_and_made():
    # (60 + 40) of 2 x 100 tokens.
    assert "5 of 1,000 rows · 2 packs · 50.0% full · 1 refused" in shown(progress_line(report(), 1000))
    assert "5 rows · 2 packs" in shown(progress_line(report(), None))


def test_progress_before_the_first_pack_has_no_fill():
    empty = PackingReport(budget=PackBudget(max_tokens=100), num_read=7)
    assert "7 of 9 rows · 0 packs · 0 refused" in shown(progress_line(empty, 9))


def test_summary_counts_packs_over_the_lower_bound_and_gives_an_example():
    console = Console(file=io.StringIO(), width=120)
    show_summary(console, report(), title="Packed [a] data set", seconds=0.5)
    text = console.file.getvalue()
    assert "Packed [a] data set" in text
    assert "1 over the lower bound of 1" in text  # 100 tokens fit into one pack of 100
    assert "no limit" in text  # images and patches
    # 1 - 100 / 200, and 4 samples in rows of 100 each: 1 - 100 / 400.
    assert "50.0%   75.0% with one sample a row, which takes 2.0 times as many rows" in text
    assert "row [4]: column texts is an empty list" in text
    assert "10 rows a second" in text  # 5 rows in 0.5 s


def test_a_job_on_a_terminal_shows_its_progress_and_removes_it():
    config = PipelineConfig(max_side=512, decode=False)
    tokenizer = fakes.tokenizer()
    pipeline = build_pipeline([fakes.row(f"Question {i}?") for i in range(5)], tokenizer, config)
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    packs = []
    seconds = run_job(pipeline, packs.append, config=config, console=console)
    assert [key for pack in packs for key in pack.keys] == ["0", "1", "2", "3", "4"]
    assert seconds > 0
    assert "5 of 5 rows · 1 packs" in console.file.getvalue()


def test_packs_arrive_without_their_tiles():
    config = PipelineConfig(max_side=512)
    pipeline = build_pipeline([fakes.row(images=[fakes.jpeg(40, 30)])], fakes.tokenizer(), config)
    packs = []
    run_job(pipeline, packs.append, config=config, console=Console(file=io.StringIO()))
    assert [tuple(pack.tiles.shape) for pack in packs] == [(0, 3, 512, 512)]
    assert pipeline.report.num_tiles == 1


def test_no_pack_at_all_is_an_error_with_workers_too():
    config = PipelineConfig(num_workers=2)
    pipeline = build_pipeline([{"texts": []}] * 4, fakes.tokenizer(), config)
    with pytest.raises(SourceError, match="none of 4 rows can be packed"):
        run_job(pipeline, print, config=config, console=Console(file=io.StringIO()))


def test_a_worker_s_error_keeps_only_its_own_words():
    wrapped = ConfigError(
        "Caught ConfigError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "a.py", line 1, in f\n    raise error\nvlmpack.errors.ConfigError: no such column\n'
    )
    assert plain_message(wrapped) == "no such column"
    assert plain_message(ConfigError("ValueError: 3")) == "ValueError: 3"
