"""What plain `Trainer` does to packs, without a word, and what PackedTrainer does instead.

Each test first shows the defect on plain `Trainer`: when a release repairs it, the test says so.
"""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from tests.tiny_models import QwenCollator, SmolVLMCollator, packs, qwen2_vl, qwen3_vl, rows, smolvlm
from tests.unit.integrations.transformers.runs import Gradients, arguments, losses, train
from tests.unit.integrations.transformers.test_trainer import one_by_one


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


class FlatCollator(SmolVLMCollator):
    """Tiles flat along the first axis, as LLaVA-OneVision and Qwen-VL take them."""

    def __call__(self, packed):
        batch = super().__call__(packed)
        return batch | {"pixel_values": batch["pixel_values"][0], "pixel_attention_mask": None}


def shapes(batch):
    return {name: list(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}


def first_two(collator, data):
    stream = iter(data)
    return collator([next(stream), next(stream)])


def test_flat_tensors_arrive_whole(tmp_path, monkeypatch):
    """The default loader of an iterable data set cuts each tensor to the rows of `input_ids`."""
    monkeypatch.setattr(
        "transformers.SmolVLMForConditionalGeneration.forward",
        lambda self, **batch: {
            "loss": sum(weight.sum() for weight in self.parameters()) * 0,
            "logits": torch.zeros(*batch["input_ids"].shape, 512, requires_grad=True),
        },
    )
    collator = FlatCollator()
    given = shapes(first_two(collator, packs()))
    assert given["pixel_values"][0] > 2
    assert given["cu_seq_lens_q"][0] > 2

    cut, _ = plain(tmp_path, smolvlm(), packs(), collator, remove_unused_columns=False)
    arrived = shapes(cut.seen[0])
    assert arrived["input_ids"] == given["input_ids"]
    assert arrived["pixel_values"] == [2, *given["pixel_values"][1:]], "the defect"
    assert arrived["cu_seq_lens_q"] == [2], "the defect"

    for remove_unused_columns in (True, False):
        whole, _ = train(tmp_path, smolvlm(), packs(), collator, remove_unused_columns=remove_unused_columns)
        assert shapes(whole.batches[0]) == given


def test_four_rows_of_positions_arrive_whole(tmp_path):
    """The same, for Qwen-VL: two rows of four are left, and the model cannot use them."""
    data = rows(images=False)
    with pytest.raises(RuntimeError):
        plain(tmp_path, qwen2_vl(), packs(data), QwenCollator(), remove_unused_columns=False)
    trainer, _ = train(tmp_path, qwen2_vl(), packs(data), QwenCollator())
    assert trainer.batches[0]["position_ids"].shape == (4, 2, 128)


class QwenWithoutCacheSetting(QwenCollator):
    """What a collator looks like that relies on the Trainer to switch the cache off."""

    def __call__(self, packed):
        batch = super().__call__(packed)
        del batch["use_cache"]
        return batch


def test_samples_stay_apart_without_use_cache_in_the_batch(tmp_path):
    """Trainer sets the outer config; Qwen2-VL asks the text config, and a cache undoes the isolation."""
    data = packs(rows(images=False)).index()
    collator = QwenWithoutCacheSetting()
    expected, gradient = one_by_one(qwen2_vl(), QwenCollator(), data, "token", num_packs=2)

    mixed, (wrong,) = plain(tmp_path, *_same_packs(qwen2_vl(), data, collator))
    assert mixed.model.config.use_cache is False
    assert float((wrong - gradient).abs().max()) > 0.05, "the defect"
    assert abs(losses(mixed)[0] - expected) > 0.01, "the defect"

    trainer, (right,) = train(tmp_path, qwen2_vl(), data, collator)
    assert float((right - gradient).abs().max()) < 1e-5
    assert losses(trainer)[0] == pytest.approx(expected, abs=1e-5)


def _same_packs(model, data, collator):
    """Return model, a map-style data set of batches in PackedTrainer's order, and a collator for it."""
    from vlmpack.ranks import PackLoader

    batches = list(PackLoader(data, batch_size=2, collate_fn=collator, seed=42))
    return model, batches, lambda items: {name: items[0][name] for name in items[0] if name != "keys"}


@pytest.mark.parametrize("make", [qwen3_vl], ids=["Qwen3-VL"])
def test_a_step_is_divided_by_all_its_tokens_for_every_model(make, tmp_path):
    """Qwen3-VL says accepts_loss_kwargs=False, so Trainer gives it no count: a mean of means."""
    data = packs(rows(images=False)).index()
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    _, expected = one_by_one(make(), QwenCollator(), data, "token", num_packs=4)

    assert make().accepts_loss_kwargs is False
    model, batches, collator = _same_packs(make(), data, QwenCollator())
    sequential = {**settings, "train_sampling_strategy": "sequential"}
    _, (wrong,) = plain(tmp_path, model, batches, collator, remove_unused_columns=False, **sequential)
    assert float((wrong - expected).abs().max()) > 1e-3 * float(expected.abs().max()), "the defect"

    _, (right,) = train(tmp_path, make(), data, QwenCollator(), gradient_accumulation_steps=2)
    assert float((right - expected).abs().max()) < 1e-5


def test_python_objects_do_not_reach_the_model(tmp_path, monkeypatch):
    """Models take unknown names in silence; some of them mean something to the next release."""
    reached = {}
    forward = type(smolvlm()).forward

    def watch(self, **batch):
        reached.update(batch)
        return forward(self, **{name: batch[name] for name in ("input_ids", "position_ids")})

    monkeypatch.setattr("transformers.SmolVLMForConditionalGeneration.forward", watch)
    with pytest.raises(KeyError):  # no loss, as the labels were not handed on
        plain(
            tmp_path,
            *_with_keys(smolvlm(), packs(rows(images=False)).index(), SmolVLMCollator()),
            remove_unused_columns=False,
        )
    assert {"keys", "labels", "segment_ids"} <= reached.keys(), "the defect"
    reached.clear()
    train(tmp_path, smolvlm(), packs(rows(images=False)).index(), SmolVLMCollator())
    assert not {"keys", "labels", "segment_ids", "tiles_per_pack"} & reached.keys()
    assert reached["use_cache"] is False


def _with_keys(model, data, collator):
    model, batches, _ = _same_packs(model, data, collator)
    return model, batches, lambda items: items[0]
