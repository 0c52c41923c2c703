"""A resumed run is the run that was never interrupted: samples, losses and weights, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from tests.tiny_models import collator, fresh, packs
from tests.unit.integrations.transformers.runs import losses, train, weights_of
from vlmpack.errors import ConfigError
from vlmpack.ranks import PackLoader

SETTINGS = {
    "gradient_accumulation_steps": 2,
    "max_steps": -1,
    "num_train_epochs": 3,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "learning_rate": 1e-3,
}
"""11 packs, 4 a step: 3 steps an epoch, the last of 3 packs; 9 steps in all."""


def run(folder, data, **settings):
    trainer, _ = train(folder, fresh(), data, collator(loss_weighting="token"), **{**SETTINGS, **settings})
    return trainer


@pytest.fixture(scope="module")
def data():
    return packs().index()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The uninterrupted run, with a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = run(folder, data, save_strategy="steps", save_steps=1)
    assert trainer.state.global_step == 9
    return folder, trainer


@pytest.mark.parametrize("step", [1, 3, 5, 8], ids=["first epoch", "its end", "second epoch", "last step"])
def test_a_resumed_run_equals_the_uninterrupted_one(step, data, whole, tmp_path):
    folder, trainer = whole
    again = run(tmp_path, data, resume=str(folder / f"checkpoint-{step}"))
    assert again.keys == trainer.keys[step:]
    assert losses(again) == losses(trainer)
    assert torch.equal(weights_of(again.model), weights_of(trainer.model))
    assert again.counts == trainer.counts
    assert again.state.log_history[-2] == trainer.state.log_history[-2]


def test_nothing_is_read_twice_after_a_resume(whole, tmp_path):
    """The position is restored; what was had is not built again only to be dropped."""
    folder, _ = whole
    data = packs().index()
    again = run(tmp_path, data, resume=str(folder / "checkpoint-5"), num_train_epochs=2)
    assert data.report.num_packed == sum(len(step) for step in again.keys) < 27


def test_true_means_the_latest_checkpoint(data, whole, tmp_path):
    folder, trainer = whole
    copy_of(folder / "checkpoint-2", tmp_path)
    copy_of(folder / "checkpoint-7", tmp_path)
    assert run(tmp_path, data, resume=True).keys == trainer.keys[7:]
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        run(tmp_path / "checkpoint-2", data, resume=True)


@pytest.mark.parametrize("kind", ["stream", "DataLoader"])
def test_a_stream_is_resumed_too(kind, tmp_path):
    """A DataLoader has no position of its own: it is read up to the place."""
    settings = {"max_steps": 6, "num_train_epochs": 1}

    def stream():
        weighing = collator(loss_weighting="token")
        return packs() if kind == "stream" else DataLoader(packs(), batch_size=2, collate_fn=weighing)

    whole = run(tmp_path / "whole", stream(), save_strategy="steps", save_steps=2, **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    again = run(tmp_path / "again", stream(), resume=str(checkpoint), **settings)
    assert again.keys == whole.keys[4:]
    assert torch.equal(weights_of(again.model), weights_of(whole.model))
    position = json.loads((checkpoint / "data_position_0_of_1.json").read_text())
    assert (position["loader"] is None) == (kind == "DataLoader")


def test_a_loader_that_was_made_outside_is_resumed_too(data, tmp_path):
    def loader():
        return PackLoader(data, batch_size=2, collate_fn=collator(loss_weighting="token"), seed=3)

    whole = run(tmp_path / "whole", loader(), save_strategy="steps", save_steps=4)
    again = run(tmp_path / "again", loader(), resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.keys == whole.keys[4:]
    assert torch.equal(weights_of(again.model), weights_of(whole.model))


def test_a_checkpoint_without_a_position_is_refused(data, whole, tmp_path):
    folder, _ = whole
    copy = copy_of(folder / "checkpoint-5", tmp_path)
    (copy / "data_position_0_of_1.json").unlink()
    with pytest.raises(ConfigError, match="not saved by a PackedTrainer"):
        run(tmp_path, data, resume=str(copy))


def test_a_damaged_position_is_refused(data, whole, tmp_path):
    folder, _ = whole
    copy = copy_of(folder / "checkpoint-5", tmp_path)
    (copy / "data_position_0_of_1.json").write_text('{"loader": null}')
    with pytest.raises(ConfigError, match=r"(?s)is damaged: .*packs_per_step"):
        run(tmp_path, data, resume=str(copy))


def test_a_position_in_other_data_is_refused(whole, tmp_path):
    folder, _ = whole
    with pytest.raises(ConfigError, match="the saved position is of plan"):
        run(tmp_path, packs(seq_length=200).index(), resume=str(folder / "checkpoint-5"))


def test_a_position_for_another_kind_of_data_is_refused(whole, tmp_path):
    folder, _ = whole
    with pytest.raises(ConfigError, match=r"position of a PackLoader .* nothing to a ResumableLoader"):
        run(tmp_path, packs(), resume=str(folder / "checkpoint-5"), max_steps=9)


def test_steps_of_another_size_are_refused_where_epochs_are_counted(data, whole, tmp_path):
    folder, _ = whole
    with pytest.raises(ConfigError, match=r"a step had 4 packs over all ranks .* has 2 now"):
        run(tmp_path, data, resume=str(folder / "checkpoint-5"), gradient_accumulation_steps=1)


def test_with_max_steps_the_data_goes_on_exactly_in_steps_of_another_size(data, whole, tmp_path):
    """After 4 steps of 4, 4, 3 and 4 packs the second epoch has 7 left; now 2 packs a step."""
    folder, trainer = whole
    again = run(
        tmp_path, data, resume=str(folder / "checkpoint-4"), gradient_accumulation_steps=1, max_steps=8
    )
    had = [key for step in trainer.keys[4:6] for key in step]
    assert [key for step in again.keys for key in step] == had


def test_positions_are_plain_json(whole):
    folder, _ = whole
    position = json.loads((folder / "checkpoint-5" / "data_position_0_of_1.json").read_text())
    assert position["packs_per_step"] == 4
    assert position["loader"]["epoch"] == 1


def copy_of(checkpoint, folder):
    return shutil.copytree(checkpoint, folder / checkpoint.name)
