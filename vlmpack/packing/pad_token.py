"""The token that fills what a row does not use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokenizer's padding token, or its end-of-sequence token where it has none.

    Args:
        tokenizer: Any tokenizer.

    Raises:
        ConfigError: If it has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        "the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token"
    )
