"""Placeholders: the tokens that stand for an image in the text, and their place in it.

The text is tokenised with ONE image token per image; the whole block of an image is spliced in
afterwards. Special tokens cut the text before any merge, so the result equals tokenising the full
string, at a fraction of its cost: a picture of 17 tiles is 1,105 tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from vlmpack.budget import SampleCost
from vlmpack.errors import ConfigError, SampleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from vlmpack.geometry import ImageGeometry, ImageRule, Tiling
    from vlmpack.samples import Sample

IGNORE_INDEX: Final[int] = -100
"""The label that the loss skips, as in torch and transformers."""

IMAGE_TOKEN: Final = "<|image|>"
GLOBAL_IMAGE_TOKEN: Final = "<|global_image|>"


def position_token(row: int, column: int) -> str:
    """Return the token before the tile in this row and column, counted from 0."""
    return f"<row_{row + 1}_col_{column + 1}>"


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingGrowth:
    """What `add_image_tokens` did to the vocabulary."""

    num_added: int
    """Tokens that were not in the vocabulary before."""
    num_embeddings: int
    """Rows that the model's embedding needs: `model.resize_token_embeddings(num_embeddings)` if it has
    fewer."""


def add_image_tokens(tokenizer: PreTrainedTokenizerBase, tiling: Tiling) -> EmbeddingGrowth:
    """Add the special tokens that stand for images, and say how far the embedding must grow.

    Adds `<|image|>` and, where the tiling puts a token before each tile, `<|global_image|>` and
    `<row_i_col_j>` up to the largest grid. Tokens that exist are left alone, so calling twice is safe.

    Args:
        tokenizer: Changed in place.
        tiling: Says which grids can occur.

    Returns:
        The number of tokens added and the number of embedding rows needed.
    """
    tokens = [IMAGE_TOKEN]
    if tiling.position_tokens:
        sides = range(tiling.max_grid_side)
        tokens += [GLOBAL_IMAGE_TOKEN] * tiling.global_tile
        tokens += [position_token(row, column) for row in sides for column in sides]
    num_added = tokenizer.add_tokens(tokens, special_tokens=True)
    num_embeddings = max(tokenizer.get_vocab().values()) + 1
    return EmbeddingGrowth(num_added=num_added, num_embeddings=num_embeddings)


class Placeholders(Protocol):
    """The tokens of a tokenizer that stand for images: `ImageTokens`, or those of a model family."""

    @property
    def text(self) -> str:
        """The one special token that stands for an image until its block is spliced in."""
        ...

    @property
    def anchor(self) -> int:
        """The id of `text`."""
        ...

    @property
    def in_message(self) -> str:
        """What stands for an image in a message; holds `text` once."""
        ...

    @property
    def around(self) -> tuple[str, str]:
        """What is put before and after `text` once the chat template is rendered."""
        ...

    def block(self, geometry: ImageGeometry) -> npt.NDArray[np.int64]:
        """Return int64 [geometry.num_tokens]: what takes the place of `text`."""
        ...

    def removed_from(self, text: str) -> str:
        """Return a user's words without any of these tokens."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokens:
    """The tokens of a tokenizer that stand for images."""

    text: str
    """The image token, as text."""
    image: int
    """Its id."""
    global_image: int | None
    """Id of the token before the global tile; None where the tokenizer has none."""
    positions: tuple[tuple[int, ...], ...]
    """[rows][columns] ids of the tokens before the tiles; empty where a tile has no such token."""
    all_texts: tuple[str, ...] = field(repr=False, default=())
    """Every one of these tokens as text: none may come out of a user's words."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, tiling: Tiling) -> ImageTokens:
        """Find the tokens by the tokenizer's attributes (`image_token`, `r1c1`) or their usual text.

        Args:
            tokenizer: With the tokens in its vocabulary, for example from `add_image_tokens`.
            tiling: Says which tokens can occur.

        Raises:
            ConfigError: If a token is missing, or is not special, so that merges could swallow it.
        """
        special = {token.content for token in tokenizer.added_tokens_decoder.values()}

        def look_up(attribute: str, usual: str) -> tuple[str, int]:
            text = str(getattr(tokenizer, attribute, None) or usual)
            if text not in special:
                raise ConfigError(
                    f"the tokenizer has no special token {text!r}; call add_image_tokens(tokenizer, tiling) "
                    "and grow the model's embedding by what it returns"
                )
            return text, int(tokenizer.convert_tokens_to_ids(text))

        text, image = look_up("image_token", IMAGE_TOKEN)
        texts, global_image, positions = [text], None, []
        if tiling.position_tokens:
            if tiling.global_tile:
                global_text, global_image = look_up("global_image_token", GLOBAL_IMAGE_TOKEN)
                texts.append(global_text)
            side = tiling.max_grid_side
            outermost = str(getattr(tokenizer, f"r{side}c1", None) or position_token(side - 1, 0))
            if tiling.reference_rounding and outermost not in special:
                side -= 1  # the one picture in thousands that needs it is refused then
            for row in range(side):
                pairs = [
                    look_up(f"r{row + 1}c{column + 1}", position_token(row, column)) for column in range(side)
                ]
                texts += [pair[0] for pair in pairs]
                positions.append(tuple(pair[1] for pair in pairs))
        return cls(
            text=text,
            image=image,
            global_image=global_image,
            positions=tuple(positions),
            all_texts=tuple(texts),
        )

    @property
    def anchor(self) -> int:
        """The image token's id: it alone stands for an image until the block is spliced in."""
        return self.image

    @property
    def in_message(self) -> str:
        """What stands for an image in a message."""
        return self.text

    @property
    def around(self) -> tuple[str, str]:
        """Nothing is put around an image."""
        return "", ""

    def block(self, geometry: ImageGeometry) -> npt.NDArray[np.int64]:
        """Return int64 [geometry.num_tokens]: the tokens of one image, global tile first.

        O(tiles), cached by grid; the array is shared and read-only.

        Args:
            geometry: How the image is cut.

        Raises:
            SampleError: If the tokenizer has no token for a tile this far out.
        """
        grid = geometry.grid
        if self.positions and max(grid.rows, grid.columns) > len(self.positions):
            raise SampleError(
                "image_too_large",
                f"an image has {grid.rows} x {grid.columns} tiles but the tokenizer has tokens for "
                f"{len(self.positions)} x {len(self.positions)}; add the tokens or lower max_side",
                rows=grid.rows,
                columns=grid.columns,
            )
        marked = geometry.num_tokens > geometry.num_image_tokens
        tokens_per_tile = geometry.num_image_tokens // geometry.num_tiles
        return _block(self, tokens_per_tile, marked, geometry.has_global_tile, grid.rows, grid.columns)

    def removed_from(self, text: str) -> str:
        """Return the text without any of these tokens, also those that a removal puts together. O(text).

        Args:
            text: A user's words.
        """
        return without(text, self.all_texts)


def without(text: str, tokens: tuple[str, ...]) -> str:
    """Return the text without any of these tokens, also those that a removal puts together. O(text).

    Args:
        text: A user's words.
        tokens: None of them empty.
    """
    if not any(token in text for token in tokens):
        return text
    pattern = _any_of(tokens)
    reach = max(map(len, tokens)) - 1
    kept: list[str] = []
    for piece in pattern.split(text):
        start = 0
        # Both sides of the seam are free of tokens, so a token found there lies across it.
        while match := pattern.search((tail := "".join(kept[-reach:])) + piece[start : start + reach]):
            del kept[len(kept) - len(tail) + match.start() :]
            start += match.end() - len(tail)
        kept.extend(piece[start:])
    return "".join(kept)


@lru_cache
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


@lru_cache(maxsize=512)
def _block(
    tokens: ImageTokens, tokens_per_tile: int, marked: bool, has_global: bool, rows: int, columns: int
) -> npt.NDArray[np.int64]:
    before: list[tuple[int, ...]] = []
    # A single tile is the whole picture: it takes the global token and no second copy.
    is_global = has_global or (rows * columns == 1 and tokens.global_image is not None)
    if is_global:
        before.append((tokens.global_image,) * marked if tokens.global_image is not None else ())
    if not is_global or rows * columns > 1:
        for row in range(rows):
            before += [
                (tokens.positions[row][column],) * marked if marked else () for column in range(columns)
            ]
    tile = (tokens.image,) * tokens_per_tile
    block = np.array([token for mark in before for token in mark + tile], np.int64)
    block.flags.writeable = False
    return block


def splice(
    array: npt.NDArray[np.int64], blocks: Sequence[npt.NDArray[np.int64]], cuts: Sequence[tuple[int, int]]
) -> tuple[npt.NDArray[np.int64], tuple[int, ...]]:
    """Replace array[start:stop] of each cut by a block.

    Args:
        array: int64 [T].
        blocks: int64 arrays, one a cut.
        cuts: (start, stop) in ascending order, not overlapping.

    Returns:
        The new int64 array and the position at which each block begins. O(result).
    """
    pieces, starts, end, length = [], [], 0, 0
    for block, (start, stop) in zip(blocks, cuts, strict=True):
        pieces += [array[end:start], block]
        length += start - end
        starts.append(length)
        length += len(block)
        end = stop
    pieces.append(array[end:])
    return np.concatenate(pieces), tuple(starts)


def retile(sample: Sample, tokens: Placeholders, rule: ImageRule) -> Sample:
    """Return the sample with its images cut by another rule; text and labels stay.

    Args:
        sample: With its images' tokens in place.
        tokens: The tokenizer's image tokens.
        rule: The new rule.
    """
    geometries = rule.sample([(image.height, image.width) for image in sample.images])
    cuts = [
        (start, start + old.num_tokens)
        for start, old in zip(sample.image_starts, sample.geometries, strict=True)
    ]
    blocks = [tokens.block(geometry) for geometry in geometries]
    input_ids, starts = splice(sample.input_ids, blocks, cuts)
    labels, _ = splice(sample.labels, [np.full_like(block, IGNORE_INDEX) for block in blocks], cuts)
    return replace(
        sample,
        input_ids=input_ids,
        labels=labels,
        geometries=geometries,
        image_starts=starts,
        cost=cost_of(input_ids, geometries),
    )


def cost_of(input_ids: npt.NDArray[np.int64], geometries: tuple[ImageGeometry, ...]) -> SampleCost:
    """Return what a sample of these tokens and images uses of each budget."""
    return SampleCost(
        num_tokens=len(input_ids),
        num_images=len(geometries),
        num_patches=sum(geometry.num_patches for geometry in geometries),
    )
