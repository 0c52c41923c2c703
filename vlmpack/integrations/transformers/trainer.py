"""PackedTrainer: Hugging Face `Trainer` for packs. What plain `Trainer` does wrong is in docs/training.md.

data       each rank's own loader, never prepared (cut) by accelerate; its position in each checkpoint
forward    no cache, no two-dimensional mask, no Python objects, no labels
loss       outside the model, weighed, divided once by the sum of weights of the whole step
evaluation the same loss over all batches of all ranks, not a mean of means
logs       samples, useful and supervised tokens, padding
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from vlmpack.collate import VQACollator
from vlmpack.errors import ConfigError
from vlmpack.families.prepare import prepare_model_for_packing
from vlmpack.integrations.transformers.batch import Counts, Target, check_batch, count, split_batch
from vlmpack.integrations.transformers.feed import Feed, as_dataloader, make_loader, num_samples
from vlmpack.integrations.transformers.model import auxiliary_loss, switch_caches_off
from vlmpack.integrations.transformers.position import (
    Position,
    checkpoint_folder,
    read_position,
    write_position,
)
from vlmpack.integrations.transformers.settings import check_arguments
from vlmpack.integrations.transformers.together import (
    add_over_ranks,
    check_even_evaluation,
    check_own_data,
)
from vlmpack.weighting import check_weighting, weighted_loss

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch.utils.data import DataLoader

    from vlmpack.weighting import LossWeighting


class PackedTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """A `Trainer` whose steps on packs equal the same steps on their samples one by one.

    `train_dataset` and `eval_dataset` are packs by index (`ConstantLengthDataset.index()`), a stream of packs
    (`ConstantLengthDataset`), or a `PackLoader` or `DataLoader` of batches over one of them;
    `data_collator` is a `VQACollator`. A stream needs `max_steps`. Everything else is as in `Trainer`. It is
    cooperative: `class Mine(PackedTrainer, OtherTrainer)` gives another trainer the same properties.

    Args:
        *args: As for `Trainer`.
        loss_weighting: What a supervised token counts, see `vlmpack.weighting`. None: what the collator
            says, or "token".
        **kwargs: As for `Trainer`.

    Raises:
        ConfigError: If a setting would lose packs or mix their samples.
    """

    loss_is_scaled_for_ga = True  # tells training_step that the loss is a share of the whole step already
    data_collator: Any
    """Packs -> batch."""

    def __init__(self, *args: Any, loss_weighting: LossWeighting | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_arguments(self.args)
        self._choose_weighting(loss_weighting)
        if self.compute_loss_func is not None:
            raise ConfigError(
                "compute_loss_func would replace the weighted loss; override PackedTrainer.loss_of instead"
            )
        # Older releases have no loss_is_scaled_for_ga and decide by this; Qwen3-VL says False, which would
        # divide the loss once more.
        self.model_accepts_loss_kwargs = True
        self._prepare(self.model)
        self.counts = Counts()
        """What went through training, over all ranks."""
        self._logged = Counts()
        self._feed: Feed | None = None
        self._resumed_from: Path | None = None
        self._steps_per_epoch = 1
        self._is_first_step = True
        self._eval_sums = torch.zeros(2, dtype=torch.float64)

    def _prepare(self, model: Any) -> None:
        """Switch off what would let samples see each other; guard the forward of a known family."""
        family = getattr(self.data_collator, "family", None)
        if family is None:
            switch_caches_off(model)
        else:
            prepare_model_for_packing(model, family)

    def call_model_init(self, trial: Any = None) -> Any:
        """Return a new model from `model_init`, made ready for packs.

        Args:
            trial: Of a hyperparameter search.
        """
        model = super().call_model_init(trial)
        if hasattr(self, "data_collator"):  # not while the trainer itself is made
            self._prepare(model)
        return model

    def _choose_weighting(self, asked: LossWeighting | None) -> None:
        """Make trainer and collator agree.

        Raises:
            ConfigError: If they were told different things.
        """
        told = getattr(self.data_collator, "loss_weighting", None)
        if asked is not None and told not in {None, asked}:
            raise ConfigError(f"the trainer is to weigh by {asked!r}, its collator by {told!r}: say it once")
        self.loss_weighting: LossWeighting = asked or told or "token"
        check_weighting(self.loss_weighting)
        if isinstance(self.data_collator, VQACollator):
            self.data_collator = self.data_collator.weighing(self.loss_weighting)

    # ---- data ----

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, going on exactly where a checkpoint stands in the data.

        Args:
            resume_from_checkpoint: A folder, or True for the latest in `output_dir`.
            *args: As for `Trainer.train`.
            **kwargs: As for `Trainer.train`.

        Raises:
            ConfigError: If the checkpoint has no position in the data, or one that does not fit.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ConfigError(f"there is no checkpoint in {self.args.output_dir}")
        self._resumed_from = checkpoint_folder(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._resumed_from = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's batches as a loader that accelerate does not touch.

        Raises:
            ConfigError: If the data is not packed, or a resumed position does not fit it.
        """
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        loader = make_loader(
            self.train_dataset,
            self.args,
            collate_fn=self.data_collator,
            batch_size=self.args.per_device_train_batch_size,
            seed=seed,
        )
        self._feed = Feed(loader, num_to_skip=self._num_to_skip)
        self.counts, self._logged, self._is_first_step = Counts(), Counts(), True
        if self._resumed_from is not None:
            position = read_position(self._resumed_from, self.args)
            position.check_steps(self._packs_per_step(), self.args.max_steps)
            self._feed.load_state_dict(
                position.loader,
                kind=position.kind,
                same_ranks=position.world_size == self.args.world_size,
            )
            self.counts.add(position.counts)
            self._logged.add(position.counts)
        return as_dataloader(self._feed)

    def _packs_per_step(self) -> int:
        assert self._feed is not None
        packs = getattr(self._feed.loader, "batch_size", None) or self.args.per_device_train_batch_size
        return int(packs * self.args.world_size * self.args.gradient_accumulation_steps)

    def _num_to_skip(self) -> int:
        """Return the batches that the Trainer's loop drops after a resume."""
        steps = self.state.global_step % self._steps_per_epoch
        return int(steps * self.args.gradient_accumulation_steps)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `Trainer` does, and remember the steps of an epoch.

        Args:
            *args: As for `Trainer`.
            **kwargs: As for `Trainer`.
        """
        values = super().set_initial_training_values(*args, **kwargs)
        self._steps_per_epoch = int(values[1])
        return values

    def num_examples(self, dataloader: Any) -> int:
        """Return the samples of a pass where they are known, else its packs.

        Args:
            dataloader: Of training or evaluation.
        """
        feed = getattr(dataloader, "dataset", None)
        return num_samples(feed.loader if isinstance(feed, Feed) else dataloader, self.args.world_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return one pass over this rank's batches of an evaluation set.

        Args:
            eval_dataset: Packs, or the name of one of several sets; the trainer's own where None.

        Raises:
            ConfigError: If there is none, or it is not packed, or ranks could have unlike numbers of batches.
        """
        if eval_dataset is None or isinstance(eval_dataset, str):
            known = self.eval_dataset
            eval_dataset = known[eval_dataset] if isinstance(eval_dataset, str) else known
        if eval_dataset is None:
            raise ConfigError("evaluation needs an eval_dataset")
        loader = make_loader(
            eval_dataset,
            self.args,
            collate_fn=self.data_collator,
            batch_size=self.args.per_device_eval_batch_size,
            seed=0,
        )
        check_even_evaluation(loader, self.args)
        return loader

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return one pass over this rank's batches of a test set.

        Args:
            test_dataset: Packs.
        """
        return self.get_eval_dataloader(test_dataset)

    # ---- loss ----

    def get_batch_samples(
        self,
        epoch_iterator: Iterator[Any],
        num_batches: int,
        device: torch.device,  # noqa: ARG002
    ) -> tuple[list[Any], torch.Tensor | None]:
        """Return the batches of an optimizer step, and the sum of their weights over all ranks.

        One collective of five numbers a step.

        Args:
            epoch_iterator: Of the feed.
            num_batches: Micro-batches of the step.
            device: Of the model.

        Raises:
            ConfigError: If a batch would not be isolated, or ranks read the same data.
        """
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        for batch in batches:
            check_batch(batch)
        if self._is_first_step:
            check_own_data(batches[0], self.args)
            self._is_first_step = False
        counts, weight_sum = Counts(), 0.0
        for batch in batches:
            _, target = split_batch(batch, self.loss_weighting)
            weight_sum += float(target.weight_sum)
            counts.add(count(batch, target).as_list())
        total = add_over_ranks([weight_sum, *counts.as_list()], self.args, self.accelerator)
        self.counts.add([int(number) for number in total[1:]])
        return batches, torch.tensor(total[0], dtype=torch.float64)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return the batch's share of its step's loss; the weighted mean of the batch alone in evaluation.

        Args:
            model: Wrapped or not.
            inputs: A batch.
            return_outputs: Return the model's outputs too.
            num_items_in_batch: The sum of weights of the step over all ranks.
        """
        forward, target = split_batch(inputs, self.loss_weighting)
        if num_items_in_batch is None:
            loss, outputs = self.loss_of(model, forward, target, target.weight_sum)
        else:
            loss, outputs = self.loss_of(model, forward, target, num_items_in_batch)
            loss = loss * self.args.world_size  # gradients are averaged over ranks, and should be added
        auxiliary = auxiliary_loss(self.model, outputs)
        num_batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        if auxiliary is not None:  # a mean over the batch, whatever is learnt from it
            loss = loss + auxiliary / num_batches
        return (loss, outputs) if return_outputs else loss

    def loss_of(
        self,
        model: torch.nn.Module,
        forward: Mapping[str, Any],
        target: Target,
        weight_sum: torch.Tensor,
    ) -> tuple[torch.Tensor, Any]:
        """Return the sum of weighted losses / weight_sum, and the outputs. Override for another loss.

        Args:
            model: Wrapped or not.
            forward: Its arguments.
            target: What is learnt.
            weight_sum: What to divide by.
        """
        outputs = model(**forward)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        loss = weighted_loss(
            logits,
            target.labels,
            target.weights,
            weight_sum,
            label_smoothing=self.args.label_smoothing_factor,
        )
        return loss, outputs

    # ---- evaluation ----

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,  # noqa: ARG002
    ) -> tuple[Any, Any, Any]:
        """Return loss, logits and labels of a batch, and add to the exact loss of the whole set.

        Args:
            model: Wrapped or not.
            inputs: A batch.
            prediction_loss_only: Return no logits and labels.
            ignore_keys: As for `Trainer`; the logits are the only prediction here.
        """
        batch = self._prepare_inputs(dict(inputs))
        _, target = split_batch(batch, self.loss_weighting)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, batch, return_outputs=True)
        weight_sum = target.weight_sum.double().cpu()
        self._eval_sums += torch.stack([loss.detach().double().cpu() * weight_sum, weight_sum])
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), outputs["logits"].detach(), target.labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Return what `Trainer` does, with the exact loss over all tokens of all ranks.

        Args:
            *args: As for `Trainer`.
            metric_key_prefix: Before each metric's name.
            **kwargs: As for `Trainer`.
        """
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sum, weight_sum = add_over_ranks(self._eval_sums.tolist(), self.args, self.accelerator)
        if weight_sum:
            output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / weight_sum
        return output

    # ---- logs and checkpoints ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with what went through training beside the loss.

        Args:
            logs: Numbers by name.
            *args: As for `Trainer`.
            **kwargs: As for `Trainer`.
        """
        if "loss" in logs:
            logs |= self.counts.log_since(self._logged)
            self._logged = replace(self.counts)
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint, and first, so that none is without it, each rank's position in the data."""
        assert self._feed is not None
        write_position(
            self._get_output_dir(trial=trial),
            self.state.global_step,
            Position(
                loader=self._feed.state_dict(),
                kind=self._feed.kind,
                world_size=self.args.world_size,
                packs_per_step=self._packs_per_step(),
                counts=self.counts.as_list(),
            ),
            self.args,
        )
        super()._save_checkpoint(model, trial)
