"""Tokenizer: what the user calls one -> a tokenizer with image tokens."""

from pathlib import Path
from typing import TYPE_CHECKING

from vlmpack.cli.hub import check_hub
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vlmpack.geometry import Tiling


def open_tokenizer(where: str | None, tiling: "Tiling") -> "PreTrainedTokenizerBase":
    """Load a tokenizer and add the image tokens that it lacks.

    Args:
        where: A folder, or a name on the Hub, of which a cached copy is used if there is one; None for
            the demo's.
        tiling: Says which image tokens can occur.

    Raises:
        ConfigError: If there is no tokenizer.
        SourceError: If the Hub cannot be reached or has none.
    """
    from transformers import AutoTokenizer

    from vlmpack.corpus import load_tokenizer
    from vlmpack.stages import add_image_tokens

    if where is None:
        tokenizer: PreTrainedTokenizerBase = load_tokenizer()
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
        except (OSError, ValueError) as error:
            if Path(where).expanduser().exists():
                reason = str(error).strip().splitlines()[0]
                raise ConfigError(f"--tokenizer: there is no tokenizer in {where}: {reason}") from error
            check_hub("model", where)
            tokenizer = AutoTokenizer.from_pretrained(where)
    add_image_tokens(tokenizer, tiling)
    return tokenizer
