"""PackedSFTTrainer: SFTTrainer refuses vision data in packs; with ours it trains as PackedTrainer does."""

from __future__ import annotations

import pytest
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer

from tests.family_models import tokenizer_of
from tests.tiny_models import collator, fresh, packs
from tests.unit.integrations.transformers.runs import Gradients, losses, train, weights_of
from vlmpack.errors import ConfigError
from vlmpack.integrations.trl import PackedSFTTrainer

# SFTConfig sets it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def arguments(folder, **settings):
    return SFTConfig(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            **settings,
        },
    )


def sft(folder, name, data, *, resume=None, own=None, **settings):
    gradients = Gradients()
    trainer = PackedSFTTrainer(
        fresh(name),
        arguments(folder, **settings),
        train_dataset=data,
        data_collator=collator(name),
        processing_class=tokenizer_of(name),
        callbacks=[gradients],
        **(own or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, gradients.steps


@pytest.mark.parametrize("rule", ["token", "sample"])
@pytest.mark.parametrize("name", ["smolvlm", "qwen3_vl"])
def test_it_trains_as_packed_trainer_does(name, rule, tmp_path):
    data = packs(name).index()
    ours, gradients = sft(tmp_path, name, data, own={"loss_weighting": rule})
    other, expected = train(
        tmp_path,
        fresh(name),
        data,
        collator(name),
        loss_weighting=rule,
        gradient_accumulation_steps=2,
        max_steps=3,
    )
    assert losses(ours) == pytest.approx(losses(other), abs=1e-5)
    for gradient, same in zip(gradients, expected, strict=True):
        assert float((gradient - same).abs().max()) < 1e-4
    last = [entry for entry in ours.state.log_history if "loss" in entry][-1]
    assert 0 < last["entropy"] < 10
    assert 0 <= last["mean_token_accuracy"] < 1
    assert last["useful_tokens"] == other.counts.tokens


def test_it_checkpoints_activations_as_trl_does_by_default(tmp_path):
    data = packs().index()
    _, gradients = sft(tmp_path, "smolvlm", data, max_steps=1)
    _, again = sft(tmp_path, "smolvlm", data, max_steps=1, gradient_checkpointing=True)
    assert float((gradients[0] - again[0]).abs().max()) < 1e-6


def test_it_evaluates_and_resumes(tmp_path):
    data = packs().index()
    settings = {"max_steps": 4, "optim": "adamw_torch"}
    whole, _ = sft(
        tmp_path / "whole",
        "smolvlm",
        data,
        own={"eval_dataset": data},
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        **settings,
    )
    again, _ = sft(
        tmp_path / "again", "smolvlm", data, resume=str(tmp_path / "whole" / "checkpoint-2"), **settings
    )
    assert losses(again) == losses(whole)
    assert (weights_of(again.model) == weights_of(whole.model)).all()
    evaluation = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(evaluation) == 1
    assert 0 < evaluation[0] < losses(whole)[0]


def test_plain_sft_trainer_refuses_vision_data_in_packs(tmp_path):
    """What PackedSFTTrainer is for; when TRL packs images itself, this says so."""
    from transformers import ProcessorMixin

    class Processor(ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer
            self.chat_template = tokenizer.chat_template

    data = Dataset.from_dict({"images": [[Image.new("RGB", (8, 8))]], "messages": [[]]})
    with pytest.raises(ValueError, match="Packing is not supported for vision datasets"):
        SFTTrainer(
            fresh(),
            arguments(tmp_path, packing=True),
            train_dataset=data,
            processing_class=Processor(tokenizer_of("smolvlm")),
        )


@pytest.mark.parametrize(
    ("settings", "own", "message"),
    [
        ({"packing": True}, {}, "packing=True: packs are made"),
        ({"padding_free": True}, {}, "padding_free=True"),
        ({"loss_type": "dft"}, {}, "loss_type='dft'"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
        ({}, {"formatting_func": str}, "formatting_func"),
        ({}, {"compute_metrics": str}, "compute_metrics"),
        ({"use_cache": True}, {}, "use_cache=True"),
    ],
)
def test_settings_that_do_not_go_with_packs_are_refused(settings, own, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sft(tmp_path, "smolvlm", packs().index(), own=own, **settings)


def test_a_name_instead_of_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="load it first"):
        PackedSFTTrainer(
            "a/model",
            arguments(tmp_path),
            train_dataset=None,
            data_collator=None,
            processing_class=None,
        )
