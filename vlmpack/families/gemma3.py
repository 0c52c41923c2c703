r"""Gemma 3: the whole picture, one tile; image tokens of a picture see each other in both directions.

    \n\n<start_of_image>[<image_soft_token> x 256]<end_of_image>\n\n

That needs masks: one for the layers that see everything and one for those of a sliding window. Given
`token_type_ids` and restarting positions, transformers 5.23 looks image blocks up at the wrong places in
the sliding layers (differences of 1 in logits); a dict of masks goes to the layers as it is.

Pictures are not panned and scanned, which is the processor's default too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from PIL.Image import Resampling

from vlmpack.errors import ConfigError
from vlmpack.families.family import HALF, Family
from vlmpack.families.masks import causal_or_block, dense, within
from vlmpack.families.pixels import cut_grid, resized
from vlmpack.families.settings import colours, integer, section, square
from vlmpack.geometry import ImageGeometry, TileGrid

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt
    import torch
    from PIL.Image import Image

    from vlmpack.families.family import Settings
    from vlmpack.families.rows import Rows
    from vlmpack.families.tokens import Pieces

_NO_BLOCKS = "it cannot let the tokens of an image see each other, so the class refuses it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma3(Family):
    """Gemma 3 with images; the defaults are those of gemma-3-4b."""

    name: ClassVar[str] = "gemma3"
    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)
    image_token: ClassVar[str] = "<image_soft_token>"
    anchor_token: ClassVar[str] = "<start_of_image>"
    in_message: ClassVar[str] = "<start_of_image>"
    around: ClassVar[tuple[str, str]] = ("\n\n", "\n\n")
    needs_masks: ClassVar[bool] = True
    refused_attention: ClassVar[Mapping[str, str]] = {
        "flash_attention_2": _NO_BLOCKS,
        "flash_attention_3": _NO_BLOCKS,
        "flex_attention": "a dense mask under flex attention ends the process with a corrupted heap",
    }

    tile: int = 896
    """Side of the tile in pixels."""
    patch_size: int = 14
    """Side of a ViT patch in pixels."""
    tokens_per_tile: int = 256
    """Image tokens of a picture."""
    sliding_window: int = 1024
    """How far back, itself included, a position sees in the sliding layers."""

    @classmethod
    def of(cls, config: Settings, processor: Settings) -> Gemma3:
        """Return the family of a model's config and its image processor's.

        Args:
            config: With a vision_config and a text_config.
            processor: Its size, mean and deviation; may be empty.

        Raises:
            ConfigError: If pictures are panned and scanned.
        """
        if processor.get("do_pan_and_scan"):
            raise ConfigError(
                "gemma3: do_pan_and_scan adds crops and words to a picture, which is not planned for here; "
                "switch it off"
            )
        vision, text, base = section(config, "vision_config"), section(config, "text_config"), cls()
        return cls(
            tile=square(processor, "size", integer(vision, "image_size", base.tile)),
            patch_size=integer(vision, "patch_size", base.patch_size),
            tokens_per_tile=integer(config, "mm_tokens_per_image", base.tokens_per_tile),
            sliding_window=integer(text, "sliding_window", base.sliding_window),
            image_mean=colours(processor, "image_mean", HALF),
            image_std=colours(processor, "image_std", HALF),
        )

    def sizes(self) -> tuple[str, ...]:
        """Return the names of the fields that must be positive integers."""
        return ("tile", "patch_size", "tokens_per_tile", "sliding_window")

    @property
    def tile_size(self) -> int:
        """Side of the tile in pixels."""
        return self.tile

    def image(self, height: int, width: int) -> ImageGeometry:  # noqa: ARG002, every size is one tile
        """Return how an upright image is cut: the same for every size.

        Args:
            height: Pixels, at least 1.
            width: Pixels, at least 1.
        """
        return ImageGeometry(
            height=self.tile,
            width=self.tile,
            grid=TileGrid(rows=1, columns=1),
            has_global_tile=False,
            num_tiles=1,
            num_patches=(self.tile // self.patch_size) ** 2,
            num_image_tokens=self.tokens_per_tile,
            num_tokens=self.tokens_per_tile + 2,
        )

    def special_tokens(self) -> tuple[str, ...]:
        """Return every token that an expansion can hold."""
        return (self.image_token, self.anchor_token, "<end_of_image>")

    def expansion(self, geometry: ImageGeometry) -> Pieces:
        """Return what takes the place of the anchor.

        Args:
            geometry: How the image is cut.
        """
        image = (self.image_token, geometry.num_image_tokens)
        return ((self.anchor_token, 1), image, ("<end_of_image>", 1))

    def cut(self, picture: Image, geometry: ImageGeometry, out: npt.NDArray[np.uint8]) -> None:
        """Write the picture, stretched to a square.

        Args:
            picture: Mode RGB, upright.
            geometry: How it is cut.
            out: uint8 [1, P, P, 3].
        """
        cut_grid(resized(picture, geometry.height, geometry.width, Resampling.BILINEAR), 1, 1, out)

    def masks(self, rows: Rows, dtype: torch.dtype) -> dict[str, object]:
        """Return attention_mask: a [B, 1, L, L] mask for each kind of layer. O(B x L^2).

        Args:
            rows: The batch.
            dtype: torch.bool or a float type.
        """
        seen = causal_or_block(rows.segment_ids, rows.input_ids == rows.image_token_id)
        return {
            "attention_mask": {
                "full_attention": dense(seen, dtype),
                "sliding_attention": dense(within(seen, self.sliding_window), dtype),
            }
        }

    def own_inputs(self, is_image: torch.Tensor) -> dict[str, object]:
        """Return what a sample alone needs for the model to make its own masks.

        Args:
            is_image: bool [1, T], whether a token is an image token.
        """
        return {"token_type_ids": is_image.int()}

    def unit_tokens(self, batch: Mapping[str, object]) -> list[int]:
        """Return the image tokens of each picture of a batch.

        Args:
            batch: A packed batch.
        """
        return [self.tokens_per_tile] * len(batch["pixel_values"])  # type: ignore[arg-type]
