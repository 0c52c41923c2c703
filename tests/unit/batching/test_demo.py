from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from vlmpack.batching.demo import (
    TILING,
    pretended_gpu,
    run_demo,
    short_tokenizer,
    task_of,
    tiny_model,
)


def test_the_short_vocabulary_tokenises_to_text_and_back():
    tokenizer = short_tokenizer()
    text = "What does this chart show? 12 bars, naïve."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) < 4200
    assert len(ids) < len(text)  # merges are left


def test_the_tiny_model_is_a_real_class_that_sees_its_pictures():
    tokenizer = short_tokenizer()
    model = tiny_model(tokenizer).eval()
    assert type(model).__name__ == "SmolVLMForConditionalGeneration"
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    ids = torch.tensor([[5, *[image] * TILING.tokens_per_tile, 6, 7]])
    pixels = torch.randn(1, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (model(input_ids=ids, pixel_values=pixels * scale).logits for scale in (1.0, 0.5))
    assert not torch.allclose(one[0, -1], other[0, -1])


def test_the_pretended_gpu_counts_padding_and_pictures():
    gpu = pretended_gpu(4.0)
    quiet = [gpu.memory({"input_ids": torch.zeros(2, 100)}) for _ in range(50)]
    assert min(quiet) == pytest.approx(1e9 * (1.2 + 0.0022 * 200))
    assert max(quiet) <= 2 * min(quiet)
    seen = min(
        gpu.memory({"input_ids": torch.zeros(2, 100), "pixel_values": torch.zeros(2, 3, 3, 8, 8)})
        for _ in range(20)
    )
    assert seen == pytest.approx(1e9 * (1.2 + 0.0022 * 200 + 0.06 * 6))


def test_tasks_are_told_by_pictures():
    assert [task_of({"images": [0] * n}) for n in range(4)] == ["text", "picture", "pictures", "pictures"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_trains_recovers_loses_nothing_and_reports(tmp_path):
    demo = run_demo(tmp_path, epochs=2, memory_gb=3.5)
    monitor, trainer, result = demo.pipeline.monitor, demo.pipeline.trainer, demo.result
    plan = trainer.step_plan
    assert [each.step for each in monitor.batches] == list(range(1, len(plan) + 1))
    planned = [len(plan.step(number)) for number in range(len(plan))]
    assert [each.num_samples for each in monitor.batches] == planned
    assert [sum(each.task_types.values()) for each in monitor.batches] == planned  # none isolated
    assert sum(each.num_ooms for each in monitor.batches) == demo.simulator.num_ooms
    assert demo.simulator.num_ooms >= 2
    assert max(each.peak_bytes for each in monitor.batches) <= 3.5e9
    seen = Counter(index for number in range(len(plan)) for index in plan.step(number))
    assert set(seen.values()) == {2}
    assert len(result.epochs) == 2
    assert monitor.batches[-1].loss < 0.95 * monitor.batches[0].loss
    assert result.epochs[-1].eval_loss < 0.97 * monitor.batches[0].loss
    weights = monitor.batches[-1].task_weights
    assert sum(weights.values()) == pytest.approx(3.0, abs=1e-9)
    assert len(set(weights.values())) == 3
    report = result.report.read_text()
    assert "data:image/svg+xml" in report
    assert "pictures" in report
    assert json.loads(result.metrics_file.read_text())["summary"]["num_steps"] == len(plan)
