"""The families' own processors, without torchvision, as oracles: of the tiny sizes, and of the real ones."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.family_models import byte_tokenizer
from vlmpack.families import FAMILIES, add_family_tokens, family_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from vlmpack.families import Family

NAMES = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
}
"""What a processor asks its tokenizer for by name."""


def image_processor_of(family: Family) -> Any:
    """Return the family's own image processor with the sizes of `family`."""
    common = {"image_mean": list(family.image_mean), "image_std": list(family.image_std)}
    if family.name in {"idefics3", "smolvlm"}:
        kind = Idefics3ImageProcessorPil if family.name == "idefics3" else SmolVLMImageProcessorPil
        return kind(
            size={"longest_edge": family.longest_edge}, max_image_size={"longest_edge": family.tile}, **common
        )
    if family.name.startswith("qwen"):
        return Qwen2VLImageProcessorPil(
            min_pixels=family.min_pixels,
            max_pixels=family.max_pixels,
            patch_size=family.patch_size,
            merge_size=family.merge_size,
            **common,
        )
    square = {"height": family.tile, "width": family.tile}
    if family.name == "internvl":
        return GotOcr2ImageProcessorPil(
            size=square,
            crop_to_patches=True,
            min_patches=family.min_tiles,
            max_patches=family.max_tiles,
            **common,
        )
    if family.name == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(
            size=square, image_grid_pinpoints=[list(size) for size in family.pinpoints], **common
        )
    if family.name == "gemma3":
        return Gemma3ImageProcessorPil(size=square, **common)
    return CLIPImageProcessorPil(size={"shortest_edge": family.tile}, crop_size=square, **common)


def image_only(cls: type) -> type:
    """Return a processor class that needs no video processor, which only torchvision could give."""

    class ImageOnly(cls):
        def check_argument_for_proper_class(self, name: str, argument: object) -> object:
            if name == "video_processor" and argument is None:
                return type(None)
            return super().check_argument_for_proper_class(name, argument)

    ImageOnly.__name__ = cls.__name__
    return ImageOnly


@lru_cache
def processor_of(family: Family) -> Any:
    """Return the family's own processor with the sizes of `family` and a tokenizer of bytes."""
    tokenizer = processor_tokenizer(family)
    images = image_processor_of(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if family.name in {"idefics3", "smolvlm"}:  # SmolVLM's own needs num2words, and expands images alike
            return transformers.Idefics3Processor(images, tokenizer, image_seq_len=family.tokens_per_tile)
        if family.name.startswith("qwen"):
            kind = {
                "qwen2_vl": transformers.Qwen2VLProcessor,
                "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
                "qwen3_vl": transformers.Qwen3VLProcessor,
            }[family.name]
            return image_only(kind)(images, tokenizer, None)
        if family.name == "internvl":
            return image_only(transformers.InternVLProcessor)(
                images, tokenizer, None, image_seq_length=family.tokens_per_tile
            )
        if family.name == "llava_onevision":
            return image_only(transformers.LlavaOnevisionProcessor)(
                images,
                tokenizer,
                None,
                num_image_tokens=(family.tile // family.patch_size) ** 2,
                vision_feature_select_strategy="full",
                vision_aspect_ratio=f"anyres_max_{family.max_tiles}",
            )
        if family.name == "gemma3":
            return transformers.Gemma3Processor(images, tokenizer, image_seq_length=family.tokens_per_tile)
        return transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=family.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )


@lru_cache
def processor_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    add_family_tokens(tokenizer, family)
    names = NAMES.get(family.name, {})
    tokenizer.add_tokens(list(names.values()), special_tokens=True)
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


DEFAULTS = {name: family_for(name) for name, kind in FAMILIES.items() if kind.is_transformers}
"""With the sizes of published checkpoints."""
