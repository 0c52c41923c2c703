"""Gradient checkpointing on any model: the same gradient, less kept, and a prediction of how much."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.toy_training import Causal, Texts, collate, gradients
from vlmpack.batching import GradientCheckpointManager
from vlmpack.errors import ConfigError
from vlmpack.memory import PRESETS, TrainingRegime


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    return LlamaForCausalLM(config).train()


def kept_bytes(model: torch.nn.Module, **batch: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters aside; the gradient is computed too."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch)["loss"]
    size = sum(kept.values())
    loss.backward()
    return size


@pytest.mark.parametrize("every", [1, 2])
def test_a_transformers_model_is_checkpointed_by_its_own_method(every):
    ids = torch.arange(24).reshape(2, 12)
    plain, model = llama(), llama()
    before = kept_bytes(plain, input_ids=ids, labels=ids)
    assert GradientCheckpointManager.enable_gradient_checkpointing(model, every_n_layers=every)
    assert GradientCheckpointManager.is_enabled(model)
    assert not GradientCheckpointManager.enable_gradient_checkpointing(model)  # it was on
    assert kept_bytes(model, input_ids=ids, labels=ids) < before
    assert torch.allclose(gradients(model), gradients(plain), atol=1e-6)
    GradientCheckpointManager.disable_gradient_checkpointing(model)
    assert not GradientCheckpointManager.is_enabled(model)


def test_any_model_with_a_list_of_blocks_is_checkpointed():
    batch = collate(Texts(4).samples)
    plain, model = Causal(), Causal()
    before = kept_bytes(plain, **batch)
    assert GradientCheckpointManager.enable_gradient_checkpointing(model, every_n_layers=2)
    assert [hasattr(layer, "_vlmpack_checkpointed") for layer in model.layers] == [True, False, True]
    kept_bytes(model, **batch)
    assert torch.equal(gradients(model), gradients(plain))
    with torch.no_grad():
        assert torch.equal(model(**batch)["loss"], plain(**batch)["loss"])
    GradientCheckpointManager.disable_gradient_checkpointing(model)
    assert not GradientCheckpointManager.is_enabled(model)
    model.zero_grad()
    assert kept_bytes(model, **batch) == before


def test_an_older_method_is_called_where_there_is_no_newer_one():
    class Old(torch.nn.Module):
        is_gradient_checkpointing = False

        def gradient_checkpointing_enable(self) -> None:
            self.is_gradient_checkpointing = True

    model = Old()
    assert GradientCheckpointManager.enable_gradient_checkpointing(model)
    assert GradientCheckpointManager.is_enabled(model)
    with pytest.raises(ConfigError, match="Old can only checkpoint all layers"):
        GradientCheckpointManager.enable_gradient_checkpointing(Old(), every_n_layers=2)


def test_the_saving_is_predicted_and_the_least_that_fits_is_found():
    shape, regime = PRESETS["smolvlm-256m"], TrainingRegime()
    size = {"rows": 2, "tokens_per_row": 2048, "tiles": 24}
    every = GradientCheckpointManager.predicted_saving(shape, regime, **size)
    second = GradientCheckpointManager.predicted_saving(shape, regime, **size, every_n_layers=2)
    assert every.saved_share > 0.25  # "about 25 %" is far below what all layers save
    assert second.saved_bytes == pytest.approx(every.saved_bytes / 2)
    without = every.peak_bytes + every.saved_bytes
    fit = GradientCheckpointManager.fit
    assert fit(shape, regime, **size, available_bytes=without).every_n_layers == 0
    assert fit(shape, regime, **size, available_bytes=second.peak_bytes).every_n_layers == 2
    assert fit(shape, regime, **size, available_bytes=second.peak_bytes - 1).every_n_layers == 1
    with pytest.raises(ConfigError, match="GiB too much"):
        fit(shape, regime, **size, available_bytes=every.peak_bytes - 1)


def test_what_cannot_be_checkpointed_says_why():
    with pytest.raises(ConfigError, match="Linear has no method for checkpointing and no list of blocks"):
        GradientCheckpointManager.enable_gradient_checkpointing(torch.nn.Linear(1, 1))
    for call in (
        lambda: GradientCheckpointManager.enable_gradient_checkpointing(Causal(), every_n_layers=0),
        lambda: GradientCheckpointManager.predicted_saving(
            PRESETS["smolvlm-256m"], TrainingRegime(), rows=1, tokens_per_row=8, tiles=1, every_n_layers=0
        ),
    ):
        with pytest.raises(ConfigError, match="every_n_layers must be at least 1"):
            call()
