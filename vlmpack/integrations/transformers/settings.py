"""Settings: what `TrainingArguments` must not ask for when packs are trained, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import TrainingArguments


def check_arguments(args: TrainingArguments) -> None:
    """Refuse every setting that would lose packs, mix their samples, or move the data position.

    Args:
        args: Of the trainer.

    Raises:
        ConfigError: If there is one; names all of them, each with its reason and the remedy.
    """
    problems = [*_data_problems(args), *_model_problems(args), *_parallel_problems(args)]
    if problems:
        raise ConfigError(
            "these training arguments do not go with packs:\n" + "\n".join(f"- {each}" for each in problems)
        )


def _data_problems(args: TrainingArguments) -> Iterator[str]:
    config = args.accelerator_config
    if config.dispatch_batches:
        yield (
            "accelerator_config dispatch_batches=True: the dispatcher cuts every tensor to as many items as "
            "input_ids has rows, images and flash-attention boundaries too. Leave it unset: each rank reads "
            "its own packs"
        )
    if config.split_batches:
        yield (
            "accelerator_config split_batches=True: a batch of packs cannot be cut along its first axis, "
            "images lie flat along it. Leave it unset and give per_device_train_batch_size packs a rank"
        )
    if args.auto_find_batch_size:
        yield (
            "auto_find_batch_size=True: it begins the epoch again after running out of memory, which trains "
            "on packs twice. Bound what a batch may hold by a BatchBudget, or make packs smaller"
        )
    if args.train_sampling_strategy != "random":
        yield (
            f"train_sampling_strategy={args.train_sampling_strategy!r}: which samples share a batch and in "
            "which order is the plan's, by its seed. Leave it unset"
        )
    if args.dataloader_drop_last:
        yield "dataloader_drop_last=True: it loses the packs of each epoch's last batch. Leave it unset"
    if not args.dataloader_in_order:
        yield "dataloader_in_order=False: a saved position means nothing if batches overtake each other"
    if args.ignore_data_skip:
        yield (
            "ignore_data_skip=True: the position in the data is restored without reading what was had, so "
            "there is nothing to save. Leave it unset"
        )


def _model_problems(args: TrainingArguments) -> Iterator[str]:
    if args.use_cache:
        yield (
            "use_cache=True: with a cache, transformers does not look for packed samples, and every sample "
            "attends to those before it, without a warning. Leave it unset"
        )
    if args.neftune_noise_alpha is not None:
        yield (
            "neftune_noise_alpha: its noise is scaled by the length of the row, so a sample would get less "
            "of it the more it shares its pack with. Leave it unset"
        )
    if args.use_liger_kernel:
        yield (
            "use_liger_kernel=True: it computes the loss inside the model, as a mean that cannot be weighted "
            "over a whole step. Leave it unset; the loss here converts supervised positions only"
        )


def _parallel_problems(args: TrainingArguments) -> Iterator[str]:
    if args.n_gpu > 1:
        yield (
            f"{args.n_gpu} GPUs in one process: DataParallel cuts every tensor along its first axis, images "
            "too. Start one process a GPU with `torchrun --nproc-per-node` or `accelerate launch`"
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        yield (
            "average_tokens_across_devices=False: ranks hold different numbers of supervised tokens, so the "
            "mean of their means is another gradient. Leave it unset"
        )
    parallel = args.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled or parallel.tp_enabled):
        yield (
            "context, sequence or tensor parallelism: the first two cut rows between samples' tokens and "
            "drop the mask that keeps samples apart, and each rank here reads packs of its own. Use data "
            "parallelism (DDP, FSDP)"
        )
