"""Probes of real model classes: exact on the CPU, and nothing of the model changes."""

from __future__ import annotations

import json

import pytest
import torch

from vlmpack.batching import BatchSizeSearch, ModelProbe
from vlmpack.batching.probe_models import TINY_SMOLVLM, load_probed_model
from vlmpack.errors import ConfigError


@pytest.fixture(scope="module")
def probed():
    torch.manual_seed(0)
    return load_probed_model(None)


def probe(probed, **options):
    return ModelProbe(probed.model, probed.batches(2, 8), **options)


def test_the_worst_batch_has_every_crop_and_the_longest_text(probed):
    # 64 pixels in patches of 8: 64 patches, shuffled 2 x 2 to 16 tokens a crop.
    batch = probed.batches(3, 10)(4)
    assert probed.tokens_per_crop == 16
    assert batch["input_ids"].shape == (4, 3 * 16 + 10)
    assert batch["pixel_values"].shape == (4, 3, 3, 64, 64)
    assert (batch["input_ids"] == probed.model.config.image_token_id).sum().item() == 4 * 48


def test_a_peak_off_the_gpu_is_static_bytes_plus_what_grows_with_the_batch(probed):
    optimizer = torch.optim.AdamW(probed.model.parameters())
    run = probe(probed, optimizer=optimizer)
    parameters = sum(p.numel() * 4 for p in probed.model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in probed.model.buffers())
    counters = 4 * len(list(probed.model.parameters()))  # AdamW's step, a float32 a parameter
    assert run.static_bytes == 4 * parameters + buffers + counters
    peaks = [run(size).peak_bytes for size in (1, 2, 3)]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=1e-4), "each sample adds the same"
    assert run.static_bytes < peaks[0]


def test_generating_needs_keys_and_values(probed):
    run = probe(probed, generate_tokens=5)
    few, more = run(1).peak_bytes, probe(probed, generate_tokens=9)(1).peak_bytes
    # 2 layers, keys and values, 2 heads of 16, float32: 512 bytes a token and sample; 4 tokens more.
    assert more - few == 4 * 512


def test_the_model_the_optimizer_and_the_random_numbers_are_as_before(probed):
    before = {name: value.clone() for name, value in probed.model.state_dict().items()}
    optimizer = torch.optim.AdamW(probed.model.parameters(), lr=0.1, weight_decay=0.1)
    state = torch.get_rng_state()
    probe(probed, optimizer=optimizer)(2)
    after = probed.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in probed.model.parameters())
    assert (len(optimizer.state), optimizer.param_groups[0]["lr"]) == (0, 0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_search_finds_what_a_device_of_this_size_takes(probed):
    free = probe(probed)
    one, two = free(1).peak_bytes, free(2).peak_bytes
    limit = one + 20.5 * (two - one)  # 21 samples fit, 22 do not
    run = probe(probed, limit_bytes=limit)
    search = BatchSizeSearch(limit_bytes=limit, static_bytes=run.static_bytes)
    found = search.run(run, estimate=9, cap=64)
    assert found.batch_size == 21
    assert len(found.trials) <= 4


def test_wrong_probes_are_refused(probed):
    optimizer = torch.optim.AdamW(probed.model.parameters())
    with pytest.raises(ConfigError, match="not both"):
        probe(probed, optimizer=optimizer, generate_tokens=4)
    parameter = next(iter(probed.model.parameters()))
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parameter.grad = None
    with pytest.raises(ConfigError, match="already stepped"):
        probe(probed, optimizer=optimizer)
    with pytest.raises(ConfigError, match="at least 1 text token"):
        probed.batches(2, 0)


def test_a_configuration_comes_from_a_local_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_SMOLVLM))
    assert load_probed_model(tmp_path / "config.json").tokens_per_crop == 16
    text = {**TINY_SMOLVLM["text_config"], "model_type": "llama"}
    (tmp_path / "text.json").write_text(json.dumps(text))
    model = load_probed_model(tmp_path / "text.json")
    assert ModelProbe(model.model, model.batches(0, 12))(2).peak_bytes > 0
    with pytest.raises(ConfigError, match="llama takes no crops"):
        model.batches(1, 12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no model configuration"),
        ("{}", "no configuration"),
        ('{"model_type": "nothing"}', "nothing"),
    ],
)
def test_a_configuration_that_is_none_says_why(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_probed_model(tmp_path / "config.json")
