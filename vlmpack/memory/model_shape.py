"""What the memory model needs to know of a model: the sizes of its three parts.

    ModelShape = VisionShape + ConnectorShape + LanguageShape

Nothing here needs torch or transformers; `memory.configs` reads these sizes from a transformers config.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from vlmpack.errors import ConfigError
from vlmpack.memory.ops import Activation, Norm

if TYPE_CHECKING:
    from os import PathLike

ConnectorKind: TypeAlias = Literal["pixel_shuffle", "mlp", "merger", "pool", "linear"]
Merge: TypeAlias = Literal["index", "scatter"]


def _check(record: object, *, zero: tuple[str, ...] = ()) -> None:
    """Raise where a size of a record is not a positive integer.

    Raises:
        ConfigError: Names the field.
    """
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if value < (0 if field.name in zero else 1):
            kind = type(record).__name__
            raise ConfigError(f"{kind}.{field.name} must be a positive integer, got {value}")


def _one_of(name: str, value: str, choices: object) -> None:
    """Raise where a choice is not among a Literal's.

    Raises:
        ConfigError: Names the choices.
    """
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionShape:
    """The vision encoder's sizes.

    Raises:
        ConfigError: If a size is not positive, or does not divide the one that it has to divide.
    """

    layers: int
    """Transformer blocks that run."""
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width of the MLP."""
    heads: int
    """Attention heads."""
    patch_size: int
    """Pixels along a patch's side."""
    tile_size: int
    """Pixels along a tile's side; for models of any resolution, of the square that counts as a tile."""
    class_token: bool = False
    """One more token beside the patches."""
    fused_qkv: bool = False
    """One projection for queries, keys and values: one cast of its input instead of three."""
    norm: Norm = "layer"
    """Normalisation of the blocks."""
    activation: Activation = "gelu_tanh"
    """Activation of the MLP."""
    gated: bool = False
    """The MLP has a gate beside its up projection."""
    attention_bias: bool = True
    """The attention's projections have a bias."""
    mlp_bias: bool = True
    """The MLP's projections have a bias."""
    rotary: bool = False
    """Queries and keys are rotated, in float32; images are attended one by one."""
    pre_norm: bool = False
    """A layer norm before the first block (CLIP)."""
    final_norm: bool = True
    """A norm after the last block."""
    position_embedding: bool = True
    """Learned positions, one a patch."""
    patch_bias: bool = True
    """The patch projection has a bias."""
    frames: int = 1
    """Times that a still picture is repeated along time (2 in Qwen2-VL)."""
    window_patches: int = 0
    """Patches of an attention window; 0: every layer sees the whole tile."""
    full_layers: int = 0
    """Layers that see the whole tile although there are windows."""
    copies_pixels: bool = False
    """The model copies the pixels before it looks at them (Idefics3 drops padding images)."""
    unused_layers: int = 0
    """Last blocks that are there but feed nothing (LLaVA takes the last layer but one)."""
    idle_parameters: int = 0
    """Parameters that are there but take no part in the loss."""

    def __post_init__(self) -> None:
        _check(self, zero=("window_patches", "full_layers", "unused_layers", "idle_parameters"))
        _one_of("VisionShape.norm", self.norm, Norm)
        _one_of("VisionShape.activation", self.activation, Activation)
        if self.hidden % self.heads:
            raise ConfigError(f"{self.heads} vision heads do not divide the hidden size {self.hidden}")
        if self.tile_size < self.patch_size:
            raise ConfigError(f"a tile of {self.tile_size} pixels holds no patch of {self.patch_size} pixels")

    @property
    def patches_per_tile(self) -> int:
        """Patches of a tile, without a class token."""
        return (self.tile_size // self.patch_size) ** 2

    @property
    def tokens_per_tile(self) -> int:
        """What the blocks attend over: patches and a class token."""
        return self.patches_per_tile + self.class_token

    @property
    def narrow_stream(self) -> bool:
        """Whether autocast leaves the residual stream in its own type: nothing in float32 is added to it."""
        return not (self.position_embedding or self.pre_norm or self.class_token)

    @property
    def pixels_per_tile(self) -> int:
        """Numbers in a tile's input: three channels, repeated along time."""
        return (
            3
            * self.frames
            * (self.patches_per_tile * self.patch_size**2 if self.rotary else self.tile_size**2)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectorShape:
    """How patches become image tokens.

    Raises:
        ConfigError: If a size is not positive or the kind is unknown.
    """

    kind: ConnectorKind = "pixel_shuffle"
    """pixel_shuffle: factor x factor patches side by side, one linear layer. mlp: two linear layers on
    each patch. merger: norm, factor x factor patches side by side, two linear layers. pool: average of
    factor x factor patches, norm, one matrix. linear: one linear layer on each patch."""
    factor: int = 1
    """Patches along the side of one image token."""
    hidden: int = 0
    """Width between the two layers of an mlp; 0: the language model's width."""
    bias: bool = False
    """The linear layers have a bias."""
    activation: Activation = "gelu"
    """Between the two layers."""
    norm: Norm = "layer"
    """Of a merger."""

    def __post_init__(self) -> None:
        _check(self, zero=("hidden",))
        _one_of("ConnectorShape.kind", self.kind, ConnectorKind)


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageShape:
    """The language model's sizes.

    Raises:
        ConfigError: If a size is not positive, or the key heads do not divide the heads.
    """

    layers: int
    """Transformer blocks."""
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width of the MLP."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    vocab: int
    """Rows of the embedding."""
    head_dim: int = 0
    """Width of a head; 0: hidden / heads."""
    tied: bool = True
    """The output layer is the embedding."""
    norm: Norm = "rms"
    """Normalisation of the blocks."""
    activation: Activation = "silu"
    """Activation of the MLP."""
    gated: bool = True
    """The MLP has a gate beside its up projection."""
    attention_bias: bool = False
    """Queries, keys and values have a bias."""
    output_bias: bool = False
    """The attention's output projection has a bias."""
    mlp_bias: bool = False
    """The MLP's projections have a bias."""
    head_bias: bool = False
    """The output layer has a bias."""
    qk_norm: bool = False
    """Queries and keys are normalised head by head."""
    sandwich_norm: bool = False
    """Norms after attention and MLP too (Gemma)."""
    parallel: bool = False
    """Attention and MLP read one norm's output and are added together (Phi, GPT-NeoX)."""
    rotary_share: float = 1.0
    """Part of each head that is rotated."""
    always_repeats_keys: bool = False
    """Keys and values are copied to all query heads before attention (the reference pipeline)."""
    float_logits: bool = True
    """The loss casts logits to float32 first, as transformers does; else cross-entropy takes them raw."""
    own_positions: bool = False
    """Every row has positions of its own (those of pictures), so rotary tables are made for each row."""
    dense_mask: bool = False
    """Image tokens see each other both ways, so a mask of all pairs of positions is always given (Gemma)."""
    plain_eager: bool = False
    """Eager attention without the float32 softmax, with masks of its own (the reference pipeline)."""

    def __post_init__(self) -> None:
        _check(self, zero=("head_dim",))
        _one_of("LanguageShape.norm", self.norm, Norm)
        _one_of("LanguageShape.activation", self.activation, Activation)
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.kv_heads} key heads do not divide {self.heads} query heads")
        if not self.head_dim and self.hidden % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide the hidden size {self.hidden}")

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden // self.heads


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A vision-language model's sizes; `vision` and `connector` are None for a text-only model.

    Raises:
        ConfigError: If one of vision and connector is missing, or the connector does not fit the tile.
    """

    name: str
    """For reports."""
    language: LanguageShape
    """The language model."""
    vision: VisionShape | None = None
    """The vision encoder."""
    connector: ConnectorShape | None = None
    """Between them."""
    merge: Merge = "scatter"
    """How image tokens get into the embeddings: masked_scatter, or a clone and an indexed write."""
    buffer_bytes: int = 0
    """Bytes of buffers that are no parameters."""

    def __post_init__(self) -> None:
        if (self.vision is None) != (self.connector is None):
            raise ConfigError(f"{self.name}: vision encoder and connector come together or not at all")
        if self.vision is None or self.connector is None:
            return
        side, factor = self.vision.tile_size // self.vision.patch_size, self.connector.factor
        if self.connector.kind != "pool" and side % factor:
            raise ConfigError(
                f"{self.name}: the connector joins {factor} x {factor} patches, "
                f"which does not divide a tile of {side} x {side} patches"
            )

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that the language model gets for one tile."""
        if self.vision is None or self.connector is None:
            return 0
        return (self.vision.tile_size // self.vision.patch_size // self.connector.factor) ** 2

    @property
    def patches_per_tile(self) -> int:
        """ViT patches of one tile; 0 without a vision encoder."""
        return self.vision.patches_per_tile if self.vision else 0

    @property
    def position_tokens(self) -> int:
        """Tokens before each tile that say where it lies: one where pictures are cut into tiles of a grid."""
        return int(self.connector is not None and self.connector.kind == "pixel_shuffle")

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        from vlmpack.memory.chain import build_chain
        from vlmpack.memory.regime import TrainingRegime

        return sum(weight.elements for _, weight in build_chain(self, TrainingRegime(), 1).weights)

    @classmethod
    def from_config(
        cls, config: object, *, tile_size: int | None = None, text_only: bool = False
    ) -> ModelShape:
        """Read the sizes from a transformers config, a `config.json`, a folder with one, or a preset's name.

        Args:
            config: A transformers config object, its dictionary, a path, or a name out of `PRESETS`.
            tile_size: Pixels along a tile's side where it is not the config's image size.
            text_only: Accept a model without a vision encoder.

        Raises:
            ConfigError: If the model type is unknown, there is no vision part, or a size is missing.
        """
        from vlmpack.memory.configs import read_config

        return read_config(config, tile_size=tile_size, text_only=text_only)

    @classmethod
    def of(cls, model: object) -> ModelShape:
        """Return a shape as it is, and read anything else by `from_config`."""
        return model if isinstance(model, cls) else cls.from_config(model)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ModelShape:
        """Read the sizes from a local `config.json` or the folder that holds it."""
        return cls.from_config(path)
