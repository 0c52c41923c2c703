"""Measuring real steps."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from vlmpack.errors import ConfigError  # noqa: E402
from vlmpack.memory.probe import SavedBytes, measure  # noqa: E402


def test_a_linear_layer_keeps_its_input_once():
    layer = torch.nn.Linear(8, 16)
    x = torch.randn(10, 8, requires_grad=True)
    counter = SavedBytes(ignore=layer.parameters())
    with counter.counting():
        y = layer(x) + layer(x)
    # both calls keep the same 10 * 8 * 4 bytes
    assert counter.total == 320
    assert y.grad_fn is not None


def test_what_the_graph_let_go_of_is_not_counted():
    x = torch.randn(100, requires_grad=True)
    counter = SavedBytes()
    with counter.counting():
        kept, dropped = x.exp(), x.sigmoid()
    assert counter.total == 2 * 400
    del dropped
    assert counter.total == 400
    kept.sum().backward()
    assert counter.total == 0
    assert torch.equal(x.grad, kept.detach())


def test_a_step_is_measured_and_its_gradients_are_right():
    layer = torch.nn.Linear(8, 1)
    x = torch.randn(10, 8)
    seen = []
    result = measure(lambda: layer(x).mean(), ignore=layer.parameters(), optimizer=lambda: seen.append(1))
    assert result.saved_bytes == 320
    assert seen == [1]
    # the mean's gradient is one tenth a row
    assert torch.allclose(layer.weight.grad[0], x.mean(0))
    if not torch.cuda.is_available():
        assert (result.device, result.peak_bytes) == ("cpu", None)


def test_a_loss_without_gradient_is_refused():
    with pytest.raises(ConfigError, match="no gradient"):
        measure(lambda: torch.ones(()))
