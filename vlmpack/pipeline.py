"""Every stage in order. Read this file first.

    rows            RowSource        (key, raw row), each row in exactly one worker
     |              RowParser        one form for all column layouts; image sizes from headers
     v
    samples         VQADataset       chat template, one tokenisation, labels, image tokens, exact cost
     |              Admission        too long, too many images, over a budget: refused, or fewer tiles
     v
    plans           StreamPacker     which samples share a pack, from their costs alone
     |
     v
    packs           Assembler        decode, resize and tile (threads); segments and positions
     |
     v
    batches         VQACollator      stacked, checked against the device's budget and memory

A row ends in a pack or, with a reason, in the `PackingReport`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field
from torch.utils.data import DataLoader

from vlmpack.budget import BatchBudget
from vlmpack.collate import Batch, VQACollator
from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling
from vlmpack.memory import BatchGuard, TrainingRegime
from vlmpack.packing import ConstantLengthDataset, PackedSequence, PackingReport
from vlmpack.packing.methods import Method
from vlmpack.stages import OversizePolicy, RatingMinima, VQADataset
from vlmpack.transfer import SharedBatches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vlmpack.families import Family


class PipelineConfig(BaseModel):
    """Every setting of the pipeline. Strict: a misspelt or wrongly typed setting is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    tile_size: int = Field(512, gt=0, description="side of a tile in pixels")
    max_side: int = Field(2048, gt=0, description="largest side of an image in pixels")
    resize_to_max_side: bool = Field(False, description="scale small images up to max_side too")
    patch_size: int = Field(16, gt=0, description="side of a ViT patch in pixels")
    tokens_per_tile: int = Field(64, gt=0, description="image tokens a tile")
    seq_length: int = Field(4096, gt=0, description="tokens a pack may hold")
    max_sample_length: int | None = Field(None, gt=0, description="refuse samples with as many tokens")
    max_images_per_example: int | None = Field(4, ge=0, description="refuse samples with more images")
    max_images: int | None = Field(18, ge=0, description="images a pack may hold")
    max_patches: int | None = Field(None, ge=0, description="ViT patches a pack may hold")
    batch_size: int = Field(1, gt=0, description="packs a batch")
    max_batch_patches: int | None = Field(None, ge=0, description="ViT patches a batch may hold")
    gpu: str | int | None = Field(None, description="name or bytes of the GPU that a batch must fit")
    model: str | Path | None = Field(None, description="preset or config of the model on it")
    regime: TrainingRegime | None = Field(None, description="how it is trained; None: with packed rows")
    memory_margin: float = Field(0.03, ge=0, lt=1, description="share of the GPU's peak left free")
    memory_replay: bool = Field(False, description="ask a replay of the allocator, which takes more")
    lookahead: int = Field(4096, gt=0, description="samples that may wait for a pack")
    method: Method = Field("auto", description="packing algorithm")
    seed: int = Field(0, ge=0, description="decides the order of packs")
    oversize: OversizePolicy = Field("drop", description="for a sample that is over a limit alone")
    append_pad: bool = Field(True, description="append a padding token to each sample")
    image_marker: str | None = Field("<image>", description="what stands for an image in the text")
    image_root: Path | None = Field(None, description="folder that image paths may lead into")
    key_column: str | None = Field(None, description="column that names a row")
    chat_template: str | None = Field(None, description="instead of the tokenizer's own")
    min_rating: int = Field(1, description="least rating of a turn, for data sets that rate turns")
    max_refusal_ratio: float | None = Field(None, ge=0, le=1, description="stop over this share of refusals")
    warn_refusal_ratio: float | None = Field(None, ge=0, le=1, description="warn over this share of refusals")
    account: Path | None = Field(None, description="folder for a line about each row, as Parquet")
    shuffle_seed: int | None = Field(None, ge=0, description="shuffle rows, another way in each epoch")
    shuffle_window: int = Field(1024, gt=0, description="rows of a stream that are shuffled together")
    decode: bool = Field(True, description="decode images; without, only plan and count")
    decode_threads: int = Field(2, ge=0, description="threads that decode images")
    num_workers: int = Field(0, ge=0, description="processes that prepare batches")

    def tiling(self) -> Tiling:
        """Return the rule by which images are cut."""
        return Tiling(
            tile_size=self.tile_size,
            max_side=self.max_side,
            resize_to_max_side=self.resize_to_max_side,
            patch_size=self.patch_size,
            tokens_per_tile=self.tokens_per_tile,
        )

    def memory(self) -> BatchGuard | None:
        """Return what knows which batches fit, or None where no GPU is named.

        Raises:
            ConfigError: If one of GPU and model is named without the other, or unknown.
        """
        if self.gpu is None and self.model is None and self.regime is None:
            return None
        if self.gpu is None or self.model is None:
            raise ConfigError(
                f"a memory check needs gpu and model, got gpu={self.gpu!r}, model={self.model!r}"
            )
        return BatchGuard(
            self.model, self.regime, self.gpu, margin=self.memory_margin, replay=self.memory_replay
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """The stages, connected."""

    samples: VQADataset
    """Rows -> samples."""
    packs: ConstantLengthDataset
    """Samples -> packs."""
    collator: VQACollator
    """Packs -> batch."""
    loader: DataLoader[PackedSequence]
    """Iterating yields `Batch`es."""

    @property
    def report(self) -> PackingReport:
        """What became of every row in the latest pass."""
        return self.packs.report


def build_pipeline(
    dataset: object,
    tokenizer: PreTrainedTokenizerBase,
    config: PipelineConfig | None = None,
    *,
    memory: BatchGuard | None = None,
    family: Family | None = None,
) -> Pipeline:
    """Connect every stage for one data set.

    Args:
        dataset: A Hugging Face data set, a list of rows, or an iterable of rows.
        tokenizer: With the image tokens, for example from `add_image_tokens`.
        config: The settings.
        memory: Knows what the GPU takes, for a model that no name or file describes; else `config` says it.
        family: The model's, from `family_for`, instead of the config's tiling; batches are then what its
            forward takes.

    Raises:
        ConfigError: If settings contradict each other or the tokenizer lacks something.
    """
    config = config or PipelineConfig()
    memory = memory or config.memory()
    least = config.min_rating
    samples = VQADataset(
        dataset,
        tokenizer,
        tiling=config.tiling() if family is None else None,
        family=family,
        chat_template=config.chat_template,
        image_marker=config.image_marker,
        image_root=config.image_root,
        key_column=config.key_column,
        shuffle_seed=config.shuffle_seed,
        shuffle_window=config.shuffle_window,
        ratings=RatingMinima(
            relevance=least, image_correspondence=least, visual_dependency=least, formatting=least
        ),
    )
    packs = ConstantLengthDataset(
        samples,
        max_sample_length=config.max_sample_length,
        seq_length=config.seq_length,
        max_images_per_example=config.max_images_per_example,
        max_images_per_knapsack=config.max_images,
        max_patches=config.max_patches,
        memory=memory,
        batch_size=config.batch_size,
        lookahead=config.lookahead,
        method=config.method,
        seed=config.seed,
        oversize=config.oversize,
        append_pad=config.append_pad,
        decode_threads=config.decode_threads,
        decode=config.decode,
        max_refusal_ratio=config.max_refusal_ratio,
        warn_refusal_ratio=config.warn_refusal_ratio,
        account=config.account,
    )
    budget = BatchBudget(max_patches=config.max_batch_patches)
    collator = VQACollator(tokenizer, config.seq_length, budget=budget, memory=memory, family=family)
    loader: DataLoader[PackedSequence] = DataLoader(
        packs,
        batch_size=config.batch_size,
        collate_fn=SharedBatches(collator) if config.num_workers else collator,
        num_workers=config.num_workers,
    )
    return Pipeline(samples=samples, packs=packs, collator=collator, loader=loader)


__all__ = ["Batch", "Pipeline", "PipelineConfig", "build_pipeline"]
