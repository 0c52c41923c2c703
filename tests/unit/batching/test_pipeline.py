from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback

from tests.toy_training import Causal, Texts, collate, memory_of, weights
from vlmpack.batching import (
    DynamicBatchingMonitor,
    DynamicBatchingTrainingPipeline,
    HeterogeneousTrainingConfig,
    MemorySafetyCallback,
    OOMSimulator,
    SafetyConfig,
    SampleMetadata,
)
from vlmpack.errors import ConfigError, VlmpackError


class Known(Texts):
    """Texts whose metadata is known."""

    def get_sample_metadata(self, idx):
        sample = self[idx]
        return SampleMetadata(
            task_type=sample["task_type"],
            num_images=0,
            num_tokens=len(sample["input_ids"]),
            key=sample["key"],
        )


def data(number=24, seed=0):
    return Known(number, tasks=("T1", "T2", "T3", "T1"), seed=seed)


def config_of(folder, **settings):
    return HeterogeneousTrainingConfig(**{
        "output_dir": str(folder),
        "num_epochs": 2,
        "learning_rate": 0.01,
        "base_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        **settings,
    })


def pipeline_of(folder, model, **settings):
    return DynamicBatchingTrainingPipeline(config_of(folder, **settings), model, collator=collate, quiet=True)


def test_a_run_ends_in_metrics_and_a_report(tmp_path):
    pipeline = pipeline_of(tmp_path, Causal())
    result = pipeline.train(data(), data(8, seed=1))
    # 24 samples in steps of 4 x 2, twice
    assert result.global_step == 6
    assert [each.num_samples for each in pipeline.monitor.batches] == [8] * 6
    assert [epoch.num_steps for epoch in result.epochs] == [3, 3]
    assert all(epoch.eval_loss > 0 for epoch in result.epochs)
    assert result.eval_metrics["eval_loss"] == pytest.approx(result.epochs[-1].eval_loss)
    assert result.training_loss == pytest.approx(
        sum(each.loss for each in pipeline.monitor.batches) / 6, rel=1e-5
    )
    assert result.report.read_text().startswith("<!doctype html>")
    saved = json.loads(result.metrics_file.read_text())
    assert saved["settings"]["base_batch_size"] == 4
    assert len(saved["batches"]) == 6
    last = pipeline.monitor.batches[-1]
    assert set(last.task_weights) == {"T1", "T2", "T3"}
    assert set(last.task_losses) == set(last.task_types) <= {"T1", "T2", "T3"}
    assert last.grad_norm > 0
    assert last.learning_rate > 0
    assert last.lr_scale == 1.0


def test_the_loggers_see_each_tasks_loss_and_weight(tmp_path):
    class Logger(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.seen.append(dict(logs))

    logger = Logger()
    DynamicBatchingTrainingPipeline(
        config_of(tmp_path), Causal(), collator=collate, callbacks=[logger], quiet=True
    ).train(data())
    assert len(logger.seen) == 3
    for logs in logger.seen:
        assert {"loss_T1", "weight_T1", "lr_scale", "oom_recoveries", "samples_per_s"} <= set(logs)


def run(folder, *, at=None, **settings):
    model = Causal(dtype=torch.float64)
    pipeline = pipeline_of(folder, model, **settings)
    simulator = OOMSimulator(memory_of, limit_bytes=at or float("inf"), phase="random")
    with simulator.attached(model):
        pipeline.train(data())
    return weights(model), pipeline, simulator


@pytest.mark.parametrize(
    ("rule", "surgery"), [("legacy", "none"), ("gradnorm", "pcgrad"), ("legacy", "gradvac")]
)
def test_running_out_of_memory_changes_nothing_that_is_learnt(tmp_path, surgery, rule):
    settings = {"gradient_surgery": surgery, "balance_rule": rule}
    calm, first, _ = run(tmp_path / "calm", **settings)
    tight, second, simulator = run(tmp_path / "tight", at=300.0, **settings)
    assert simulator.num_ooms > 0
    assert sum(each.num_ooms for each in second.monitor.batches) > 0
    assert ((calm - tight).norm() / calm.norm()).item() < 1e-12
    for one, other in zip(first.monitor.batches, second.monitor.batches, strict=True):
        assert one.num_samples == other.num_samples
        assert one.task_weights == pytest.approx(other.task_weights, rel=1e-9)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


def test_a_resumed_run_is_the_same_bit_for_bit_and_keeps_its_metrics(tmp_path):
    settings = {"gradient_surgery": "gradvac", "balance_rule": "gradnorm"}
    whole, first, _ = run(tmp_path / "whole", **settings)
    config = config_of(tmp_path / "parts", **settings)
    model = Causal()
    DynamicBatchingTrainingPipeline(config, model, collator=collate, callbacks=[StopAt(2)], quiet=True).train(
        data()
    )
    again = Causal(seed=9)
    second = DynamicBatchingTrainingPipeline(config, again, collator=collate, quiet=True)
    second.train(data(), resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert torch.equal(weights(again), whole)
    assert [each.loss for each in second.monitor.batches] == [each.loss for each in first.monitor.batches]
    on_disk = DynamicBatchingMonitor.load(tmp_path / "parts" / "metrics.jsonl")
    assert [each.step for each in on_disk.batches] == [1, 2, 3, 4, 5, 6]


def test_the_parts_follow_the_settings(tmp_path):
    pipeline = pipeline_of(
        tmp_path,
        Causal(),
        use_grad_norm_balancing=False,
        task_loss_weights={"T1": 2.0},
        memory_margin_percent=0.2,
    )
    assert pipeline.guardian.memory_margin_percent == 0.2
    assert pipeline.predictor is not None  # the documented formula knows T1, T2 and T3
    trainer = pipeline.build_trainer(data())
    assert trainer.balancing is None
    sampler = trainer._batch_sampler
    assert sampler.max_batch_size == 8
    assert sampler.limit_bytes == 2 * 20000e6 * 0.8  # two micro-batches, less the margin
    (safety,) = [
        each for each in trainer.callback_handler.callbacks if isinstance(each, MemorySafetyCallback)
    ]
    assert (safety.guardian, safety.interval, safety.warn_at) == (pipeline.guardian, 10, 0.9)
    assert trainer.task_loss_weights == {"T1": 2.0, "T2": 1.0, "T3": 1.0}
    training, evaluating = pipeline.create_dataloaders(data(), data(8))
    step = next(iter(training))
    assert len(step) == 8
    assert evaluating is not None
    assert pipeline.create_dataloaders(data())[1] is None


def test_tasks_that_the_formula_does_not_know_are_learnt_from_failures(tmp_path):
    class Renamed(Known):
        def get_sample_metadata(self, idx):
            return super().get_sample_metadata(idx) | {"task_type": "abcd"[idx % 4]}

    pipeline = pipeline_of(
        tmp_path,
        Causal(),
        task_distribution={"a": 1.0},
        task_loss_weights={},
    )
    assert pipeline.predictor is None
    trainer = pipeline.build_trainer(Renamed(8, tasks=("a", "b", "c", "d")))
    assert trainer.balancing.gradients.task_types == ("a", "b", "c", "d")


def test_checkpointing_is_turned_on_for_the_model(tmp_path):
    model = Causal()
    pipeline_of(tmp_path, model, enable_gradient_checkpointing=True).train(data())
    from vlmpack.batching import GradientCheckpointManager

    assert GradientCheckpointManager.is_enabled(model)


def test_nothing_to_collate_with_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="give a tokenizer"):
        DynamicBatchingTrainingPipeline(config_of(tmp_path), Causal())


def test_mixing_tasks_follows_the_diversity_weight(tmp_path):
    class OneCost(Known):
        """24 samples of T1, 8 of T2: alike in all but their task."""

    rows = OneCost(32, tasks=("T1", "T1", "T1", "T2"), longest=3)
    mixed = {}
    for weight in (0.0, 1.0):
        trainer = pipeline_of(tmp_path, Causal(), diversity_weight=weight).build_trainer(rows)
        first = trainer._batch_sampler.construct_batch(range(32))
        mixed[weight] = sum(rows[index]["task_type"] == "T2" for index in first)
    assert mixed[1.0] == 4  # half of a step of 8
    assert mixed[0.0] != 4


class Poisoned(Causal):
    """Its loss is NaN wherever token 12 occurs."""

    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids, labels, **kwargs)
        if labels is not None and (input_ids == 12).any():
            output["loss"] = output["loss"] * float("nan")
        return output


def poisoned():
    rows = data()
    for number, sample in enumerate(rows.samples):
        sample["input_ids"] = [min(token, 11) for token in sample["input_ids"]]
        sample["labels"] = [min(label, 11) for label in sample["labels"]]
        if number == 5:
            sample["input_ids"][0] = 12
    return rows


def test_a_loss_that_is_not_finite_names_its_samples_or_leaves_the_step_out(tmp_path):
    with pytest.raises(VlmpackError, match=r"loss is not finite for samples .*s5 \(T2\).*skip_step"):
        pipeline_of(tmp_path / "raise", Poisoned()).train(poisoned())
    model = Poisoned()
    lenient = pipeline_of(tmp_path / "skip", model, safety=SafetyConfig(non_finite="skip_step"))
    result = lenient.train(poisoned())
    assert [epoch.num_non_finite for epoch in result.epochs] == [1, 1]  # one of three steps, in each epoch
    assert [each.num_samples for each in lenient.monitor.batches] == [8] * 6
    assert torch.isfinite(weights(model)).all()
    assert "The loss was not finite 2 times" in result.report.read_text()


def test_a_task_that_nobody_announced_is_refused_before_the_first_step(tmp_path):
    rows = data()
    rows.samples[3]["task_type"] = "T9"
    with pytest.raises(ConfigError, match="sample s3 is of task 'T9'"):
        pipeline_of(tmp_path, Causal()).train(rows)


def test_a_second_run_with_one_pipeline_keeps_the_first_ones_metrics(tmp_path):
    pipeline = pipeline_of(tmp_path, Causal(), num_epochs=1)
    for _ in range(2):
        pipeline.train(data())
        assert len(pipeline.monitor.batches) == 3
    for name in ("metrics.jsonl", "metrics.1.jsonl"):
        assert len(DynamicBatchingMonitor.load(tmp_path / name).batches) == 3
