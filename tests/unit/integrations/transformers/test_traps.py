"""What plain `Trainer` does to packs, without a word, and what PackedTrainer does instead.

Each test first shows the defect on plain `Trainer`: when a release repairs it, the test says so.
"""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from tests.family_models import size_of, tokenizer_of
from tests.tiny_models import collator, fresh, packs
from tests.unit.integrations.transformers.runs import Gradients, Without, arguments, losses, train
from tests.unit.integrations.transformers.test_trainer import one_by_one
from vlmpack.ranks import PackLoader


class Spy:
    """Mixed into a trainer: keeps the batches that reach `compute_loss`."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(dict(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)


class PlainTrainer(Spy, Trainer):
    pass


def plain(folder, model, data, collator, **settings):
    """Return a plain trainer after a run, and the gradient of each step."""
    gradients = Gradients()
    trainer = PlainTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=data,
        data_collator=collator,
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients.steps


def shapes(batch):
    return {name: list(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}


def first_two(collator, data):
    stream = iter(data)
    return collator([next(stream), next(stream)])


@pytest.mark.parametrize("name", ["qwen2_vl", "smolvlm"])
def test_flat_tensors_arrive_whole(name, tmp_path, monkeypatch):
    """The default loader of an iterable data set cuts each tensor to the rows of `input_ids`."""
    size = size_of(tokenizer_of(name))

    def forward(self, **batch):
        nothing = sum(weight.sum() for weight in self.parameters()) * 0
        return {"loss": nothing, "logits": nothing + torch.zeros(*batch["input_ids"].shape, size)}

    monkeypatch.setattr(type(fresh(name)), "forward", forward)
    collate = collator(name)
    given = shapes(first_two(collate, packs(name)))
    assert given["cu_seq_lens_q"][0] > 2

    cut, _ = plain(tmp_path, fresh(name), packs(name), collate, remove_unused_columns=False)
    arrived = shapes(cut.seen[0])
    assert arrived["input_ids"] == given["input_ids"] == [2, 224]
    assert arrived["cu_seq_lens_q"] == [2], "the defect"
    if name == "qwen2_vl":
        assert given["pixel_values"][0] > given["image_grid_thw"][0] > 2
        assert arrived["pixel_values"] == [2, given["pixel_values"][1]], "the defect"
        assert arrived["position_ids"] == [2, 2, 224], "the defect: there were 4"

    for remove_unused_columns in (True, False):
        whole, _ = train(
            tmp_path, fresh(name), packs(name), collate, remove_unused_columns=remove_unused_columns
        )
        assert given.items() <= shapes(whole.batches[0]).items()


def test_qwen_cannot_use_what_the_default_loader_leaves(tmp_path):
    with pytest.raises(RuntimeError):
        plain(
            tmp_path, fresh("qwen2_vl"), packs("qwen2_vl"), collator("qwen2_vl"), remove_unused_columns=False
        )
    train(tmp_path, fresh("qwen2_vl"), packs("qwen2_vl"), collator("qwen2_vl"))


def ready(data, collate, *, packs_a_batch=2):
    """Return a map-style data set of batches in PackedTrainer's order, and the collator that unpacks one."""
    return list(PackLoader(data, batch_size=packs_a_batch, collate_fn=collate, seed=42)), _the_only_one


def _the_only_one(items):
    return items[0]


IN_ORDER = {
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 1,
    "remove_unused_columns": False,
}
"""For data that is batches already."""


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_samples_stay_apart_without_use_cache_in_the_batch(name, tmp_path):
    """Trainer sets the outer config; Qwen-VL asks the text config, and a cache undoes the isolation."""
    data = packs(name).index()
    expected, gradient = one_by_one(name, data, "token", num_packs=2)

    mixed, (wrong,) = plain(
        tmp_path, fresh(name), *ready(data, Without(collator(name), "use_cache")), **IN_ORDER
    )
    assert mixed.model.config.use_cache is False
    assert mixed.model.config.text_config.use_cache is True, "the defect"
    assert float((wrong - gradient).abs().max()) > 0.05
    assert abs(losses(mixed)[0] - expected) > 0.01

    ours = Without(collator(name, loss_weighting="token"), "use_cache")
    trainer, (right,) = train(tmp_path, fresh(name), data, ours)
    assert float((right - gradient).abs().max()) < 1e-5
    assert losses(trainer)[0] == pytest.approx(expected, abs=1e-5)


def test_a_step_is_divided_by_all_its_tokens_for_every_model(tmp_path):
    """Qwen3-VL says accepts_loss_kwargs=False, so Trainer gives it no count: a mean of means."""
    name = "qwen3_vl"
    data = packs(name).index()
    _, expected = one_by_one(name, data, "token", num_packs=4)

    assert fresh(name).accepts_loss_kwargs is False
    _, (wrong,) = plain(
        tmp_path,
        fresh(name),
        *ready(data, collator(name), packs_a_batch=1),
        gradient_accumulation_steps=4,
        **IN_ORDER,
    )
    assert float((wrong - expected).abs().max()) > 1e-3 * float(expected.abs().max()), "the defect"

    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    _, (right,) = train(tmp_path, fresh(name), data, collator(name), **settings)
    assert float((right - expected).abs().max()) < 1e-5


def test_python_objects_do_not_reach_the_model(tmp_path, monkeypatch):
    """Models take unknown names in silence; some of them mean something to the next release."""
    name, reached = "smolvlm", {}
    forward = type(fresh(name)).forward

    def watch(self, **batch):
        reached.update(batch)
        return forward(self, **batch)

    monkeypatch.setattr(type(fresh(name)), "forward", watch)
    data, books = packs(name).index(), {"keys", "segment_ids", "loss_weights", "loss_weight_sum"}
    plain(tmp_path, fresh(name), *ready(data, collator(name, loss_weighting="token")), **IN_ORDER)
    assert books <= reached.keys(), "the defect"
    reached.clear()
    train(tmp_path, fresh(name), data, collator(name))
    assert not (books | {"labels"}) & reached.keys()
    assert reached["use_cache"] is False
    assert "pixel_values" in reached
