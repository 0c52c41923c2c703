"""What a model family is: everything that depends on the model, and nothing that does not.

    (height, width) --sample--> geometry: tiles, ViT patches, tokens           planning, no pixel
    tokenizer --for_tokenizer--> the tokens that take an image's place
    picture --cut--> uint8 [N, P, P, 3]                                        assembling
    Rows --arguments, pixels, masks--> what forward takes                      collating

Sizes are known here alone: the packer's costs, the tokens, the tiles and the batch all ask the family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

import torch

from vlmpack.errors import ConfigError
from vlmpack.families.pixels import normalised
from vlmpack.families.rows import varlen
from vlmpack.families.tokens import FamilyTokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self

    from vlmpack.families.rows import Rows
    from vlmpack.families.tokens import Pieces
    from vlmpack.geometry import ImageGeometry

Settings: TypeAlias = "Mapping[str, object]"
"""A config as JSON has it."""

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
HALF: Final = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family(ABC):
    """One model family with its sizes. Subclasses say what differs; a size that is wrong raises.

    Raises:
        ConfigError: If a size is not positive.
    """

    name: ClassVar[str]
    """By which users ask for it."""
    model_types: ClassVar[tuple[str, ...]]
    """`config.model_type` of the transformers models that take its batches."""
    image_token: ClassVar[str]
    """The token that the model replaces by image features."""
    anchor_token: ClassVar[str]
    """The token that stands for an image in a text that is not expanded yet."""
    in_message: ClassVar[str]
    """What stands for an image in a message; holds `anchor_token` once."""
    around: ClassVar[tuple[str, str]] = ("", "")
    """What the family's processor puts around an image after the chat template is rendered."""
    is_transformers: ClassVar[bool] = True
    """Whether its models are classes of transformers, with their config, caches and attention kernels."""
    pixel_name: ClassVar[str] = "pixel_values"
    """The name under which forward takes the pixels."""
    needs_masks: ClassVar[bool] = False
    """Whether restarting positions do not isolate it, so that the batch carries dense masks."""
    position_axes: ClassVar[int] = 0
    """Axes of position_ids before [batch, length]; 0 for none."""
    refused_attention: ClassVar[Mapping[str, str]] = {}
    """{attention implementation: why it cannot isolate packs of this family}."""

    image_mean: tuple[float, float, float] = HALF
    """Of each colour, after scaling to [0, 1]."""
    image_std: tuple[float, float, float] = HALF
    """Of each colour, after scaling to [0, 1]."""

    def __post_init__(self) -> None:
        for name in self.sizes():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{self.name}: {name} must be a positive integer, got {value!r}")
        for mean_or_std in (self.image_mean, self.image_std):
            if len(mean_or_std) != 3:
                raise ConfigError(
                    f"{self.name}: a mean and a deviation for each of 3 colours, got {mean_or_std}"
                )
        if 0 in self.image_std:
            raise ConfigError(f"{self.name}: a deviation of 0 cannot be divided by: {self.image_std}")

    @classmethod
    @abstractmethod
    def of(cls, config: Settings, processor: Settings) -> Self:
        """Return the family of a model's config and its image processor's, each as JSON has it."""

    @abstractmethod
    def sizes(self) -> tuple[str, ...]:
        """Return the names of the fields that must be positive integers."""

    # ---- planning ------------------------------------------------------------------------------
    @property
    @abstractmethod
    def tile_size(self) -> int:
        """Side in pixels of what the vision encoder takes as one row: a tile, or a patch."""

    @abstractmethod
    def image(self, height: int, width: int) -> ImageGeometry:
        """Return how an upright image is cut that is alone in its sample. O(1).

        Args:
            height: Pixels, at least 1.
            width: Pixels, at least 1.

        Raises:
            SampleError: image_shape, if the family cannot take such sides.
        """

    def sample(self, sizes: Sequence[tuple[int, int]]) -> tuple[ImageGeometry, ...]:
        """Return how the images of one sample are cut.

        Args:
            sizes: Upright (height, width) of each image.

        Raises:
            SampleError: image_shape, if the family cannot take such sides.
        """
        return tuple(self.image(height, width) for height, width in sizes)

    def smaller(self) -> Family | None:
        """Return the family with the next smaller images, or None if there is none."""
        return None

    # ---- text ----------------------------------------------------------------------------------
    @abstractmethod
    def expansion(self, geometry: ImageGeometry) -> Pieces:
        """Return what takes the place of `anchor_token`: (text, how often), one piece after another.

        Args:
            geometry: How the image is cut.
        """

    @abstractmethod
    def special_tokens(self) -> tuple[str, ...]:
        """Return every token that an expansion or `in_message` can hold."""

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Family, FamilyTokens]:
        """Return the family with this tokenizer's lengths, and its image tokens.

        Args:
            tokenizer: The model's own.

        Raises:
            ConfigError: If the tokenizer lacks a token, or could merge it with its neighbours.
        """
        return self, FamilyTokens.of(tokenizer, self)

    # ---- pixels --------------------------------------------------------------------------------
    @abstractmethod
    def cut(self, picture: Image, geometry: ImageGeometry, out: npt.NDArray[np.uint8]) -> None:
        """Write what the vision encoder takes, in the order of its tokens.

        Args:
            picture: Mode RGB, upright.
            geometry: How it is cut.
            out: uint8 [geometry.num_tiles, P, P, 3].
        """

    def pixels(self, rows: Rows, dtype: torch.dtype) -> dict[str, object]:
        """Return the arguments of forward that say what the images show.

        Args:
            rows: The batch, with at least one image.
            dtype: Normalised to this, or torch.uint8 to leave that to `normalise` on the device.
        """
        return {"pixel_values": self.normalise(rows.tiles, dtype)}

    def normalise(self, tiles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return uint8 tiles [N, 3, ...] as the model was trained on them; anything else as it is.

        Args:
            tiles: On any device: best called where the model is, which moves a quarter of the bytes.
            dtype: Of the result; torch.uint8 leaves them as they are.
        """
        return normalised(tiles, self.image_mean, self.image_std, dtype)

    def arguments(self, rows: Rows) -> dict[str, object]:
        """Return the arguments of forward besides pixels and masks.

        Never a 2-D attention_mask: transformers then falls back to plain causal attention without a word.
        `use_cache` is off, since most classes look for packs only where there is no cache, and have one by
        default. The lengths are flash attention's; the other kernels ignore them.

        Args:
            rows: The batch.
        """
        return {
            "input_ids": rows.input_ids,
            "labels": rows.labels,
            "position_ids": self.positions(rows),
            "use_cache": False,
            **varlen(rows.segment_ids),
        }

    # ---- positions and masks -------------------------------------------------------------------
    def positions(self, rows: Rows) -> torch.Tensor:
        """Return position_ids: [B, L], from 0 in each segment, or with more axes in front.

        Args:
            rows: The batch.
        """
        return rows.position_ids

    def masks(self, rows: Rows, dtype: torch.dtype) -> dict[str, object]:  # noqa: ARG002, families need them
        """Return the masks without which the family would not be isolated: none, as a rule.

        Args:
            rows: The batch.
            dtype: torch.bool, True where a position is seen, or a float type, 0 there and its least
                number elsewhere.
        """
        return {}

    def own_inputs(self, is_image: torch.Tensor) -> dict[str, object]:  # noqa: ARG002, families need it
        """Return what a sample alone needs for the model to make its own positions and masks.

        Args:
            is_image: bool [1, T], whether a token is an image token.
        """
        return {}

    # ---- the model ------------------------------------------------------------------------------
    def prepare(self, model: torch.nn.Module) -> None:  # noqa: B027, none of transformers' needs it
        """Do to a model that is none of transformers' what it needs before it is given packs.

        Args:
            model: Not wrapped.
        """

    def output_of(self, output: Any) -> torch.Tensor:
        """Return the logits [B, L, vocabulary] of what forward returned.

        Args:
            output: What forward returned.
        """
        found: torch.Tensor = output.logits
        return found

    # ---- taking a batch apart ------------------------------------------------------------------
    @abstractmethod
    def unit_tokens(self, batch: Mapping[str, object]) -> list[int]:
        """Return the image tokens of each thing that can be taken out of a batch alone, in order."""

    def take_units(self, batch: Mapping[str, object], start: int, stop: int) -> dict[str, object]:
        """Return the arguments of forward for these images alone.

        Args:
            batch: A packed batch.
            start: First unit.
            stop: After the last unit.
        """
        pixels = batch[self.pixel_name]
        assert isinstance(pixels, torch.Tensor)
        return {self.pixel_name: pixels[start:stop]}
