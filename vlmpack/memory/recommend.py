"""Batch size and accumulation for a GPU by rules of thumb: the reference document's, and a corrected one.

`get_recommended_config` is the document's code, to the bit. It offers the whole GPU to activations: the
weights are not subtracted, and its accumulation misses the target where it does not divide. `recommend`
subtracts what is static and meets the target exactly. Both count in decimal GB; where the model's sizes are
known, `limits` knows more than either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vlmpack.errors import ConfigError
from vlmpack.memory.linear_cost import EXTRA_IMAGE_SHARE, SAMPLE_GB

if TYPE_CHECKING:
    from collections.abc import Mapping

RESERVED_SHARE: Final = 0.2
"""Share of the GPU that the document's rule leaves free."""
STATIC_GB: Final = 14.0
"""Weights of a frozen 7B model in 16 bits: the document's "model parameters"."""
TRAINING_MULTIPLIER: Final = 2.0
"""Training over inference, a sample: the document says 1.8 to 2.2."""
UTILISATION: Final = 0.85
"""Share of the GPU that the corrected rule uses."""

IMAGE_MULTIPLIER_TABLE: Final[dict[int, tuple[float, float, float]]] = {
    1: (0.8, 6.4, 1.0),
    2: (1.5, 12.0, 1.87),
    3: (2.1, 16.8, 2.62),
    4: (2.6, 20.8, 3.25),
}
"""The document's table: images -> GB a sample, GB of a batch of 8, multiplier. Its code adds 0.7 an image
instead: 1.7, 2.4, 3.1."""


def get_recommended_config(
    gpu_memory_gb: float, num_images_per_sample: int = 1, target_effective_batch_size: int = 16
) -> dict[str, int]:
    """Return batch size and accumulation by the reference document's code.

    available = 0.8 * GPU; sample = 0.8 GB * (1 + 0.7 * (images - 1)); batch = max(1, int(available /
    sample)); accumulation = max(1, target // batch). The outputs that the document prints beside it
    (16/1/16, 2/8/16, 20/1/20, 4/4/16) are not what it computes: (24, 2, 16) gives 14 and 1.

    Args:
        gpu_memory_gb: The GPU's memory in GB.
        num_images_per_sample: Most images of a sample.
        target_effective_batch_size: Samples of a step.

    Returns:
        batch_size, gradient_accumulation_steps, effective_batch_size.
    """
    available_memory = gpu_memory_gb * (1 - RESERVED_SHARE)
    memory_multiplier = 1.0 + (num_images_per_sample - 1) * EXTRA_IMAGE_SHARE
    sample_memory = SAMPLE_GB * memory_multiplier
    batch_size = max(1, int(available_memory / sample_memory))
    accum_steps = max(1, target_effective_batch_size // batch_size)
    return {
        "batch_size": batch_size,
        "gradient_accumulation_steps": accum_steps,
        "effective_batch_size": batch_size * accum_steps,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """How a step is split."""

    batch_size: int
    """Samples of a micro-batch."""
    gradient_accumulation_steps: int
    """Micro-batches of a step."""
    effective_batch_size: int
    """Samples of a step, exactly."""
    last_batch_size: int
    """Samples of the last micro-batch."""
    sample_gb: float
    """What a sample was counted as."""


def this_gpus_memory_gb() -> float:
    """Return the memory of the GPU that is there, in GB.

    Raises:
        ConfigError: If there is none.
    """
    from vlmpack.memory.device import get_gpu_memory_info

    total = get_gpu_memory_info()["total"]
    if not total:
        raise ConfigError("no GPU was found: give gpu_memory_gb")
    return total


def recommend(
    gpu_memory_gb: float | None = None,
    num_images_per_sample: int = 1,
    target_effective_batch_size: int = 16,
    *,
    static_gb: float = STATIC_GB,
    training_multiplier: float = TRAINING_MULTIPLIER,
    utilisation: float = UTILISATION,
    cap_to_target: bool = True,
    power_of_two: bool = True,
) -> Recommendation:
    """Return batch size and accumulation with the static part subtracted and the target met exactly.

    The defaults give the document's presets: two images on 24, 40 and 80 GB are 2 x 8, 4 x 4 and 16 x 1.

    Args:
        gpu_memory_gb: The GPU's memory in GB; None: of the one that is there.
        num_images_per_sample: Most images of a sample.
        target_effective_batch_size: Samples of a step.
        static_gb: Weights, gradients and optimizer; 0 is the document's code.
        training_multiplier: Training over inference, a sample.
        utilisation: Share of the GPU that may be used.
        cap_to_target: No more samples than the step has.
        power_of_two: Round the batch down to a power of two.

    Raises:
        ConfigError: If a number is out of its range, or not even one sample fits.
    """
    if num_images_per_sample < 1 or target_effective_batch_size < 1:
        raise ConfigError(
            "images and target must be positive, got "
            f"{num_images_per_sample} and {target_effective_batch_size}"
        )
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation is a fraction of the GPU, got {utilisation}")
    gpu = this_gpus_memory_gb() if gpu_memory_gb is None else gpu_memory_gb
    sample = SAMPLE_GB * (1 + EXTRA_IMAGE_SHARE * (num_images_per_sample - 1)) * training_multiplier
    room = utilisation * gpu - static_gb
    batch = int(room / sample + 1e-9) if room > 0 else 0  # 0.85 * 24 - 14 is 6.3999..., not 6.4
    if batch < 1:
        raise ConfigError(
            f"{gpu:g} GB * {utilisation} leave {room:.1f} GB beside {static_gb} GB of weights, and a "
            f"sample of {num_images_per_sample} image(s) needs {sample:.2f} GB: use a larger GPU, smaller or "
            "fewer images, or checkpointing"
        )
    if cap_to_target:
        batch = min(batch, target_effective_batch_size)
    if power_of_two:
        batch = 1 << (batch.bit_length() - 1)
    steps = max(1, -(-target_effective_batch_size // batch))
    effective = max(target_effective_batch_size, batch)
    return Recommendation(
        batch_size=batch,
        gradient_accumulation_steps=steps,
        effective_batch_size=effective,
        last_batch_size=effective - batch * (steps - 1),
        sample_gb=sample,
    )


# ---- presets -----------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPreset:
    """A documented setting."""

    batch_size: int
    """Samples of a micro-batch."""
    gradient_accumulation_steps: int
    """Micro-batches of a step; 0 where there is no step (inference)."""
    precision: str = "fp16"
    """"fp16" or "bf16"."""
    checkpointing: bool = True
    """Whether activations are recomputed."""

    @property
    def effective_batch_size(self) -> int:
        """Samples of a step on one GPU."""
        return self.batch_size * max(1, self.gradient_accumulation_steps)

    def global_batch_size(self, num_gpus: int) -> int:
        """Return the samples of a step on all GPUs.

        Raises:
            ConfigError: If the number is not positive.
        """
        if num_gpus < 1:
            raise ConfigError(f"at least one GPU is needed, got {num_gpus}")
        return self.effective_batch_size * num_gpus


GPU_PRESETS: Final[dict[str, BatchPreset]] = {
    "rtx3090-conservative": BatchPreset(batch_size=2, gradient_accumulation_steps=8),
    "rtx3090-aggressive": BatchPreset(batch_size=3, gradient_accumulation_steps=5),
    "a100-40-balanced": BatchPreset(batch_size=4, gradient_accumulation_steps=4),
    "a100-40-aggressive": BatchPreset(batch_size=6, gradient_accumulation_steps=3),
    "80gb-aggressive": BatchPreset(batch_size=8, gradient_accumulation_steps=2, precision="bf16"),
    "80gb-max-throughput": BatchPreset(batch_size=16, gradient_accumulation_steps=1, precision="bf16"),
}
"""Settings by GPU. Two of them miss 16: 3 x 5 is 15 and 6 x 3 is 18."""

SCENARIO_PRESETS: Final[dict[str, BatchPreset]] = {
    "single-gpu": BatchPreset(batch_size=2, gradient_accumulation_steps=8),
    "multi-gpu-limited": BatchPreset(batch_size=1, gradient_accumulation_steps=16),
    "inference": BatchPreset(batch_size=8, gradient_accumulation_steps=0, checkpointing=False),
    "maximum-throughput": BatchPreset(batch_size=16, gradient_accumulation_steps=1),
    "out-of-memory": BatchPreset(batch_size=1, gradient_accumulation_steps=16),
    "too-slow": BatchPreset(batch_size=4, gradient_accumulation_steps=4),
    "too-slow-noisier": BatchPreset(batch_size=2, gradient_accumulation_steps=4),
}
"""Settings by situation; "too-slow-noisier" halves the step to 8 samples."""

EFFECTIVE_RANGE: Final = (8, 32)
"""Samples of a step that the document calls reasonable."""


def effective_batch_warning(effective_batch_size: int, *, legacy: bool = False) -> str | None:
    """Return what is wrong with a step's size, or None.

    Args:
        effective_batch_size: Samples of a step.
        legacy: The document's text, which says "too small" above 32 as well.
    """
    low, high = EFFECTIVE_RANGE
    if low <= effective_batch_size <= high:
        return None
    if legacy:
        return "Batch size may be too small"
    side = "small" if effective_batch_size < low else "large"
    return f"effective batch size {effective_batch_size} may be too {side}: {low} to {high} is usual"


_KEYS: Final = {
    "per_device_batch_size": "per_device_train_batch_size",
    "gradient_checkpointing": "activation_checkpointing",
}
_PASSED: Final = ("gradient_accumulation_steps", "fp16", "bf16", "optim", *_KEYS.values())


def to_training_arguments(section: Mapping[str, object]) -> dict[str, object]:
    """Return a document's `trainer:` section under the names that transformers' TrainingArguments has now.

    per_device_batch_size is per_device_train_batch_size; gradient_checkpointing is activation_checkpointing
    from transformers 5.20 on.

    Args:
        section: The section's keys and values.

    Raises:
        ConfigError: If a key is unknown.
    """
    unknown = sorted(set(section) - set(_KEYS) - set(_PASSED))
    if unknown:
        raise ConfigError(f"unknown keys {unknown}; known are {sorted({*_KEYS, *_PASSED})}")
    return {_KEYS.get(name, name): value for name, value in section.items()}


# ---- the document's table ----------------------------------------------------------------------
def recommendation_table() -> list[str]:
    """Return the lines that the document's `python memory_utils.py` prints: 60 dashes, six settings."""
    lines = ["Recommended configurations:", "-" * 60]
    for gpu in (24, 40, 80):
        for images in (1, 2):
            config = get_recommended_config(gpu, images, 16)
            lines.append(
                f"GPU={gpu}GB, Images={images}: "
                f"batch={config['batch_size']}, "
                f"accum={config['gradient_accumulation_steps']}, "
                f"eff_batch={config['effective_batch_size']}"
            )
    return lines
