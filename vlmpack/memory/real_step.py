"""Build a model from its config with random weights, run one real step, and compare it with the estimate.

On a GPU the allocator's peak over forward, backward and AdamW; without one the bytes that autograd keeps
after the forward pass, which needs no GPU and is exact.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlmpack.errors import ConfigError
from vlmpack.memory.estimate import estimate
from vlmpack.memory.probe import measure
from vlmpack.memory.regime import TrainingRegime

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    import torch

    from vlmpack.memory.model_shape import ModelShape, VisionShape

_DONE_HERE: Final = {
    *("weights", "autocast", "optimizer", "frozen", "attention", "mask"),
    *("checkpoint_vision", "checkpoint_language", "workspace_bytes", "context_bytes"),
    *("lora_targets", "loss_chunk", "holds_logits", "expandable_segments"),
}
"""Settings that a step here follows, and those without a meaning of their own."""
_LARGEST_SHARE: Final = 0.7
"""Share of the machine's free memory that a step on the CPU may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A real step beside its estimate."""

    device: str
    """Where it ran."""
    what: str
    """What was measured."""
    measured_bytes: int
    """The truth."""
    estimated_bytes: int
    """The memory model's."""

    @property
    def error(self) -> float:
        """Relative error of the estimate; negative is too low."""
        return self.estimated_bytes / self.measured_bytes - 1

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "error": self.error}


def measure_config(
    config: str | PathLike[str],
    shape: ModelShape,
    regime: TrainingRegime,
    *,
    rows: int,
    tokens_per_row: int,
    tiles: float,
) -> Comparison:
    """Run one step of the model that a local config describes, with random weights and pictures.

    Args:
        config: A `config.json` of transformers, or the folder that holds it.
        shape: The same model's sizes.
        regime: How it is trained.
        rows: Packed sequences of the batch.
        tokens_per_row: Positions of each.
        tiles: Tiles of the batch.

    Raises:
        ConfigError: If there is no such file, a setting cannot be followed here, or the machine is too small.
    """
    import torch

    path = _file_of(config)
    cuda = torch.cuda.is_available()
    regime = _checked(regime, cuda=cuda)
    whole = int(tiles)
    estimated = estimate(shape, regime, rows=rows, tokens_per_row=tokens_per_row, tiles=whole, cpu=not cuda)
    if not cuda:
        _check_room(estimated.components["weights"] * 2 + 2 * estimated.saved_bytes)
    device = torch.device("cuda" if cuda else "cpu")
    model = _model(path, regime, device)
    batch = _batch(model.config, shape, regime, rows, tokens_per_row, whole, device)
    tensors = [*model.parameters(), *model.buffers(), *(v for v in batch.values() if torch.is_tensor(v))]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(regime.autocast or "")
    context = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

    def step() -> torch.Tensor:
        with context:
            loss: torch.Tensor = model(**batch).loss
        return loss

    optimizer = None
    if cuda:
        trained = [p for p in model.parameters() if p.requires_grad]
        fused = regime.optimizer == "adamw_fused"
        optimizer = torch.optim.AdamW(trained, foreach=not fused, fused=fused)
        measure(step, optimizer=optimizer.step)  # the first step makes the states
        optimizer.zero_grad()
    found = measure(step, ignore=tensors, optimizer=optimizer.step if optimizer else None)
    if found.peak_bytes is not None:
        return Comparison(
            device=found.device,
            what="the peak of forward, backward and AdamW",
            measured_bytes=found.peak_bytes,
            estimated_bytes=estimated.peak_bytes,
        )
    return Comparison(
        device="the CPU",
        what="bytes kept for backward (a GPU's peak needs a GPU)",
        measured_bytes=found.saved_bytes,
        estimated_bytes=estimated.saved_bytes,
    )


def _file_of(config: str | PathLike[str]) -> Path:
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"a measurement needs the model's own config.json, which {config} is not: a preset has sizes only"
        )
    return path


def _checked(regime: TrainingRegime, *, cuda: bool) -> TrainingRegime:
    """Return the regime if a step here can follow it.

    Raises:
        ConfigError: If not; names the settings.
    """
    default = TrainingRegime()
    odd = [
        name
        for name in TrainingRegime.model_fields
        if name not in _DONE_HERE and getattr(regime, name) != getattr(default, name)
    ]
    if regime.checkpoint_vision != regime.checkpoint_language:
        odd.append("checkpoint_vision without checkpoint_language")
    if regime.attention not in {"sdpa", "eager"}:
        odd.append(f"attention={regime.attention}")
    if regime.mask == "padding":
        odd.append("mask=padding")
    if not cuda and regime.weights == "fp16":
        odd.append("weights=fp16 on the CPU")
    if regime.optimizer not in {"adamw_foreach", "adamw_fused"}:
        odd.append(f"optimizer={regime.optimizer}")
    if odd:
        raise ConfigError(f"a measurement cannot follow {', '.join(odd)}: leave that out")
    if not cuda and regime.autocast == "fp16":
        raise ConfigError("the CPU has no float16 autocast; use bf16")
    # nothing holds the last step's logits here
    return regime.model_copy(update={"holds_logits": False})


def _check_room(needed: int) -> None:
    """Compare what a step on the CPU takes with what the machine has.

    Raises:
        ConfigError: If it has less.
    """
    free = _free_bytes()
    if free is not None and needed > _LARGEST_SHARE * free:
        raise ConfigError(
            f"this step needs about {needed / 2**30:.1f} GiB of the machine's memory, which has "
            f"{free / 2**30:.1f} GiB free: measure a shorter or smaller batch, or on a GPU"
        )


def _free_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux: nobody knows
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def _model(path: Path, regime: TrainingRegime, device: torch.device) -> Any:
    """Return the model with random weights, trained as the regime says.

    Raises:
        ConfigError: If transformers does not know the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    section = json.loads(path.read_text(encoding="utf-8"))
    kind = section.pop("model_type", None)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[regime.weights]
    try:
        config = AutoConfig.for_model(kind, **section)
        with device:
            model = AutoModelForImageTextToText.from_config(
                config, dtype=dtype, attn_implementation=regime.attention
            )
    except ValueError as error:
        raise ConfigError(f"transformers cannot build {path}: {error}") from error
    model.set_attn_implementation(regime.attention)  # of the towers too
    model.train()
    if regime.checkpoint_language:
        model.activation_checkpointing_enable()
    for part, words in (
        ("vision", ("vision", "visual")),
        ("connector", ("connector", "projector", "merger")),
    ):
        for name, parameter in model.named_parameters():
            if part in regime.frozen and any(word in name for word in words):
                parameter.requires_grad_(False)
    if "language" in regime.frozen:
        model.get_decoder().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    return model


def _batch(
    config: Any,
    shape: ModelShape,
    regime: TrainingRegime,
    rows: int,
    tokens: int,
    tiles: int,
    device: torch.device,
) -> dict[str, Any]:
    """Return a batch of random tokens and pictures with as many image tokens as tiles need.

    Raises:
        ConfigError: If the rows cannot hold the tiles' tokens.
    """
    import torch

    needed = tiles * shape.tokens_per_tile
    if needed > rows * tokens:
        raise ConfigError(f"{tiles} tiles take {needed} tokens, but the rows hold {rows * tokens}")
    image_token = next(
        (
            int(getattr(config, name))
            for name in ("image_token_id", "image_token_index")
            if hasattr(config, name)
        ),
        0,
    )
    text_token = next(number for number in range(10, 20) if number != image_token)
    ids = torch.full((rows * tokens,), text_token, device=device)
    ids[:needed] = image_token
    ids = ids.view(rows, tokens)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    half = -(-tokens // 2)
    if regime.mask == "packed":
        batch["position_ids"] = torch.arange(half, device=device).repeat(2)[None, :tokens].expand(rows, -1)
    if tiles and shape.vision is not None:
        dtype = torch.float32 if regime.weights == "fp32" else torch.bfloat16
        pictures: Callable[..., dict[str, Any]] = _PICTURES.get(str(config.model_type), _plain)
        batch |= pictures(shape.vision, tiles, dtype, device)
    if str(config.model_type) in {"gemma3", "paligemma"}:
        batch["token_type_ids"] = (ids == image_token).long()
    if str(config.model_type) in {"qwen2_vl", "qwen2_5_vl"}:
        # time, height, width; and before them, where rows are packed, the positions that tell samples apart
        line = batch.get("position_ids", torch.arange(tokens, device=device)[None].expand(rows, -1))
        batch["position_ids"] = line[None].expand(4 if regime.mask == "packed" else 3, -1, -1)
    return batch


def _plain(vision: VisionShape, tiles: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    import torch

    return {
        "pixel_values": torch.rand(tiles, 3, vision.tile_size, vision.tile_size, dtype=dtype, device=device)
    }


def _in_rows(vision: VisionShape, tiles: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    found = _plain(vision, tiles, dtype, device)["pixel_values"]
    return {"pixel_values": found[None] + 1}  # pictures of zeros would be taken for padding


def _patches(vision: VisionShape, tiles: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    import torch

    side = vision.tile_size // vision.patch_size
    size = 3 * vision.frames * vision.patch_size**2
    return {
        "pixel_values": torch.rand(tiles * side * side, size, dtype=dtype, device=device),
        "image_grid_thw": torch.tensor([[1, side, side]] * tiles, device=device),
    }


_PICTURES: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "idefics3": _in_rows,
    "smolvlm": _in_rows,
    "qwen2_vl": _patches,
    "qwen2_5_vl": _patches,
}
"""How a family takes its pictures, where not one by one."""
