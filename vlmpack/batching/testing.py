"""Out-of-memory errors on demand, without a GPU: a hidden memory function, and faults at chosen places.

    simulator = OOMSimulator(lambda inputs: 1e9 + 2e6 * inputs["input_ids"].numel(), limit_bytes=8e9)
    with simulator.attached(model, at="layers.1"):
        ...                                       # the forward or the backward pass raises like a GPU's

The error in the backward pass comes from the middle of the model, so that the layers behind it already have
gradients: the state that a recovery must undo. `simulator.backend` is a device whose peak is the function's
value, for whoever reads memory instead of waiting for errors.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from vlmpack.errors import ConfigError
from vlmpack.memory.device import FakeMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

Phase: TypeAlias = Literal["forward", "backward", "random"]
"""Where a batch that is too large fails; "random" draws one of the other two each time."""


def simulated_oom(wanted_bytes: float = 2.0 * 2**30, limit_bytes: float = 8.0 * 2**30) -> Exception:
    """Return the error that a full GPU raises.

    Args:
        wanted_bytes: What was asked for.
        limit_bytes: What the device has.
    """
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {wanted_bytes / 2**30:.2f} GiB. GPU 0 has a total capacity "
        f"of {limit_bytes / 2**30:.2f} GiB (simulated)"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFault:
    """An error at a given place, whatever the memory function says."""

    call: int
    """Which forward pass in training, counted from 0 since the simulator was made, retries included."""
    phase: Literal["forward", "backward"]
    """Whether it fails on the way in or on the way back."""


class _RaiseInBackward(torch.autograd.Function):
    """The identity, whose gradient cannot be computed."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, error: Callable[[], Exception]) -> torch.Tensor:
        ctx.error = error
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # noqa: ARG004
        raise ctx.error()


class OOMSimulator:
    """A device with a memory function that whoever is tested cannot see.

    Args:
        memory: Keyword inputs of a forward pass -> bytes that the step takes at its peak.
        limit_bytes: What the device has.
        phase: Where a batch that is too large fails.
        faults: Errors at given forward passes besides.
        seed: For `phase="random"`.

    Raises:
        ConfigError: If the limit is not positive or the phase unknown.
    """

    def __init__(
        self,
        memory: Callable[[Mapping[str, Any]], float] = lambda _: 0.0,
        *,
        limit_bytes: float = float("inf"),
        phase: Phase = "forward",
        faults: Iterable[MemoryFault] = (),
        seed: int = 0,
    ) -> None:
        if limit_bytes <= 0:
            raise ConfigError(f"limit_bytes must be positive, got {limit_bytes}")
        if phase not in get_args(Phase):
            raise ConfigError(f"phase must be one of {get_args(Phase)}, got {phase!r}")
        self.memory = memory
        self.limit_bytes = limit_bytes
        self.phase: Phase = phase
        self.faults = {fault.call: fault.phase for fault in faults}
        self.backend = FakeMemory(total=int(min(limit_bytes, 2**62)))
        """A device that shows the function's value as its peak."""
        self.num_calls = 0
        """Forward passes in training so far."""
        self.num_ooms = 0
        """Errors raised so far."""
        self.peaks: deque[float] = deque(maxlen=10_000)
        """The function's value of the last forward passes that fitted."""
        self._random = random.Random(seed)

    def charge(self, inputs: Mapping[str, Any]) -> Literal["forward", "backward"] | None:
        """Count a forward pass, and return where it fails, or None; for simulations without a model.

        Args:
            inputs: What the memory function is given.
        """
        call = self.num_calls
        self.num_calls += 1
        wanted = self.memory(inputs)
        if call in self.faults:
            return self._fail(self.faults[call])
        if wanted > self.limit_bytes:
            if self.phase == "random":
                return self._fail("backward" if self._random.random() < 0.5 else "forward")
            return self._fail(self.phase)
        self.backend.peak = max(self.backend.peak, int(wanted))
        self.peaks.append(wanted)
        return None

    def _fail(self, phase: Literal["forward", "backward"]) -> Literal["forward", "backward"]:
        self.num_ooms += 1
        return phase

    def error(self) -> Exception:
        """Return a new error of this device."""
        return simulated_oom(limit_bytes=min(self.limit_bytes, 2.0**62))

    @contextlib.contextmanager
    def attached(self, model: torch.nn.Module, *, at: str | None = None) -> Iterator[OOMSimulator]:
        """Let the model's training passes fail as this device would; evaluation is left alone.

        Args:
            model: Called with keyword inputs.
            at: Name of the submodule at whose output the backward pass fails; None: one in the middle.

        Yields:
            This simulator.

        Raises:
            ConfigError: If there is no such submodule.
        """
        modules = dict(model.named_modules())
        if at is not None and at not in modules:
            raise ConfigError(f"the model has no submodule {at!r}; it has {sorted(modules)[:20]}")
        armed = [False]

        def enter(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            if not (module.training and torch.is_grad_enabled()):
                return
            failing = self.charge(kwargs)
            armed[0] = failing == "backward"
            if failing == "forward":
                raise self.error()

        def leave(module: torch.nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
            if not armed[0]:
                return output
            armed[0] = False
            return _trap(output, self.error)

        handles = [
            model.register_forward_pre_hook(enter, with_kwargs=True),
            modules[at if at is not None else _middle(model)].register_forward_hook(leave),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def _middle(model: torch.nn.Module) -> str:
    """Return a submodule in the middle: a block of the longest list of blocks, else the middle leaf."""
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)
    ]
    if lists:
        name, blocks = max(lists, key=lambda pair: len(pair[1]))
        return f"{name}.{len(blocks) // 2}".lstrip(".")
    leaves: list[str] = [name for name, module in model.named_modules() if not list(module.children())]
    return leaves[len(leaves) // 2]


def _trap(output: Any, error: Callable[[], Exception]) -> Any:
    """Put the failing identity behind the first tensor of an output that has a gradient."""
    if isinstance(output, torch.Tensor) and output.requires_grad:
        return _RaiseInBackward.apply(output, error)  # type: ignore[no-untyped-call]
    if isinstance(output, tuple | list):
        head, *rest = output
        return type(output)([_trap(head, error), *rest])
    if isinstance(output, dict):
        for name, value in output.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                output[name] = _RaiseInBackward.apply(value, error)  # type: ignore[no-untyped-call]
                break
    return output


@contextlib.contextmanager
def optimizer_fault(after: int = 1) -> Iterator[None]:
    """Let an optimizer run out of memory in the middle of making its state.

    AdamW makes `step` first and the moments after it with `torch.zeros_like`; that call is what fails, so a
    half-made state stays behind, as on a real device.

    Args:
        after: Calls of `torch.zeros_like` that still succeed.

    Yields:
        Nothing.
    """
    real = torch.zeros_like
    left = [after]

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        if left[0] <= 0:
            raise simulated_oom()
        left[0] -= 1
        return real(*args, **kwargs)

    torch.zeros_like = failing
    try:
        yield
    finally:
        torch.zeros_like = real
