"""What a Trainer can be asked for besides: workers, smoothing, checkpointing, raw pixels, fresh models."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import collator, fresh, packs
from tests.unit.integrations.transformers.runs import arguments, losses, train
from vlmpack.errors import ConfigError
from vlmpack.integrations.transformers import PackedTrainer
from vlmpack.ranks import PackLoader
from vlmpack.weighting import weighted_loss


@pytest.fixture(scope="module")
def data():
    return packs().index()


@pytest.fixture(scope="module")
def usual(data, tmp_path_factory):
    """Two steps without anything special."""
    return train(tmp_path_factory.mktemp("usual"), fresh(), data, collator(), max_steps=2)


@pytest.mark.parametrize(
    ("settings", "collate"),
    [
        ({"dataloader_num_workers": 2}, {}),
        ({"activation_checkpointing": True}, {}),
        ({}, {"pixel_dtype": torch.uint8}),
    ],
    ids=["workers", "activation checkpointing", "pixels normalised by the model"],
)
def test_the_steps_are_the_same(settings, collate, data, usual, tmp_path):
    expected, gradients = usual
    trainer, same = train(tmp_path, fresh(), data, collator(**collate), max_steps=2, **settings)
    assert trainer.keys == expected.keys
    for ours, theirs in zip(same, gradients, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-5


def test_label_smoothing_reaches_the_weighted_loss(data, usual, tmp_path):
    trainer, _ = train(tmp_path, fresh(), data, collator(), max_steps=1, label_smoothing_factor=0.2)
    weighing = collator(loss_weighting="token")
    batch = next(iter(PackLoader(data, batch_size=2, collate_fn=weighing, seed=42)))
    names = ("input_ids", "position_ids", "use_cache", "pixel_values")
    with torch.no_grad():
        logits = fresh()(**{name: batch[name] for name in names}).logits
    books = batch["labels"], batch["loss_weights"], batch["loss_weight_sum"]
    assert losses(trainer) == [pytest.approx(float(weighted_loss(logits, *books, label_smoothing=0.2)))]
    assert losses(trainer)[0] != pytest.approx(losses(usual[0])[0])


def test_a_model_that_the_trainer_makes_itself_is_made_ready_too(tmp_path):
    made = []

    def model_init():
        made.append(fresh("qwen2_vl"))
        made[-1].config.text_config.use_cache = True
        return made[-1]

    trainer = PackedTrainer(
        args=arguments(tmp_path),
        model_init=model_init,
        train_dataset=packs("qwen2_vl").index(),
        data_collator=collator("qwen2_vl"),
    )
    trainer.train()
    assert len(made) == 2
    assert trainer.model is made[-1]
    assert not any(model.config.text_config.use_cache for model in made)


def test_trainer_and_collator_must_agree_on_the_weights(data, tmp_path):
    weighing = collator(loss_weighting="sample")
    assert PackedTrainer(fresh(), arguments(tmp_path), data_collator=weighing).loss_weighting == "sample"
    with pytest.raises(ConfigError, match="to weigh by 'token', its collator by 'sample'"):
        PackedTrainer(fresh(), arguments(tmp_path), data_collator=weighing, loss_weighting="token")


def test_a_model_of_another_family_than_its_batches_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the model is of type 'qwen2_vl', but the family smolvlm"):
        PackedTrainer(fresh("qwen2_vl"), arguments(tmp_path), data_collator=collator("smolvlm"))


def test_a_batch_from_outside_without_its_books_is_refused(data, tmp_path):
    loader = PackLoader(data, batch_size=2, collate_fn=collator())
    with pytest.raises(ConfigError, match=r"has no segment_ids: .*loss_weighting=\.\.\."):
        train(tmp_path, fresh(), loader, None)
