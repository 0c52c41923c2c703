"""Steps of PackedTrainer: equal to the same steps on samples one by one, whatever the split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.family_models import TEXT, size_of, tokenizer_of
from tests.tiny_models import alone, collator, fresh, llama, packs
from tests.unit.integrations.transformers.runs import arguments, gradient_of, losses, train
from vlmpack.errors import ConfigError
from vlmpack.integrations.transformers import PackedTrainer
from vlmpack.ranks import PackLoader

FAMILIES = ("smolvlm", "qwen2_vl", "qwen3_vl")
NUM_SAMPLES = 27


@pytest.fixture(scope="module")
def indexed():
    return {name: packs(name).index() for name in FAMILIES}


def one_by_one(name, data, rule, *, num_packs):
    """Return the loss and the gradient of the first packs from their samples alone, by the definition."""
    model = fresh(name)
    parts = []
    for pack in next(iter(PackLoader(data, batch_size=num_packs, collate_fn=list, seed=42))):
        for key in pack.keys:
            batch = alone(name, data, key)
            labels = batch.pop("labels")[0]
            logits = model(**batch).logits[0]
            learnt = labels[1:] != -100
            each = F.cross_entropy(logits[:-1][learnt], labels[1:][learnt], reduction="none")
            parts.append((each.sum(), len(each)))
    scale = {"token": lambda n: 1.0, "sample": lambda n: 1 / n, "sqrt": lambda n: n**-0.5}[rule]
    loss = sum(scale(n) * total for total, n in parts) / sum(scale(n) * n for _, n in parts)
    loss.backward()
    return float(loss.detach()), gradient_of(model)


@pytest.mark.parametrize("rule", ["token", "sample", "sqrt"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_equals_the_step_on_its_samples(name, rule, indexed, tmp_path):
    trainer, (gradient,) = train(
        tmp_path,
        fresh(name),
        indexed[name],
        collator(name),
        gradient_accumulation_steps=2,
        loss_weighting=rule,
    )
    loss, expected = one_by_one(name, indexed[name], rule, num_packs=4)
    assert float(expected.abs().max()) > 0.1
    assert float((gradient - expected).abs().max()) < 1e-5
    assert losses(trainer) == [pytest.approx(loss, abs=1e-5)]


class TextOnly:
    """The batches of a family for a language model alone."""

    def __call__(self, packed):
        batch = collator("qwen2_vl", loss_weighting="token")(packed)
        for name in ("pixel_values", "image_grid_thw"):
            batch.pop(name, None)
        return batch | {"position_ids": batch["position_ids"][0]}


@pytest.mark.parametrize("rule", ["token", "sample", "sqrt"])
def test_no_split_into_micro_batches_changes_the_gradient(rule, indexed, tmp_path):
    gradients = []
    for packs_a_batch, batches in ((4, 1), (2, 2), (1, 4)):
        _, steps = train(
            tmp_path,
            llama().double(),
            indexed["qwen2_vl"],
            TextOnly(),
            per_device_train_batch_size=packs_a_batch,
            gradient_accumulation_steps=batches,
            loss_weighting=rule,
        )
        gradients.append(steps[0])
    for other in gradients[1:]:
        assert float((other - gradients[0]).abs().max()) < 1e-12


def test_the_last_step_of_an_epoch_is_divided_by_what_it_holds(indexed, tmp_path):
    """11 packs, 4 a step: the third step has 3, in batches of 2 and 1."""
    data = indexed["smolvlm"]
    assert len(data) == 11
    trainer, steps = train(
        tmp_path,
        fresh(),
        data,
        collator(),
        gradient_accumulation_steps=2,
        max_steps=-1,
        num_train_epochs=1,
        learning_rate=0.0,
    )
    assert trainer.state.global_step == len(steps) == 3
    last = collator()(
        [pack for batch in PackLoader(data, batch_size=1, collate_fn=list, seed=42) for pack in batch][8:]
    )
    model = fresh()
    learnt = last["labels"][:, 1:] != -100
    names = ("input_ids", "position_ids", "use_cache", "pixel_values")
    logits = model(**{name: last[name] for name in names if name in last}).logits
    F.cross_entropy(logits[:, :-1][learnt], last["labels"][:, 1:][learnt]).backward()
    assert float((steps[2] - gradient_of(model)).abs().max()) < 1e-5


def test_every_sample_is_trained_on_once_an_epoch(indexed, tmp_path):
    trainer, _ = train(
        tmp_path,
        fresh(),
        indexed["smolvlm"],
        collator(),
        gradient_accumulation_steps=2,
        max_steps=-1,
        num_train_epochs=2,
    )
    names = sorted(map(str, range(NUM_SAMPLES)))
    assert sorted(key for keys in trainer.keys[:3] for key in keys) == names
    assert sorted(key for keys in trainer.keys[3:] for key in keys) == names
    assert trainer.keys[:3] != trainer.keys[3:]


def test_a_stream_is_trained_on_pass_after_pass(tmp_path):
    trainer, _ = train(tmp_path, fresh(), packs(), collator(), max_steps=9)
    keys = [key for step in trainer.keys for key in step]
    assert sorted(keys[:NUM_SAMPLES]) == sorted(map(str, range(NUM_SAMPLES)))
    assert len(keys) > 30
    assert keys[NUM_SAMPLES:] == keys[: len(keys) - NUM_SAMPLES]


def test_logs_say_what_went_through_training(indexed, tmp_path):
    data = packs().index()
    trainer, _ = train(tmp_path, fresh(), data, collator(), max_steps=-1, num_train_epochs=1)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    report = data.report
    assert last["samples_seen"] == report.num_packed == NUM_SAMPLES
    useful = sum(int((pack.segment_ids > 0).sum()) for pack in data_of(data))
    assert last["useful_tokens"] == useful
    steps = [entry["padding"] for entry in trainer.state.log_history if "loss" in entry]
    positions = [448, 448, 448, 448, 448, 224]
    assert sum((1 - share) * size for share, size in zip(steps, positions, strict=True)) == useful


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_evaluation_loss_is_that_of_all_tokens(batch_size, indexed, tmp_path):
    data, model = indexed["smolvlm"], fresh()
    trainer = PackedTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=batch_size),
        eval_dataset=data,
        data_collator=collator(),
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected, _ = sums(model, data)
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    mean_of_means = np.mean([sums(model, [pack])[0] for pack in data_of(data)])
    assert abs(mean_of_means - expected) > 1e-3, "the guard"


def data_of(data):
    return [data[number] for number in range(len(data))]


@torch.no_grad()
def sums(model, data):
    """Return the mean loss over all supervised tokens, pack by pack, and their number."""
    total, number = 0.0, 0
    for pack in data_of(data):
        batch = collator()([pack])
        learnt = batch["labels"][:, 1:] != -100
        names = ("input_ids", "position_ids", "use_cache", "pixel_values")
        logits = model(**{name: batch[name] for name in names if name in batch}).logits
        each = F.cross_entropy(logits[:, :-1][learnt], batch["labels"][:, 1:][learnt], reduction="none")
        total, number = total + float(each.sum()), number + len(each)
    return total / number, number


def test_metrics_see_logits_and_labels(indexed, tmp_path):
    seen, size = {}, size_of(tokenizer_of("smolvlm"))

    def accuracy(prediction):
        logits, labels = prediction.predictions, prediction.label_ids
        seen["shapes"] = logits.shape, labels.shape
        learnt = labels[:, 1:] != -100
        return {"accuracy": float((logits[:, :-1].argmax(-1) == labels[:, 1:])[learnt].mean())}

    trainer = PackedTrainer(
        fresh(),
        arguments(tmp_path),
        eval_dataset={"all": indexed["smolvlm"]},
        data_collator=collator(),
        compute_metrics=accuracy,
    )
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_all_accuracy"] < 1
    assert seen["shapes"] == ((11, 224, size), (11, 224))
    assert trainer.predict(indexed["smolvlm"]).metrics["test_loss"] == pytest.approx(metrics["eval_all_loss"])


def test_weights_that_a_batch_brings_are_those_that_count(indexed, tmp_path):
    class First(TextOnly):
        def __call__(self, packed):
            batch = super().__call__(packed)
            weights = torch.zeros(batch["labels"].shape)
            weights[0, int((batch["labels"][0] != -100).nonzero()[0])] = 1
            return batch | {"loss_weights": weights}

    trainer, _ = train(tmp_path, llama(), indexed["qwen2_vl"], First())
    assert trainer.counts.supervised == 1


def test_a_mixture_of_experts_is_balanced_by_the_mean_over_the_step(indexed, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    def mixtral():
        torch.manual_seed(0)
        config = MixtralConfig(
            **TEXT,
            vocab_size=400,
            num_local_experts=3,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
            initializer_range=0.2,
        )
        return MixtralForCausalLM(config)

    trainer, _ = train(tmp_path, mixtral(), indexed["qwen2_vl"], TextOnly(), gradient_accumulation_steps=2)
    model, collator = mixtral(), TextOnly()
    loader = iter(PackLoader(indexed["qwen2_vl"], batch_size=2, collate_fn=collator, seed=42))
    batches = [next(loader), next(loader)]
    names = ("input_ids", "position_ids", "use_cache")
    with torch.no_grad():
        auxiliary = [float(model(**{name: batch[name] for name in names}).aux_loss) for batch in batches]
        losses_ = [
            (
                F.cross_entropy(
                    model(**{name: batch[name] for name in names}).logits[:, :-1].flatten(0, 1),
                    batch["labels"][:, 1:].flatten(),
                    reduction="sum",
                ),
                int((batch["labels"] != -100).sum()),
            )
            for batch in batches
        ]
    expected = float(sum(loss for loss, _ in losses_)) / sum(number for _, number in losses_)
    assert losses(trainer) == [pytest.approx(expected + 0.5 * np.mean(auxiliary), abs=1e-4)]


def test_caches_are_off_in_both_configs(tmp_path):
    model = fresh("qwen2_vl")
    model.config.text_config.use_cache = True
    PackedTrainer(model, arguments(tmp_path))
    assert model.config.use_cache is False
    assert model.config.text_config.use_cache is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch | {"attention_mask": torch.ones_like(batch["input_ids"])}, "two dimensions"),
        (lambda batch: {name: batch[name] for name in batch if name != "position_ids"}, "no position_ids"),
        (lambda batch: list(batch.items()), "must be a mapping"),
    ],
)
def test_a_batch_that_would_not_be_isolated_is_refused(change, message, indexed, tmp_path):
    class Changed(TextOnly):
        def __call__(self, packed):
            return change(super().__call__(packed))

    with pytest.raises(ConfigError, match=message):
        train(tmp_path, llama(), indexed["qwen2_vl"], Changed())


def test_data_that_is_not_packed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a list is not packed: give a ConstantLengthDataset"):
        train(tmp_path, llama(), [{"input_ids": [1]}], TextOnly())


def test_an_evaluation_without_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs an eval_dataset"):
        PackedTrainer(llama(), arguments(tmp_path)).evaluate()
