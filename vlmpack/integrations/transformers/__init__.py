"""Train on packs with Hugging Face `Trainer` and `accelerate`. Needs `pip install 'vlmpack[trainer]'`."""

from vlmpack.integrations.transformers.settings import check_arguments
from vlmpack.integrations.transformers.trainer import PackedTrainer

__all__ = ["PackedTrainer", "check_arguments"]
