"""Drop-in for nanoVLM's data code: the same names, arguments, keys, dtypes, label shift and padding.

    - from data.processors import get_image_processor, get_tokenizer
    - from data.datasets import VQADataset
    - from data.advanced_datasets import ConstantLengthDataset
    - from data.collators import VQACollator
    - from data.data_utils import synchronized_dataloader_step
    + from vlmpack.integrations.nanovlm import (
    +     ConstantLengthDataset, VQACollator, VQADataset, get_image_processor, get_tokenizer,
    +     synchronized_dataloader_step,
    + )

What differs, on purpose: nothing hangs (a failure is raised at the consumer), every dropped row is
counted in `ConstantLengthDataset.report`, the image limit holds for a sample alone, no spare packs are
opened, pixels are decoded only for what is packed, transparent pixels become white instead of their
hidden colour, and `queue_size` counts packs, of which at most 8 are held.
The batch has no positions: nanoVLM's model does not isolate samples. `vlmpack.pipeline` does.
"""

from vlmpack.images import DynamicResize, GlobalAndSplitImages, SplitImage
from vlmpack.integrations.nanovlm.collators import VQACollator, synchronized_dataloader_step
from vlmpack.integrations.nanovlm.datasets import ConstantLengthDataset, VQADataset
from vlmpack.integrations.nanovlm.items import Item
from vlmpack.integrations.nanovlm.processors import (
    ImageProcessor,
    get_image_processor,
    get_image_string,
    get_tokenizer,
)

__all__ = [
    "ConstantLengthDataset",
    "DynamicResize",
    "GlobalAndSplitImages",
    "ImageProcessor",
    "Item",
    "SplitImage",
    "VQACollator",
    "VQADataset",
    "get_image_processor",
    "get_image_string",
    "get_tokenizer",
    "synchronized_dataloader_step",
]
