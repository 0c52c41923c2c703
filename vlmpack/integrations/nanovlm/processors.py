"""Tokenizer, image processor and image string with nanoVLM's signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling
from vlmpack.images import DynamicResize, GlobalAndSplitImages, to_float, to_rgb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

_tokenizers: dict[object, PreTrainedTokenizerBase] = {}


def get_tokenizer(
    name: str,
    extra_special_tokens: Mapping[str, str] | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, with end-of-sequence as padding; one object for the same arguments.

    Args:
        name: A folder or a hub name.
        extra_special_tokens: Attribute name to token, such as {"image_token": "<|image|>"}.
        chat_template: Instead of the tokenizer's own.
    """
    tokens = dict(extra_special_tokens or {})
    identity = (name, tuple(sorted(tokens.items())), chat_template)
    if identity not in _tokenizers:
        options: dict[str, object] = {"use_fast": True}
        if tokens:
            options["extra_special_tokens"] = tokens
        if chat_template is not None:
            options["chat_template"] = chat_template
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
        tokenizer.pad_token = tokenizer.eos_token
        _tokenizers[identity] = tokenizer
    return _tokenizers[identity]


class ImageProcessor:
    """PIL image -> (float32 [num_tiles, 3, P, P] in [0, 1], (rows, columns)).

    Args:
        max_img_size: Largest side in pixels.
        splitted_image_size: Side of a tile in pixels; must divide `max_img_size`.
        resize_to_max_side_len: Scale small images up to `max_img_size` too.

    Raises:
        ConfigError: If the tile size does not divide the largest side.
    """

    def __init__(
        self, max_img_size: int, splitted_image_size: int, resize_to_max_side_len: bool = False
    ) -> None:
        self.max_img_size = max_img_size
        self.splitted_image_size = splitted_image_size
        self.resize_to_max_side_len = resize_to_max_side_len
        self._resize = DynamicResize(splitted_image_size, max_img_size, resize_to_max_side_len)
        self._split = GlobalAndSplitImages(splitted_image_size)

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the tiles, global one first, and the grid.

        Args:
            image: Any mode.
        """
        tiles, grid = self._split(self._resize(to_rgb(image)))
        return to_float(tiles), grid

    def tiling(self, tokens_per_tile: int, *, global_tile: bool) -> Tiling:
        """Return the same rule as a `Tiling`.

        Args:
            tokens_per_tile: Image tokens a tile.
            global_tile: Whether the tokenizer has a token for the global tile.
        """
        side = self.splitted_image_size
        patch = next((size for size in (16, 14) if side % size == 0), side)
        return Tiling(
            tile_size=side,
            max_side=self.max_img_size,
            resize_to_max_side=self.resize_to_max_side_len,
            patch_size=patch,
            tokens_per_tile=tokens_per_tile,
            global_tile=global_tile,
            reference_rounding=True,
        )


def get_image_processor(
    max_img_size: int, splitted_image_size: int, resize_to_max_side_len: bool = False
) -> ImageProcessor:
    """Return the image processor; see `ImageProcessor`."""
    return ImageProcessor(max_img_size, splitted_image_size, resize_to_max_side_len)


def get_image_string(
    tokenizer: PreTrainedTokenizerBase,
    splitted_image_counts: Sequence[tuple[int, int]],
    mp_image_token_length: int,
) -> str:
    """Return the text that stands for the images of one sample.

    Args:
        tokenizer: With `image_token`, `r1c1` ... and perhaps `global_image_token`.
        splitted_image_counts: (rows, columns) of each image.
        mp_image_token_length: Image tokens a tile.

    Raises:
        ConfigError: If the tokenizer has no token for a grid this large.
    """
    tile = tokenizer.image_token * mp_image_token_length
    has_global = hasattr(tokenizer, "global_image_token")
    parts: list[str] = []
    for index, (rows, columns) in enumerate(splitted_image_counts):
        if len(splitted_image_counts) > 1:
            parts.append(f"<image: {index}>")
        if has_global:
            parts += [tokenizer.global_image_token, tile]
            if rows == columns == 1:
                continue
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                mark = getattr(tokenizer, f"r{row}c{column}", None)
                if mark is None:
                    raise ConfigError(
                        f"image {index} has {rows} x {columns} tiles but the tokenizer has no token "
                        f"r{row}c{column}; lower max_img_size or add the token"
                    )
                parts += [mark, tile]
    return "".join(parts)
