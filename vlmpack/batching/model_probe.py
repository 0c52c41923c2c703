"""Probes of a real model: one whole training step, or one generation, with the worst batch of a size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlmpack.batching.prime import prime_optimizer
from vlmpack.batching.rollback import Rollback
from vlmpack.batching.search_trials import ProbeOutcome
from vlmpack.errors import ConfigError
from vlmpack.memory.probe import SavedBytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.optim import Optimizer

    Batch = Mapping[str, Any]


class ModelProbe:
    """Runs a model once with the worst batch of a size, and leaves it as it was.

    On a GPU the peak is the allocator's. Elsewhere it is counted exactly: parameters, gradients, the
    optimizer's state, the batch and what autograd keeps; with `limit_bytes` that stands for a device of this
    size.

    Args:
        model: On its device.
        make_batch: Returns the inputs of a batch of so many samples, the dearest that the data can give; on
            any device.
        optimizer: Its state is allocated beforehand and its step is run, then both are forgotten. None:
            forward and backward only.
        generate_tokens: Generate so many tokens instead of training, which needs memory for keys and values.
        limit_bytes: Off a GPU: a batch that needs more does not fit.

    Raises:
        ConfigError: If a setting is wrong, or the optimizer has already stepped.
    """

    def __init__(
        self,
        model: Any,
        make_batch: Callable[[int], Batch],
        *,
        optimizer: Optimizer | None = None,
        generate_tokens: int = 0,
        limit_bytes: float | None = None,
    ) -> None:
        if generate_tokens < 0 or (generate_tokens and optimizer is not None):
            raise ConfigError(
                f"a probe trains with an optimizer or generates tokens, not both; got {generate_tokens}"
            )
        if optimizer is not None and any(optimizer.state.values()):
            raise ConfigError("the optimizer has already stepped; search before training, or without it")
        self._model = model
        self._make_batch = make_batch
        self._optimizer = optimizer
        self._generate_tokens = generate_tokens
        self._limit_bytes = limit_bytes
        self._device = next(model.parameters()).device

    @property
    def static_bytes(self) -> int:
        """What is held without a batch: parameters, buffers; in training gradients and optimizer state."""
        held = sum(_bytes(each) for each in [*self._model.parameters(), *self._model.buffers()])
        if self._generate_tokens:
            return held
        held += sum(_bytes(each) for each in self._model.parameters() if each.requires_grad)
        if self._optimizer is None:
            return held
        if not self._optimizer.state:
            prime_optimizer(self._optimizer)
        return held + sum(
            _bytes(value)
            for state in self._optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )

    def __call__(self, batch_size: int) -> ProbeOutcome:
        """Run one step; an OOM error goes to the caller.

        Args:
            batch_size: Samples.
        """
        rollback = Rollback(self._model)
        try:
            batch = {
                name: value.to(self._device) if isinstance(value, torch.Tensor) else value
                for name, value in self._make_batch(batch_size).items()
            }
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)
            kept = self._generate(batch) if self._generate_tokens else self._train(batch)
            peak = self._peak(batch, kept)
        finally:
            rollback.restore()
            if self._optimizer is not None:
                self._optimizer.state.clear()
        fits = self._device.type == "cuda" or self._limit_bytes is None or peak <= self._limit_bytes
        return ProbeOutcome(fits=fits, peak_bytes=peak)

    def _train(self, batch: Batch) -> int:
        """Run a step, and return the bytes that autograd kept."""
        self._model.train()
        if self._optimizer is not None:
            prime_optimizer(self._optimizer)
        counter = SavedBytes(ignore=[*self._model.parameters(), *self._model.buffers(), *_tensors(batch)])
        with counter.counting():
            loss = self._model(**batch).loss
        kept = counter.total
        loss.backward()
        if self._optimizer is not None:
            self._step_nowhere(self._optimizer)
        return kept

    def _step_nowhere(self, optimizer: Optimizer) -> None:
        """Run the optimizer's step with a rate of zero: its temporaries are made, no parameter moves."""
        kept = [(group["lr"], group.get("weight_decay")) for group in optimizer.param_groups]
        try:
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
                if "weight_decay" in group:
                    group["weight_decay"] = 0.0
            type(optimizer).step(optimizer)
        finally:
            for group, (rate, decay) in zip(optimizer.param_groups, kept, strict=True):
                group["lr"] = rate
                if decay is not None:
                    group["weight_decay"] = decay

    def _generate(self, batch: Batch) -> int:
        """Generate, and return the bytes of keys and values at the end."""
        self._model.eval()
        inputs = {name: value for name, value in batch.items() if name not in {"labels", "use_cache"}}
        with torch.no_grad():
            output = self._model.generate(
                **inputs,
                max_new_tokens=self._generate_tokens,
                min_new_tokens=self._generate_tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )
        cache = output["cache"] if "cache" in output else output["past_key_values"]
        layers = getattr(cache, "layers", [])
        return sum(_bytes(layer.keys) + _bytes(layer.values) for layer in layers)

    def _peak(self, batch: Batch, kept: int) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return int(torch.cuda.max_memory_allocated(self._device))
        return self.static_bytes + kept + sum(_bytes(each) for each in _tensors(batch))


def _tensors(batch: Batch) -> list[torch.Tensor]:
    return [value for value in batch.values() if isinstance(value, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
