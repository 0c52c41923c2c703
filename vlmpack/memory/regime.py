"""How a model is trained, as far as memory is concerned. Written by users: strict, no unknown keys."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

DType: TypeAlias = Literal["fp32", "bf16", "fp16"]
Part: TypeAlias = Literal["vision", "connector", "language"]

ITEMSIZE: Final[dict[str, int]] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes an element."""


class TrainingRegime(BaseModel):
    """Data types, optimizer, frozen parts, checkpointing, kernels, sharding.

    The defaults are the reference pipeline's: float32 weights, bfloat16 autocast, AdamW, SDPA.

    Raises:
        pydantic.ValidationError: If a key is unknown, a type is wrong, or two settings contradict.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    weights: DType = "fp32"
    """Type of the parameters."""
    autocast: Literal["bf16", "fp16"] | None = "bf16"
    """Type of matrix multiplications; None: the weights' own."""
    gradients: DType | None = None
    """Type of the gradients; None: the weights' own."""
    optimizer: Literal["adamw_foreach", "adamw_fused", "adamw_8bit", "sgd", "sgd_momentum"] = "adamw_foreach"
    """foreach needs a temporary of all parameters at its step, fused does not; 8bit keeps a byte a state."""
    optimizer_state: DType | None = None
    """Type of the optimizer's states; None: the weights' own."""
    master_weights: bool = False
    """A float32 copy of the trainable parameters beside them."""

    frozen: tuple[Part, ...] = Field(default=(), strict=False)  # a list is what YAML has
    """Parts that are not trained."""
    lora_rank: PositiveInt | None = None
    """Rank of adapters in the language model, which is then frozen but for them."""
    lora_targets: Literal["qv", "attention", "all"] = "attention"
    """Layers that get an adapter: queries and values; all four of attention; those of the MLP too."""
    lora_dtype: DType | None = None
    """Type of the adapters; None: float32, peft's choice."""
    lora_dropout: bool = False
    """Dropout before the adapters."""
    input_gradients: bool = False
    """Track the embeddings although they are frozen (`enable_input_require_grads`)."""

    checkpoint_vision: bool = False
    """Recompute every block of the vision encoder in backward."""
    checkpoint_language: bool = False
    """Recompute every block of the language model in backward."""
    vision_sub_batch: PositiveInt | None = None
    """Run the vision encoder on this many tiles at a time, each sub-batch recomputed in backward."""

    attention: Literal["eager", "sdpa", "flash", "efficient", "math", "flex"] = "sdpa"
    """eager and flex are whole implementations; sdpa lets PyTorch choose flash, or efficient under a mask
    or in float32; flash, efficient and math name SDPA's backend, or the flash package."""
    mask: Literal["none", "padding", "packed"] = "none"
    """What the language model is given: nothing but causality; a padding mask, a number a position; a
    block-diagonal mask of all positions against all (packed rows in SDPA)."""
    cross_entropy: Literal["full", "chunked", "fused"] = "full"
    """full: all logits at once. chunked: `loss_chunk` positions at a time, recomputed in backward. fused:
    the gradient is made in the forward pass, chunk by chunk (Liger)."""
    loss_chunk: PositiveInt = 1024
    """Positions of a chunk."""
    holds_logits: bool = False
    """The loop keeps the last step's logits (`_, loss = model(...)`) while the next one runs."""

    accumulation: bool = False
    """Gradients of earlier micro-batches are there already."""
    sharding: Literal["none", "zero1", "zero2", "zero3"] = "none"
    """What ranks share: optimizer states; gradients too; weights too (FSDP full shard)."""
    shards: PositiveInt = 1
    """Ranks that share."""

    expandable_segments: bool = False
    """The allocator may grow segments, so free memory is not lost to fragmentation."""
    workspace_bytes: int = Field(default=2 * 32 * 2**20, ge=0)
    """cuBLAS workspaces: two of 32 MiB on Hopper, two of 8.1 MiB before."""
    context_bytes: int = Field(default=600 * 2**20, ge=0)
    """What CUDA itself takes before the first tensor."""

    @model_validator(mode="after")
    def _agree(self) -> TrainingRegime:
        if self.weights != "fp32" and self.autocast is not None and self.autocast != self.weights:
            raise ValueError(f"weights in {self.weights} cannot run under {self.autocast} autocast")
        if (self.sharding == "none") != (self.shards == 1):
            raise ValueError(f"sharding={self.sharding!r} contradicts shards={self.shards}")
        if self.lora_rank and "language" in self.frozen:
            raise ValueError("adapters train the language model: leave it out of `frozen`")
        return self

    @property
    def weight_bytes(self) -> int:
        """Bytes an element of the parameters."""
        return ITEMSIZE[self.weights]

    @property
    def compute_bytes(self) -> int:
        """Bytes an element in matrix multiplications."""
        return ITEMSIZE[self.autocast] if self.autocast else self.weight_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes an element of the gradients."""
        return ITEMSIZE[self.gradients or self.weights]

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state an element of a trainable parameter."""
        each = 1 if self.optimizer == "adamw_8bit" else ITEMSIZE[self.optimizer_state or self.weights]
        states = {"sgd": 0, "sgd_momentum": 1}.get(self.optimizer, 2)
        return states * each + (4 if self.master_weights else 0)


PACKED_REGIME: Final = TrainingRegime(mask="packed")
"""What this library's batches take in transformers: rows isolated by positions, for which SDPA gets a dense
mask. The safe guess where nobody said how a model is trained."""
