"""Tiny models of the real classes, with random weights, and packs for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.emulated_flash import use_flash
from tests.fakes import picture, row
from tests.nanovlm_model import Sizes, VisionLanguageModel
from vlmpack.collate import VQACollator
from vlmpack.corpus import CHATML
from vlmpack.families import (
    Gemma3,
    Idefics3,
    InternVL,
    Llava,
    LlavaOnevision,
    NanoVLM,
    Qwen2VL,
    Qwen3VL,
    Qwen25VL,
    SmolVLM,
    add_family_tokens,
    prepare_model_for_packing,
)
from vlmpack.geometry import Tiling
from vlmpack.packing.assemble import Assembler
from vlmpack.stages import VQADataset

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vlmpack.families import Family
    from vlmpack.packing import PackedSequence

WIDTH = 32
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "attention_bias": False,
}
EYES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_channels": 3,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family with its tiny model."""

    family: Family
    make_config: Callable[[PreTrainedTokenizerBase], transformers.PretrainedConfig]
    alone: Callable[[dict], dict] = lambda batch: {}
    """What a sample alone needs besides, for the model to make its own positions and masks."""

    @property
    def name(self) -> str:
        return self.family.name


def _idefics3(kind: str, family: Idefics3) -> Callable:
    def make(tokenizer):
        text = "llama"
        return transformers.CONFIG_MAPPING[kind](
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=256,
            scale_factor=family.scale_factor,
            vision_config={**EYES, "image_size": family.tile, "patch_size": family.patch_size},
            text_config={"model_type": text, **TEXT, "vocab_size": size_of(tokenizer)},
        )

    return make


def _qwen2(kind: str, family: Qwen2VL) -> Callable:
    def make(tokenizer):
        eyes = {
            "depth": 2,
            "num_heads": 4,
            "patch_size": family.patch_size,
            "spatial_merge_size": family.merge_size,
            "temporal_patch_size": family.temporal_patch_size,
        }
        if kind == "qwen2_vl":
            eyes |= {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
        else:
            eyes |= {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 48}
        if kind == "qwen2_5_vl":
            eyes |= {"window_size": 4 * family.patch_size, "fullatt_block_indexes": [1]}
        if kind == "qwen3_vl":
            eyes |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        if kind == "qwen3_vl":
            rope["mrope_interleaved"] = True
        text = {**TEXT, "vocab_size": size_of(tokenizer), "rope_parameters": rope, "head_dim": 8}
        return transformers.CONFIG_MAPPING[kind](
            text_config=text,
            vision_config=eyes,
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        )

    return make


def _token_types(batch: dict) -> dict:
    """Return what Qwen-VL makes its positions of."""
    image = tokenizer_of("qwen2_vl").convert_tokens_to_ids("<|image_pad|>")
    return {"mm_token_type_ids": (batch["input_ids"] == image).int()}


def _gemma_types(batch: dict) -> dict:
    """Return what Gemma 3 makes its masks of; alone, a sample gets no mask."""
    batch.pop("attention_mask")
    image = tokenizer_of("gemma3").convert_tokens_to_ids("<image_soft_token>")
    return {"token_type_ids": (batch["input_ids"] == image).int()}


def _llava(kind: str, family: Llava | LlavaOnevision, **more: object) -> Callable:
    def make(tokenizer):
        eyes = {**EYES, "image_size": family.tile, "patch_size": family.patch_size}
        eyes["model_type"] = "clip_vision_model" if kind == "llava" else "siglip_vision_model"
        return transformers.CONFIG_MAPPING[kind](
            vision_config=eyes,
            text_config={"model_type": "llama", **TEXT, "vocab_size": size_of(tokenizer)},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            **more,
        )

    return make


def _internvl(family: InternVL) -> Callable:
    def make(tokenizer):
        return transformers.CONFIG_MAPPING["internvl"](
            vision_config={**EYES, "image_size": [family.tile] * 2, "patch_size": [family.patch_size] * 2},
            text_config={"model_type": "qwen2", **TEXT, "vocab_size": size_of(tokenizer)},
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=family.tokens_per_tile,
        )

    return make


def _gemma3(family: Gemma3) -> Callable:
    def make(tokenizer):
        text = {**TEXT, "vocab_size": size_of(tokenizer), "head_dim": 8, "query_pre_attn_scalar": 8}
        text |= {"sliding_window": family.sliding_window, "sliding_window_pattern": 2}
        return transformers.CONFIG_MAPPING["gemma3"](
            vision_config={**EYES, "image_size": family.tile, "patch_size": family.patch_size},
            text_config=text,
            mm_tokens_per_image=family.tokens_per_tile,
            image_token_id=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        )

    return make


def _cases() -> dict[str, Case]:
    idefics3 = Idefics3(tile=28, longest_edge=84, patch_size=14, scale_factor=2)
    smolvlm = SmolVLM(tile=32, longest_edge=64, patch_size=8, scale_factor=2)
    qwen2 = Qwen2VL(min_pixels=28 * 28, max_pixels=28 * 28 * 9)
    qwen25 = Qwen25VL(min_pixels=28 * 28, max_pixels=28 * 28 * 9)
    qwen3 = Qwen3VL(min_pixels=32 * 32, max_pixels=32 * 32 * 9)
    pinpoints = tuple((28 * rows, 28 * columns) for rows in (1, 2, 3) for columns in (1, 2, 3))
    onevision = LlavaOnevision(tile=28, patch_size=7, max_tiles=4, pinpoints=pinpoints)
    llava = Llava(tile=28, patch_size=7)
    internvl = InternVL(tile=28, patch_size=7, max_tiles=4, tokens_per_tile=4)
    gemma3 = Gemma3(tile=28, patch_size=7, tokens_per_tile=4, sliding_window=20)
    return {
        case.name: case
        for case in (
            Case(family=idefics3, make_config=_idefics3("idefics3", idefics3)),
            Case(family=smolvlm, make_config=_idefics3("smolvlm", smolvlm)),
            Case(family=qwen2, make_config=_qwen2("qwen2_vl", qwen2), alone=_token_types),
            Case(family=qwen25, make_config=_qwen2("qwen2_5_vl", qwen25), alone=_token_types),
            Case(family=qwen3, make_config=_qwen2("qwen3_vl", qwen3), alone=_token_types),
            Case(
                family=onevision,
                make_config=_llava(
                    "llava_onevision",
                    onevision,
                    image_grid_pinpoints=[list(size) for size in pinpoints],
                    vision_aspect_ratio="anyres_max_4",
                ),
            ),
            Case(family=llava, make_config=_llava("llava", llava)),
            Case(family=internvl, make_config=_internvl(internvl)),
            Case(family=gemma3, make_config=_gemma3(gemma3), alone=_gemma_types),
        )
    }


CASES = _cases()
"""Of transformers' classes."""

NANOVLM = NanoVLM(tiling=Tiling(tile_size=32, max_side=64, patch_size=8, tokens_per_tile=4))
FAMILIES = {name: case.family for name, case in CASES.items()} | {"nanovlm": NANOVLM}
"""The tiny families, nanoVLM too."""


def size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte: a small vocabulary keeps the models small."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=CHATML
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


@lru_cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    add_family_tokens(tokenizer, FAMILIES[name])
    return tokenizer


@lru_cache
def model_of(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """Return the tiny model, weights N(0, 1 / fan in), so that logits are about 1 and differences show.

    Args:
        name: The family.
        attention: "eager", "sdpa" or "flash", which needs `tests.emulated_flash.emulated`.
    """
    if name == "nanovlm":
        return prepare_model_for_packing(bare_nanovlm())
    config = CASES[name].make_config(tokenizer_of(name))
    kernel = "sdpa" if attention == "flash" else attention
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for what is not drawn below, such as LLaVA-OneVision's newline
        model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=kernel)
    if attention == "flash":
        use_flash(model)
    return drawn(model)


def bare_nanovlm() -> VisionLanguageModel:
    """Return nanoVLM's likeness, not prepared for packs."""
    tokenizer = tokenizer_of("nanovlm")
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return drawn(VisionLanguageModel(Sizes(vocabulary=size_of(tokenizer)), image))


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with weights N(0, 1 / fan in)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(0, fan_in**-0.5, generator=generator)
    return model.train()


ROWS = [
    row("<image> What is <image> it?", "A picture of two.", [picture(60, 40, 1), picture(30, 64, 2)]),
    row("Say something.", "Something else, and a little more."),
    row("<image> And this?", "That.", [picture(90, 80, 3)]),
    row("<image>", "Yes.", [picture(20, 20, 4)]),
    row("And more?", "No more."),
]
"""Two images, none, one, one, none."""


def packs_of(name: str, plan: list[list[int]], append_pad: bool = False) -> list[PackedSequence]:
    """Return packs of the samples with these numbers."""
    samples = VQADataset(ROWS, tokenizer_of(name), family=FAMILIES[name])
    assemble = Assembler(
        budget=None,
        tile_size=samples.tiling.tile_size,
        pad_token_id=256,
        append_pad=append_pad,
        max_pixels=10**6,
        cut=samples.family.cut,
    )
    packs = []
    for numbers in plan:
        pack, refusals = assemble([samples[number] for number in numbers])
        assert not refusals
        packs.append(pack)
    return packs


LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PLANS = {
    "1 row": [[0, 1, 2]],
    "2 rows": [[0, 1], [2, 3]],
    "text alone in a row": [[2, 0], [1]],
    "text only": [[1, 4]],
}
"""Samples of `ROWS` in each row of the batch."""


def collator_of(name: str, length: int, **settings: object) -> VQACollator:
    return VQACollator(tokenizer_of(name), length, family=FAMILIES[name], **settings)
