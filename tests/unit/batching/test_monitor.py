from __future__ import annotations

import json
import logging
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.unit.batching.runs import run
from vlmpack.batching import BatchMetrics, DynamicBatchingMonitor, EpochMetrics, MonitorCallback
from vlmpack.batching.report_html import duration, edge_losses
from vlmpack.errors import ConfigError
from vlmpack.memory import FakeMemory


def monitor_of(steps, folder=None, **settings):
    monitor = DynamicBatchingMonitor(folder, **settings)
    for each in steps:
        monitor.record_batch(each)
    return monitor


def test_an_epoch_ends_when_a_step_of_the_next_one_comes():
    steps = run(12)
    monitor = monitor_of(steps)
    assert [epoch.epoch for epoch in monitor.epochs] == [0, 1]
    monitor.close()
    assert [epoch.num_steps for epoch in monitor.epochs] == [4, 4, 4]
    for number, epoch in enumerate(monitor.epochs):
        want = EpochMetrics.of(number, steps[4 * number : 4 * number + 4])
        assert (epoch.average_loss, epoch.peak_bytes, epoch.num_ooms) == (
            want.average_loss,
            want.peak_bytes,
            want.num_ooms,
        )
        assert epoch.seconds >= want.seconds
    assert monitor.end_epoch() is None
    assert monitor.summary().num_samples == sum(each.num_samples for each in steps)


def test_an_evaluation_belongs_to_the_running_epoch_or_the_one_that_has_just_ended():
    monitor = monitor_of(run(12)[:2])
    monitor.record_evaluation(2.5)
    assert monitor.end_epoch().eval_loss == 2.5
    for each in run(12)[4:6]:
        monitor.record_batch(each)
    monitor.end_epoch()
    monitor.record_evaluation(1.5)
    assert [epoch.eval_loss for epoch in monitor.epochs] == [2.5, 1.5]
    DynamicBatchingMonitor().record_evaluation(1.0)  # before any step: nothing to belong to


def test_steps_that_go_back_are_refused_with_the_remedy():
    monitor = monitor_of(run(6))
    with pytest.raises(ConfigError, match=r"step 6 of epoch 0 comes after step 6 .*rewind\(5\)"):
        monitor.record_batch(BatchMetrics(step=6, loss=1.0))
    with pytest.raises(ConfigError, match="comes after"):
        monitor.record_batch(BatchMetrics(step=7, loss=1.0, epoch=0))


def test_a_loss_that_is_not_finite_is_logged_counted_and_valid_json(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        monitor = monitor_of(run(12, nan_at=7), tmp_path)
    assert "step 7 has a loss of nan" in caplog.text
    monitor.close()
    assert monitor.epochs[1].num_non_finite == 1
    values = json.loads(monitor.export_json().read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values["batches"][6]["loss"] is None
    assert math.isfinite(values["summary"]["average_loss"])
    assert "The loss was not finite once</b> (step 7)" in monitor.generate_report().read_text()


def test_a_run_that_dies_leaves_its_metrics_and_goes_on_where_it_resumes(tmp_path, caplog):
    steps = run(12)
    died = monitor_of(steps[:9], tmp_path)  # never closed
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "batch", "st')  # in the middle of a line
    with caplog.at_level(logging.WARNING):
        assert DynamicBatchingMonitor.load(tmp_path / "metrics.jsonl").batches == died.batches
    assert "ends in the middle of a line" in caplog.text
    resumed = DynamicBatchingMonitor(tmp_path)
    resumed.rewind(6)  # the last checkpoint
    assert resumed.batches == steps[:6]
    assert [epoch.num_steps for epoch in resumed.epochs] == [4]
    for each in steps[6:]:
        resumed.record_batch(each)
    resumed.close()
    whole = monitor_of(steps)
    whole.close()
    again = DynamicBatchingMonitor.load(tmp_path / "metrics.jsonl")
    assert again.batches == whole.batches == resumed.batches
    assert [e.average_loss for e in again.epochs] == [e.average_loss for e in whole.epochs]
    assert again.latest()["oom_recoveries"] == 2


def test_a_new_run_sets_the_metrics_of_an_earlier_one_aside(tmp_path):
    for number in range(3):
        monitor_of(run(3)[: number + 1], tmp_path).close()
    counts = {
        path.name: len(DynamicBatchingMonitor.load(path).batches) for path in tmp_path.glob("metrics*.jsonl")
    }
    assert counts == {"metrics.1.jsonl": 1, "metrics.2.jsonl": 2, "metrics.jsonl": 3}


def test_the_json_export_is_complete_and_loads_back(tmp_path):
    monitor = monitor_of(run(12), tmp_path, title="A run", settings={"learning_rate": 1e-4})
    monitor.close()
    path = monitor.export_json(tmp_path / "all.json")
    back = DynamicBatchingMonitor.load(path)
    assert (back.batches, back.epochs, back.title) == (monitor.batches, monitor.epochs, "A run")
    assert back.settings == {"learning_rate": 1e-4}
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(ConfigError, match="format 99, this version reads 1"):
        DynamicBatchingMonitor.load(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="holds no metrics"):
        DynamicBatchingMonitor.load(path)
    (tmp_path / "bad.jsonl").write_text('{"kind": "weather"}\n{}\n')
    with pytest.raises(ConfigError, match="line 1: unknown kind 'weather'"):
        DynamicBatchingMonitor.load(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text("no json\n\n")
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        DynamicBatchingMonitor.load(tmp_path / "bad.jsonl")


def test_pictures_are_written_and_show_something(tmp_path):
    from matplotlib.image import imread

    monitor = monitor_of(run(12), tmp_path, limit_bytes=6e9)
    monitor.close()
    curves, tasks = monitor.plot_training_curves(), monitor.plot_task_comparison()
    assert (curves.name, tasks.name) == ("training_curves.png", "task_comparison.png")
    for path, least in ((curves, 900), (tasks, 600)):
        picture = imread(path)
        assert picture.shape[0] > least
        assert picture[..., :3].std() > 0.02  # not blank
    assert monitor.plot_training_curves(tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_panels_are_drawn_of_what_was_recorded():
    from vlmpack.batching.curves import task_comparison, task_panels, training_curves, training_panels

    bare = monitor_of([BatchMetrics(step=n, loss=1.0 / n) for n in (1, 2)])
    assert [title for title, _ in training_panels(bare)] == ["Loss"]
    assert task_panels(bare) == []
    with pytest.raises(ConfigError, match="no step names a task"):
        task_comparison(bare)
    with pytest.raises(ConfigError, match="no step was recorded"):
        training_curves(DynamicBatchingMonitor())
    full = monitor_of(run(6))
    assert len(training_panels(full)) == 7
    assert len(task_panels(full)) == 4
    lines = {line.get_label(): line for line in training_curves(full).axes[0].get_lines()}
    assert lines["training"].get_ydata().tolist() == pytest.approx([each.loss for each in full.batches])


def test_a_long_run_is_drawn_by_means_that_keep_its_ends():
    from vlmpack.batching.curves import draw_panel, training_panels

    long = monitor_of([BatchMetrics(step=n, loss=float(n % 7)) for n in range(1, 5001)])
    (axes,) = draw_panel(training_panels(long)[0], long).axes
    (line,) = axes.get_lines()
    assert len(line.get_xdata()) == 300
    assert line.get_ydata().mean() == pytest.approx(3.0, abs=0.01)
    assert axes.collections[0].get_datalim(axes.transData).ymax == 6.0  # the band reaches the extremes


# ---- the report --------------------------------------------------------------------------------
class Page(HTMLParser):
    """Collects a page's tags and text, and fails where a tag is not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_report_is_one_file_that_asks_for_nothing(tmp_path):
    monitor = monitor_of(run(12), tmp_path, limit_bytes=6e9, title="Three tasks")
    monitor.close()
    source = monitor.generate_report().read_text()
    page = Page(source)
    for _, name, value in page.attributes:
        if name in {"src", "href", "srcset", "action", "data"}:
            assert value.startswith("data:image/svg+xml;base64,")
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "url(" not in source
    assert "default-src 'none'" in source
    assert page.tags.count("img") == 11
    assert all(value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))


def test_the_report_says_what_the_run_did(tmp_path):
    steps = run(12)
    monitor = monitor_of(steps, tmp_path, limit_bytes=6e9, title="Three tasks")
    monitor.record_evaluation(1.25)
    monitor.close()
    text = Page(monitor.generate_report().read_text()).text
    first, last = edge_losses(steps)
    # T1 4, T2 2 and, every other step, T3 3 samples: 9 and 6 in turn, 90 in all
    assert "steps 1 to 12 in 3 epochs, 90 samples" in text
    assert f"The loss fell from {first:.3f} to {last:.3f}" in text
    assert "Memory ran out 2 times in 1 of 12 steps" in text
    assert "6 to 9 a step" in text
    assert "T1 48 53.3%" in text
    assert "T3 18 20.0%" in text
    assert "evaluation loss 1.250" in text
    assert "5 2 9 4 T1 x 4, T2 x 2, T3 x 3" in text  # step 5: two errors, nine samples, four parts


def test_the_report_warns_of_what_is_wrong(tmp_path):
    rising = [BatchMetrics(step=n, loss=float(n), peak_bytes=99, num_samples=1) for n in (1, 2, 3)]
    text = Page(_report(rising, tmp_path, limit_bytes=100)).text
    assert "The loss rose from 1.000 to 3.000" in text
    assert "Lower the learning rate" in text
    assert "within 5 % of its limit" in text
    assert "Memory never ran out" in text
    broken = [BatchMetrics(step=1, loss=math.nan)]
    assert "No step had a finite loss." in Page(_report(broken, tmp_path)).text


def _report(steps, folder, **settings):
    return monitor_of(steps, **settings).generate_report(folder / "page.html").read_text()


def test_names_from_data_cannot_become_markup(tmp_path):
    evil = "<script>alert(1)</script>'\"&"
    steps = [
        BatchMetrics(
            step=1,
            loss=1.0,
            num_ooms=1,
            task_losses={evil: 1.0},
            task_types={evil: 2},
            task_weights={evil: 1.0},
        )
    ]
    page = Page(_report(steps, tmp_path, title=evil, settings={evil: evil}))
    assert "script" not in page.tags
    assert page.text.count(evil) >= 5


def test_nothing_to_report_and_nowhere_to_write_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="nothing to report"):
        DynamicBatchingMonitor(tmp_path).generate_report()
    with pytest.raises(ConfigError, match=r"say where report\.html should go"):
        monitor_of(run(2)).generate_report()


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.21, "3.2 s"), (75, "1 min 15 s"), (3600 * 2 + 61, "2 h 01 min"), (0, "0.0 s")]
)
def test_durations_are_said_as_people_do(seconds, said):
    assert duration(seconds) == said


def test_the_report_is_the_same_each_time(tmp_path):
    bare = [BatchMetrics(step=n, loss=1.0 / n) for n in (1, 2)]
    pages = [_report(bare, tmp_path) for _ in range(2)]
    assert re.sub(r", [\d.]+ s</p>", "", pages[0]) == re.sub(r", [\d.]+ s</p>", "", pages[1])


# ---- on a Trainer ------------------------------------------------------------------------------
class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        return {"loss": ((self.weight * x - labels) ** 2).mean()}


class Logger(TrainerCallback):
    """Stands for what `report_to` adds."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def train(folder, monitor, *, steps, resume=None):
    logger = Logger()
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        max_steps=steps,
        per_device_train_batch_size=2,
        logging_steps=2,
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"x": torch.ones(1), "labels": torch.zeros(1)}] * 8
    trainer = Trainer(
        model=Line(), args=arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=[logger]
    )
    MonitorCallback(monitor, backend=FakeMemory(total=100, allocated=7, peak=9)).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return logger.seen, trainer


def test_a_plain_trainer_is_watched_and_its_loggers_see_the_figures(tmp_path):
    monitor = DynamicBatchingMonitor(tmp_path / "metrics")
    seen, trainer = train(tmp_path, monitor, steps=8)
    assert [each.step for each in monitor.batches] == [2, 4, 6, 8]
    assert [each.num_samples for each in monitor.batches] == [4, 4, 4, 4]
    assert [each.epoch for each in monitor.batches] == [0, 0, 1, 1]
    assert monitor.batches[0].peak_bytes == 9
    assert all(epoch.eval_loss is not None for epoch in monitor.epochs)
    with_loss = [logs for logs in seen if "loss" in logs]
    assert [logs["step_samples"] for logs in with_loss] == [4, 4, 4, 4]
    assert all(logs["samples_per_s"] > 0 for logs in with_loss)
    assert [line["oom_recoveries"] for line in trainer.state.log_history if "loss" in line] == [0] * 4
    assert {path.name for path in (tmp_path / "metrics").iterdir()} == {
        "metrics.json",
        "metrics.jsonl",
        "report.html",
    }


def test_a_resumed_trainer_goes_on_with_its_metrics(tmp_path):
    train(tmp_path, DynamicBatchingMonitor(tmp_path / "metrics"), steps=6)
    again = DynamicBatchingMonitor(tmp_path / "metrics")
    train(tmp_path, again, steps=8, resume=str(tmp_path / "checkpoint-4"))
    assert [each.step for each in again.batches] == [2, 4, 6, 8]
