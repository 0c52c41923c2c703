"""PackedSFTTrainer: TRL's `SFTTrainer` for packs. Needs `pip install 'vlmpack[trl]'`.

`SFTTrainer` refuses to pack vision data, since it packs text columns alone. Here the packs are made before:
the trainer is given a data set of one empty row, told not to prepare it, and then the packs. What is TRL's
own stays: the language model's head is fused with the loss, so that the logits of a batch never exist; the
logs have entropy and token accuracy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from vlmpack.errors import ConfigError
from vlmpack.integrations.transformers import PackedTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vlmpack.integrations.transformers.batch import Target


class PackedSFTTrainer(PackedTrainer, SFTTrainer):  # type: ignore[misc]  # trl is not typed
    """TRL's `SFTTrainer` with the data, the loss and the checks of `PackedTrainer`.

    Args:
        model: A model, not its name: packs are cut for it already.
        args: Without TRL's own packing, truncation and preparation, which have nothing left to do.
        train_dataset: Packs, as for `PackedTrainer`.
        eval_dataset: Packs, or several by name.
        data_collator: A `VQACollator`.
        processing_class: The tokenizer that the packs were made with.
        **kwargs: As for `SFTTrainer`, and `loss_weighting`.

    Raises:
        ConfigError: If a setting would lose packs, mix their samples, or is TRL's way to prepare data.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        train_dataset: Any,
        data_collator: Any,
        processing_class: Any,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        problems = list(_problems(model, args, kwargs))
        if problems:
            raise ConfigError(
                "these settings of SFTTrainer do not go with packs:\n"
                + "\n".join(f"- {each}" for each in problems)
            )
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        stand_in = Dataset.from_dict({"input_ids": [[0]], "labels": [[-100]]})
        super().__init__(
            model,
            args,
            train_dataset=stand_in,
            eval_dataset=None if eval_dataset is None else stand_in,
            data_collator=data_collator,
            processing_class=processing_class,
            **kwargs,
        )
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset

    def loss_of(
        self,
        model: torch.nn.Module,
        forward: Mapping[str, Any],
        target: Target,
        weight_sum: torch.Tensor,
    ) -> tuple[torch.Tensor, Any]:
        """Return the sum of weighted losses / weight_sum, and the outputs, from TRL's fused head.

        Args:
            model: Wrapped or not.
            forward: Its arguments.
            target: What is learnt.
            weight_sum: What to divide by.
        """
        labels = torch.where(target.weights != 0, target.labels, -100)
        outputs = model(**forward, labels=labels, fused_lm_head=True)
        weights = target.weights[:, 1:].to(outputs.log_probs.dtype)
        divisor = torch.as_tensor(weight_sum, dtype=weights.dtype, device=weights.device)
        loss = -(outputs.log_probs * weights).sum() / torch.where(divisor > 0, divisor, 1)
        self._note(outputs)
        return loss, outputs

    def _note(self, outputs: Any) -> None:
        """Keep what TRL logs: means over this rank's tokens."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        learnt = outputs.label_mask.sum().clamp(min=1)
        metrics["entropy"].append(float(outputs.entropy.detach().sum() / learnt))
        metrics["mean_token_accuracy"].append(float(outputs.is_top1.sum() / learnt))

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return the loss of a batch; the fused head has no logits to return.

        Args:
            model: Wrapped or not.
            inputs: A batch.
            prediction_loss_only: Must be True.
            ignore_keys: As for `Trainer`.

        Raises:
            ConfigError: If logits are wanted.
        """
        if not prediction_loss_only:
            raise ConfigError(
                "SFTTrainer's fused head never makes the logits that compute_metrics and predict() want; use "
                "PackedTrainer for them"
            )
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


def _problems(model: Any, args: SFTConfig, kwargs: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(model, str):
        yield f"the model is a name, {model!r}: load it first, packs are cut for its family's sizes"
    for name in ("packing", "eval_packing", "padding_free", "assistant_only_loss", "completion_only_loss"):
        if getattr(args, name):
            yield f"{name}=True: packs are made and labelled before the trainer gets them. Leave it unset"
    if args.loss_type != "nll":
        yield f"loss_type={args.loss_type!r}: it weighs tokens in its own way. Use loss_weighting"
    if args.label_smoothing_factor:
        yield "label_smoothing_factor: it needs logits, which the fused head never makes: use PackedTrainer"
    if kwargs.get("formatting_func") is not None:
        yield "formatting_func: packs are text no more. Format rows before VQADataset"
    if kwargs.get("compute_metrics") is not None:
        yield "compute_metrics: it needs the logits, which the fused head never makes: use PackedTrainer"
