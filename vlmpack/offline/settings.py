"""What decides an index: tokenizer, chat template and geometry. A change of any of them makes it stale."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from vlmpack.errors import ConfigError
from vlmpack.pipeline import PipelineConfig
from vlmpack.stages import RatingMinima, VQADataset, add_image_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

_OF_THE_INDEX: Final = (
    "tile_size",
    "max_side",
    "resize_to_max_side",
    "patch_size",
    "tokens_per_tile",
    "image_marker",
    "key_column",
    "chat_template",
    "min_rating",
)
"""Settings of the pipeline that change a row's tokens or costs; the rest is the plan's matter."""


class IndexSettings(BaseModel):
    """How rows become costs."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    tokenizer: str | None = Field(None, description="folder of the tokenizer; the demo's where not given")
    tile_size: int = Field(512, gt=0)
    max_side: int = Field(2048, gt=0)
    resize_to_max_side: bool = False
    patch_size: int = Field(16, gt=0)
    tokens_per_tile: int = Field(64, gt=0)
    image_marker: str | None = "<image>"
    key_column: str | None = None
    chat_template: str | None = None
    min_rating: int = 1

    def pipeline(self, **more: Any) -> PipelineConfig:
        """Return these settings as the pipeline's.

        Args:
            **more: Its other settings.
        """
        return PipelineConfig(**{name: getattr(self, name) for name in _OF_THE_INDEX}, **more)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, with its image tokens. Local files only.

        Raises:
            ConfigError: If there is none.
        """
        from transformers import AutoTokenizer

        from vlmpack.corpus import load_tokenizer

        if self.tokenizer is None:
            tokenizer: PreTrainedTokenizerBase = load_tokenizer()
        else:
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    self.tokenizer, local_files_only=True, trust_remote_code=False
                )
            except (OSError, ValueError) as error:
                reason = (str(error).strip() or "unknown").splitlines()[0]
                raise ConfigError(f"there is no tokenizer in {self.tokenizer}: {reason}") from error
        add_image_tokens(tokenizer, self.pipeline().tiling())
        return tokenizer

    def samples(
        self, rows: Iterable[object], tokenizer: PreTrainedTokenizerBase, image_root: Path | None
    ) -> VQADataset:
        """Return the stage that turns rows into samples.

        Args:
            rows: Of one file, in order.
            tokenizer: From `load_tokenizer`.
            image_root: The folder that image paths may lead into.
        """
        least = self.min_rating
        return VQADataset(
            rows,
            tokenizer,
            tiling=self.pipeline().tiling(),
            chat_template=self.chat_template,
            image_marker=self.image_marker,
            image_root=image_root,
            key_column=self.key_column,
            ratings=RatingMinima(
                relevance=least, image_correspondence=least, visual_dependency=least, formatting=least
            ),
            splits_itself=True,
        )

    def fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return what an index depends on, by name; the tokenizer and its template by digest.

        Args:
            tokenizer: From `load_tokenizer`.
        """
        template = self.chat_template or tokenizer.chat_template
        return {
            **{name: getattr(self, name) for name in _OF_THE_INDEX if name != "chat_template"},
            "chat_template": _digest(json.dumps(template, sort_keys=True, default=str)),
            "tokenizer": _digest(tokenizer.backend_tokenizer.to_str()),
        }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check_fingerprint(where: Path, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse an index that was made with other settings.

    Args:
        where: The index.
        known: Its fingerprint.
        wanted: That of this run.

    Raises:
        ConfigError: If they differ; names every difference.
    """
    changed = [
        f"{name} was {known.get(name)!r} and is {wanted.get(name)!r}"
        for name in sorted({*known, *wanted})
        if known.get(name) != wanted.get(name)
    ]
    if changed:
        raise ConfigError(
            f"the index {where} is stale: {'; '.join(changed)}. Use the old settings, or index into another "
            "folder"
        )
