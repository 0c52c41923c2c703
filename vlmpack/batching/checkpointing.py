"""Turn gradient checkpointing on for any model, and say what it saves before it is tried.

A checkpointed layer keeps its input and computes the rest again in the backward pass. The reference document
promises about 25 %; what it really saves depends on the model: of the floats a ViT layer keeps for each
token, 8H + 2I + A + 4 shrink to H.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.checkpoint import checkpoint

from vlmpack.errors import ConfigError
from vlmpack.memory.estimate import estimate

if TYPE_CHECKING:
    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.regime import TrainingRegime

_ON: Final = "_vlmpack_checkpointed"
"""Marks blocks of models without a method of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaving:
    """What checkpointing every n-th layer of both towers buys in one step."""

    every_n_layers: int
    """1: every layer; 0: none is needed."""
    peak_bytes: float
    """The step's peak with it."""
    saved_bytes: float
    """What it takes off the peak."""

    @property
    def saved_share(self) -> float:
        """Saved bytes / peak without it."""
        return self.saved_bytes / (self.peak_bytes + self.saved_bytes)


class GradientCheckpointManager:
    """Gradient checkpointing, whatever the model calls it."""

    @staticmethod
    def enable_gradient_checkpointing(model: torch.nn.Module, *, every_n_layers: int = 1) -> bool:
        """Turn it on.

        By the model's `activation_checkpointing_enable`, or its older `gradient_checkpointing_enable`; a
        model with neither has the blocks of its lists (`torch.nn.ModuleList`) checkpointed.

        Args:
            model: Any module.
            every_n_layers: Checkpoint one layer of so many: more memory, less time.

        Returns:
            Whether anything changed.

        Raises:
            ConfigError: If `every_n_layers` is not positive, the model cannot skip layers, or it has no list
                of blocks.
        """
        if every_n_layers < 1:
            raise ConfigError(f"every_n_layers must be at least 1, got {every_n_layers}")
        if GradientCheckpointManager.is_enabled(model):
            return False
        more: dict[str, Any] = {} if every_n_layers == 1 else {"every_n_layers": every_n_layers}
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(**more)
            return True
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is not None:
            if more:
                raise ConfigError(f"{type(model).__name__} can only checkpoint all layers (every_n_layers=1)")
            enable()
            return True
        _checkpoint_blocks(model, every_n_layers)
        return True

    @staticmethod
    def is_enabled(model: torch.nn.Module) -> bool:
        """Return whether any layer is checkpointed."""
        for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
            if hasattr(type(model), name):  # the older one warns where both are there
                return bool(getattr(model, name))
        return any(hasattr(module, _ON) for module in model.modules())

    @staticmethod
    def disable_gradient_checkpointing(model: torch.nn.Module) -> None:
        """Turn it off again."""
        for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
            disable = getattr(model, name, None)
            if disable is not None:
                disable()
                return
        for module in model.modules():
            if hasattr(module, _ON):
                module.forward = getattr(module, _ON)
                delattr(module, _ON)

    @staticmethod
    def predicted_saving(
        shape: ModelShape,
        regime: TrainingRegime,
        *,
        rows: int,
        tokens_per_row: int,
        tiles: float,
        every_n_layers: int = 1,
    ) -> CheckpointSaving:
        """Return what it would save, from the memory model.

        Checkpointing one layer of n saves a share of 1/n of what all layers would: layers are alike.

        Args:
            shape: The model's sizes.
            regime: How it is trained, without checkpointing.
            rows: Rows of the batch.
            tokens_per_row: Positions of each.
            tiles: Tiles of the batch.
            every_n_layers: One layer of so many.

        Raises:
            ConfigError: If `every_n_layers` is not positive.
        """
        if every_n_layers < 1:
            raise ConfigError(f"every_n_layers must be at least 1, got {every_n_layers}")
        off, on = _peaks(shape, regime, rows, tokens_per_row, tiles)
        saved = max(0.0, off - on) / every_n_layers
        return CheckpointSaving(every_n_layers=every_n_layers, peak_bytes=off - saved, saved_bytes=saved)

    @staticmethod
    def fit(
        shape: ModelShape,
        regime: TrainingRegime,
        *,
        rows: int,
        tokens_per_row: int,
        tiles: float,
        available_bytes: float,
    ) -> CheckpointSaving:
        """Return the least checkpointing with which the predicted peak fits.

        Args:
            shape: The model's sizes.
            regime: How it is trained, without checkpointing.
            rows: Rows of the batch.
            tokens_per_row: Positions of each.
            tiles: Tiles of the batch.
            available_bytes: What the step may take.

        Raises:
            ConfigError: If it does not fit with every layer checkpointed; says by how much.
        """
        off, on = _peaks(shape, regime, rows, tokens_per_row, tiles)
        if off <= available_bytes:
            return CheckpointSaving(every_n_layers=0, peak_bytes=off, saved_bytes=0.0)
        if on > available_bytes:
            raise ConfigError(
                f"with every layer checkpointed the step needs {on / 2**30:.2f} GiB, "
                f"{available_bytes / 2**30:.2f} GiB are there: {(on - available_bytes) / 2**30:.2f} GiB too "
                "much; make the batch smaller"
            )
        every = max(1, int((off - on) / (off - available_bytes)))
        saved = (off - on) / every
        return CheckpointSaving(every_n_layers=every, peak_bytes=off - saved, saved_bytes=saved)


def _peaks(
    shape: ModelShape, regime: TrainingRegime, rows: int, tokens_per_row: int, tiles: float
) -> tuple[float, float]:
    """Return the step's peak without and with every layer checkpointed."""
    off, on = (
        estimate(
            shape,
            regime.model_copy(update={"checkpoint_language": each, "checkpoint_vision": each}),
            rows=rows,
            tokens_per_row=tokens_per_row,
            tiles=tiles,
        ).peak_bytes
        for each in (False, True)
    )
    return float(off), float(on)


def _checkpoint_blocks(model: torch.nn.Module, every_n_layers: int) -> None:
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no method for checkpointing and no list of blocks to checkpoint: "
            "give it a gradient_checkpointing_enable() of its own"
        )
    inner = {id(each) for blocks in lists for each in blocks.modules() if each is not blocks}
    for blocks in (blocks for blocks in lists if id(blocks) not in inner):
        for number, block in enumerate(blocks):
            if number % every_n_layers == 0:
                setattr(block, _ON, block.forward)
                block.forward = functools.partial(_checkpointed, block)


def _checkpointed(block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = getattr(block, _ON)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
