"""The tokens of a family in a tokenizer: one anchor an image, and the block that takes its place.

The block is encoded by the tokenizer itself, as one string in which each run of image tokens is one
token long, and the runs are stretched afterwards. Its ends are special tokens, so it reads the same alone
as in its text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from vlmpack.errors import ConfigError
from vlmpack.stages.placeholders import EmbeddingGrowth, without

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from vlmpack.families.family import Family
    from vlmpack.geometry import ImageGeometry

Pieces: TypeAlias = tuple[tuple[str, int], ...]
"""(text, how often), one piece after another; only the image token comes more than once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyTokens:
    """The image tokens of a family in one tokenizer; what `VQADataset` asks for."""

    family: Family
    """Says what a block is made of."""
    anchor: int
    """The id of the one special token that stands for an image until its block is spliced in."""
    image: int
    """The id of the token that the model replaces by image features."""
    all_texts: tuple[str, ...] = field(repr=False)
    """Every one of these tokens as text: none may come out of a user's words."""
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    """Encodes the blocks."""
    blocks: dict[Pieces, npt.NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)
    """Those that were made, at most 1,024 of them."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, family: Family) -> FamilyTokens:
        """Find a family's tokens in a tokenizer.

        Args:
            tokenizer: The model's own.
            family: Says which tokens it needs.

        Raises:
            ConfigError: If the tokenizer lacks a token, or could merge it with its neighbours.
        """
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}
        needed = family.special_tokens()
        missing = [token for token in needed if token not in known]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ConfigError(
                f"the tokenizer has no special token {', '.join(map(repr, missing[:5]))}{more}, which "
                f"{family.name} puts where an image stands. Load the tokenizer of the model itself; for a "
                "model of your own call vlmpack.families.add_family_tokens(tokenizer, family) and grow its "
                "embedding"
            )
        return cls(
            family=family,
            anchor=int(tokenizer.convert_tokens_to_ids(family.anchor_token)),
            image=int(tokenizer.convert_tokens_to_ids(family.image_token)),
            all_texts=needed,
            tokenizer=tokenizer,
        )

    @property
    def text(self) -> str:
        """The one special token that stands for an image until its block is spliced in."""
        return self.family.anchor_token

    @property
    def in_message(self) -> str:
        """What stands for an image in a message."""
        return self.family.in_message

    @property
    def around(self) -> tuple[str, str]:
        """What is put around `text` once the chat template is rendered."""
        return self.family.around

    def block(self, geometry: ImageGeometry) -> npt.NDArray[np.int64]:
        """Return int64 [geometry.num_tokens]: the tokens of one image; shared and read-only.

        Args:
            geometry: How the image is cut.

        Raises:
            ConfigError: If the tokenizer makes another number of tokens than the geometry counts.
        """
        pieces = self.family.expansion(geometry)
        block = self.blocks.get(pieces)
        if block is None:
            block = self._encode(pieces)
            if len(self.blocks) < 1024:
                self.blocks[pieces] = block
        if len(block) != geometry.num_tokens:
            raise ConfigError(
                f"the tokenizer makes {len(block)} tokens of an image for which {self.family.name} counts "
                f"{geometry.num_tokens}; it is not the tokenizer of this model"
            )
        return block

    def alone(self, geometry: ImageGeometry) -> npt.NDArray[np.int64]:
        """Return int64 [T]: a text of this one image, with what the family puts around it.

        Args:
            geometry: How the image is cut.
        """
        before, after = self.around
        text = self.in_message.replace(self.text, before + self.text + after)
        ids = np.array(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        at = int(np.argmax(ids == self.anchor))
        return np.concatenate([ids[:at], self.block(geometry), ids[at + 1 :]])

    def removed_from(self, text: str) -> str:
        """Return the text without any of these tokens, also those that a removal puts together. O(text).

        Args:
            text: A user's words.
        """
        return without(text, self.all_texts)

    def _encode(self, pieces: Pieces) -> npt.NDArray[np.int64]:
        text = "".join(piece for piece, _ in pieces)
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int64)
        times = np.ones(len(ids), np.int64)
        times[ids == self.image] = [count for piece, count in pieces if piece == self.family.image_token]
        block = np.repeat(ids, times)
        block.flags.writeable = False
        return block


def add_family_tokens(tokenizer: PreTrainedTokenizerBase, family: Family) -> EmbeddingGrowth:
    """Add the special tokens of a family to a tokenizer that is not the model's own.

    Args:
        tokenizer: Changed in place; tokens that exist are left alone.
        family: Says which tokens it needs.

    Returns:
        The number of tokens added and the number of embedding rows needed.
    """
    num_added = tokenizer.add_tokens(list(family.special_tokens()), special_tokens=True)
    return EmbeddingGrowth(num_added=num_added, num_embeddings=max(tokenizer.get_vocab().values()) + 1)
