"""A real transformers class with random weights, and the worst batch that it can be given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

TINY_SMOLVLM: Final[dict[str, Any]] = {
    "model_type": "smolvlm",
    "image_token_id": 8,
    "scale_factor": 2,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
"""SmolVLM's classes at a size that a test can run."""

_WITH_CROPS: Final = ("idefics3", "smolvlm")
"""Model types whose images are crops of one size: what the crops of a search mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbedModel:
    """A model and its dearest inputs."""

    model: Any
    """On the device, in training mode."""
    tokens_per_crop: int
    """Positions that a crop takes; 0 for a model without images."""

    def batches(self, max_crops: int, text_tokens: int) -> Callable[[int], dict[str, Any]]:
        """Return what makes a batch of samples that all have the most crops and the longest text.

        Args:
            max_crops: Crops of each sample.
            text_tokens: Positions of each sample besides those of the crops.

        Raises:
            ConfigError: If the model takes no crops, or a sample has no text.
        """
        if text_tokens < 1 or max_crops < 0:
            raise ConfigError(f"a sample has at least 1 text token, got {text_tokens} and {max_crops} crops")
        if max_crops and not self.tokens_per_crop:
            raise ConfigError(
                f"{self.model.config.model_type} takes no crops; what does: {', '.join(_WITH_CROPS)}"
            )

        def make(batch_size: int) -> dict[str, Any]:
            config = self.model.config
            text = config.get_text_config()
            length = max_crops * self.tokens_per_crop + text_tokens
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(16, text.vocab_size, (batch_size, length), generator=generator)
            batch: dict[str, Any] = {"use_cache": False}
            if max_crops:
                ids[ids == config.image_token_id] = config.image_token_id + 1
                side = config.vision_config.image_size
                ids[:, : max_crops * self.tokens_per_crop] = config.image_token_id
                batch["pixel_values"] = torch.full((batch_size, max_crops, 3, side, side), 0.5)
            return batch | {"input_ids": ids, "labels": ids.clone()}

        return make


def load_probed_model(config: str | Path | None, *, device: str = "cpu") -> ProbedModel:
    """Return a model with random weights; nothing is downloaded.

    Args:
        config: A local `config.json` or a folder with one; None for a tiny SmolVLM.
        device: Where it is put.

    Raises:
        ConfigError: If there is no such file, or transformers has no class for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if config is None:
        values = dict(TINY_SMOLVLM)
        made = AutoConfig.for_model(values.pop("model_type"), **values)
    else:
        path = Path(config)
        if not path.exists():
            raise ConfigError(f"there is no model configuration {path}; give a config.json or its folder")
        try:
            made = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path} is no configuration that transformers knows: {error}") from error
    has_images = made.model_type in _WITH_CROPS
    kind = AutoModelForImageTextToText if hasattr(made, "vision_config") else AutoModelForCausalLM
    try:
        model = kind.from_config(made, trust_remote_code=False).to(device)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"transformers makes no model of {made.model_type}: {error}") from error
    tokens = 0
    if has_images:
        vision = made.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 // made.scale_factor**2
    return ProbedModel(model=model, tokens_per_crop=tokens)
