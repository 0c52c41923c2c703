"""Make a model ready for packs: switch off what contaminates, refuse what cannot be isolated.

Each rule here is a setting under which transformers lets the samples of a row see each other, without a word.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from vlmpack.errors import ConfigError
from vlmpack.families.table import family_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.utils.hooks import RemovableHandle

    from vlmpack.families.family import Family

Model = TypeVar("Model", bound=torch.nn.Module)

_KERNELS: Final = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
_GUARD: Final = "_vlmpack_guard"
_NUM_READ: Final = 16
"""Batches whose positions are read, on a device where that costs time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A setting that ends the isolation of a packed batch."""

    setting: str
    """Its name."""
    reason: str
    """What it does, and what to do about it."""


def prepare_model_for_packing(model: Model, family: Family | None = None) -> Model:
    """Make a model ready for packed batches, and return it.

    * `use_cache` is switched off in its config and in its text config: HF Trainer reaches only the first,
      and Qwen-VL looks at the second. (Batches say `use_cache=False` as well.)
    * Each packed batch is checked before forward: a mask, positions or a cache that would let samples see
      each other raise a ConfigError. Calls that are no packed batch, `generate` for instance, pass.
    * uint8 pixels are normalised on the model's device.

    Args:
        model: A transformers model, perhaps wrapped for data parallelism; changed in place.
        family: The family of its batches, as `VQADataset` and `VQACollator` were given; found by the model's
            config where None.

    Raises:
        ConfigError: If the family is unknown, or the attention implementation cannot isolate it.
    """
    inner = unwrapped(model)
    family = family or family_for(inner)
    if not family.is_transformers:
        family.prepare(inner)
        return model
    config: Any = getattr(inner, "config", None)
    kind = getattr(config, "model_type", type(inner).__name__)
    if kind not in family.model_types:
        raise ConfigError(
            f"the model is of type {kind!r}, but the family {family.name} makes batches for "
            f"{', '.join(family.model_types)}"
        )
    check_kernel(family, kernel_of(inner))
    for part in (config, config.get_text_config()):
        part.use_cache = False
    earlier = getattr(inner, _GUARD, None)
    if earlier is not None:
        earlier.handle.remove()
    guard = _Guard(family)
    guard.handle = inner.register_forward_pre_hook(guard, with_kwargs=True)
    setattr(inner, _GUARD, guard)
    return model


@contextmanager
def unguarded(model: torch.nn.Module) -> Iterator[None]:
    """Let every batch pass for a while, whatever it is.

    Args:
        model: Not wrapped.
    """
    guard = getattr(model, _GUARD, None)
    if guard is not None:
        guard.is_off = True
    try:
        yield
    finally:
        if guard is not None:
            guard.is_off = False


class _Guard:
    """Runs before forward."""

    handle: RemovableHandle

    def __init__(self, family: Family) -> None:
        self._family = family
        self._num_read = 0
        self.is_off = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.is_off or "cu_seq_lens_q" not in kwargs:  # not a packed batch
            return None
        # On a GPU, reading values waits for the step before: after some batches forms must do.
        reads = self._num_read < _NUM_READ or kwargs["cu_seq_lens_q"].device.type == "cpu"
        self._num_read += 1
        faults = faults_of(kwargs, self._family, kernel_of(model), reads_values=reads)
        if faults:
            raise ConfigError(
                "the samples of this packed batch would see each other. "
                + " ".join(f"{fault.setting}: {fault.reason}." for fault in faults)
            )
        pixels = kwargs.get("pixel_values")
        if isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8:
            dtype = next(model.parameters()).dtype
            kwargs = kwargs | {"pixel_values": self._family.normalise(pixels, dtype)}
        return args, kwargs


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside what wraps it for data parallelism.

    Args:
        model: Perhaps wrapped.
    """
    while isinstance(inside := getattr(model, "module", None), torch.nn.Module):
        if hasattr(model, "config"):
            break
        model = inside
    return model


def kernel_of(model: torch.nn.Module) -> str:
    """Return the attention implementation of a model's language model.

    Args:
        model: A transformers model.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "_attn_implementation", None) or getattr(config, "_attn_implementation", None)
    return str(found or "eager")


def check_kernel(family: Family, kernel: str) -> None:
    """Refuse an attention implementation that cannot isolate this family.

    Args:
        family: Of the model.
        kernel: The attention implementation.

    Raises:
        ConfigError: With the reason.
    """
    name = "flash_attention_2" if "flash" in kernel and kernel not in _KERNELS else kernel
    reason = family.refused_attention.get(name)
    if reason is None and name not in _KERNELS:
        reason = "whether it keeps packed samples apart is not known"
    if reason is not None:
        good = [known for known in _KERNELS if known not in family.refused_attention]
        raise ConfigError(
            f"{family.name} with attn_implementation={kernel!r} cannot be packed: {reason}. "
            f"Use {', '.join(good)}"
        )


def faults_of(
    batch: Mapping[str, Any], family: Family, kernel: str, *, reads_values: bool = True
) -> list[Fault]:
    """Return what of a packed batch ends its isolation.

    Args:
        batch: Arguments of forward.
        family: Of the model.
        kernel: The attention implementation.
        reads_values: Look at the positions themselves too, and not only at their form.
    """
    if not family.is_transformers:
        return _segment_faults(batch)
    faults = [*_mask_faults(batch, family, kernel), *_position_faults(batch, family, reads_values)]
    by_detection = "flash" not in kernel and not family.needs_masks
    if by_detection and batch.get("use_cache") is not False:
        faults.append(
            Fault(
                setting="use_cache",
                reason="with a cache, the default of most classes, no packs are looked for; pass False",
            )
        )
    return faults


def _segment_faults(batch: Mapping[str, Any]) -> list[Fault]:
    if "segment_ids" not in batch:
        why = "without them the language model sees whole rows; take those of VQACollator"
        return [Fault(setting="no segment_ids", reason=why)]
    if batch.get("attention_mask") is not None:
        return [Fault(setting="attention_mask", reason="segment_ids take its place; leave it out")]
    return []


def _mask_faults(batch: Mapping[str, Any], family: Family, kernel: str) -> list[Fault]:
    mask = batch.get("attention_mask")
    if mask is None:
        if family.needs_masks:
            why = "this family is isolated by its masks alone; take those of VQACollator"
            return [Fault(setting="no attention_mask", reason=why)]
        return []
    masks = list(mask.values()) if isinstance(mask, dict) else [mask]
    if any(part.ndim == 2 for part in masks):
        why = "with a mask [batch, length], even of ones, attention falls back to plain causal; leave it out"
        return [Fault(setting="attention_mask", reason=why)]
    if kernel == "eager" and any(part.dtype == torch.bool for part in masks):
        why = "eager attention adds a boolean mask as 0 and 1, and even the future is seen; use a float dtype"
        return [Fault(setting="attention_mask", reason=why)]
    if "flash" in kernel or kernel == "flex_attention":
        why = f"{kernel} takes no dense mask; leave it out"
        return [Fault(setting="attention_mask", reason=why)]
    return []


def _position_faults(batch: Mapping[str, Any], family: Family, reads_values: bool) -> list[Fault]:
    positions = batch.get("position_ids")
    if family.needs_masks:
        return []
    if positions is None:
        why = "without positions that restart in each sample, a row is one sample"
        return [Fault(setting="no position_ids", reason=why)]
    expected = family.position_axes
    axes = len(positions) if positions.ndim == 3 else 0
    if axes != expected:
        shape = f"[{expected}, batch, length]" if expected else "[batch, length]"
        why = f"{family.name} takes {shape}, got {list(positions.shape)}: no restart is recognised in it"
        return [Fault(setting="position_ids", reason=why)]
    plain = positions[0] if axes else positions
    edges = batch.get("cu_seq_lens_q")
    if edges is not None and reads_values:
        starts = edges[:-1].long()
        if bool((plain.flatten()[starts] != 0).any()):
            why = "they do not begin at 0 where a sample begins"
            return [Fault(setting="position_ids", reason=why)]
    return []
