"""The simulator fails where it says, leaves what a real failure leaves, and hides its memory function."""

from __future__ import annotations

import pytest
import torch

from vlmpack.batching.testing import MemoryFault, OOMSimulator, optimizer_fault, simulated_oom
from vlmpack.errors import ConfigError


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(4))

    def forward(self, *, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def affine(inputs: dict) -> float:
    return 100.0 + 10.0 * inputs["x"].shape[0]


def test_a_batch_over_the_limit_fails_on_the_way_in_and_one_below_passes():
    model, simulator = Net(), OOMSimulator(affine, limit_bytes=150)
    with simulator.attached(model):
        model(x=torch.ones(5, 3)).backward()  # 150 bytes: just fits
        assert simulator.backend.read().peak == 150
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            model(x=torch.ones(6, 3))
    assert (simulator.num_calls, simulator.num_ooms) == (2, 1)
    model(x=torch.ones(60, 3))  # no longer attached


def test_a_failure_in_the_backward_pass_leaves_gradients_of_later_layers_only():
    model, simulator = Net(), OOMSimulator(affine, limit_bytes=100, phase="backward")
    with simulator.attached(model, at="layers.1"):
        loss = model(x=torch.ones(1, 3))
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    has_gradient = [layer.weight.grad is not None for layer in model.layers]
    assert has_gradient == [False, False, True, True]


def test_faults_come_at_the_calls_that_were_asked_for():
    simulator = OOMSimulator(
        faults=[MemoryFault(call=1, phase="forward"), MemoryFault(call=3, phase="backward")]
    )
    assert [simulator.charge({}) for _ in range(5)] == [None, "forward", None, "backward", None]


def test_random_phases_are_seeded_and_both_occur():
    def phases() -> list:
        simulator = OOMSimulator(lambda _: 2.0, limit_bytes=1, phase="random", seed=3)
        return [simulator.charge({}) for _ in range(20)]

    assert phases() == phases()
    assert set(phases()) == {"forward", "backward"}


def test_evaluation_is_left_alone():
    model, simulator = Net(), OOMSimulator(affine, limit_bytes=1)
    with simulator.attached(model), torch.no_grad():
        model(x=torch.ones(2, 3))
        model.eval()
        model(x=torch.ones(2, 3))
    assert simulator.num_calls == 0


def test_an_optimizer_fault_leaves_the_half_made_state_that_kills_a_plain_retry():
    model = Net()
    model(x=torch.ones(1, 3)).backward()
    optimizer = torch.optim.AdamW(model.parameters())
    with optimizer_fault(after=0), pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert any("step" in state and "exp_avg" not in state for state in optimizer.state.values())
    with pytest.raises(KeyError):
        optimizer.step()
    assert torch.zeros_like(torch.ones(1)).item() == 0  # the fault is gone


def test_wrong_settings_are_errors():
    with pytest.raises(ConfigError, match="limit_bytes"):
        OOMSimulator(limit_bytes=0)
    with pytest.raises(ConfigError, match="phase"):
        OOMSimulator(phase="sideways")
    with (
        pytest.raises(ConfigError, match="no submodule 'nowhere'"),
        OOMSimulator().attached(Net(), at="nowhere"),
    ):
        pass
    assert isinstance(simulated_oom(), torch.OutOfMemoryError)
