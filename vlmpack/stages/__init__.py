"""From rows of a data set to tokenised samples, one file a step: source, rows, tokenize, admit."""

from vlmpack.stages.admit import Admission, OversizePolicy
from vlmpack.stages.mixture import Mixture
from vlmpack.stages.placeholders import EmbeddingGrowth, ImageTokens, add_image_tokens
from vlmpack.stages.rows import RatingMinima, RowParser
from vlmpack.stages.source import RowSource
from vlmpack.stages.spool import SpooledSamples
from vlmpack.stages.tar_shards import TarShards
from vlmpack.stages.tokenize import VQADataset

__all__ = [
    "Admission",
    "EmbeddingGrowth",
    "ImageTokens",
    "Mixture",
    "OversizePolicy",
    "RatingMinima",
    "RowParser",
    "RowSource",
    "SpooledSamples",
    "TarShards",
    "VQADataset",
    "add_image_tokens",
]
