"""Each setting that would break packs is refused, with its reason."""

from __future__ import annotations

import pytest
from accelerate import ParallelismConfig
from transformers import TrainingArguments

from tests.tiny_models import llama
from tests.unit.integrations.transformers.runs import arguments
from vlmpack.errors import ConfigError
from vlmpack.integrations.transformers import PackedTrainer, check_arguments

REFUSED = {
    "dispatch_batches=True: the dispatcher cuts": {"accelerator_config": {"dispatch_batches": True}},
    "split_batches=True: a batch of packs cannot be cut": {"accelerator_config": {"split_batches": True}},
    "auto_find_batch_size=True: it begins the epoch again": {"auto_find_batch_size": True},
    "train_sampling_strategy='group_by_length'": {"train_sampling_strategy": "group_by_length"},
    "train_sampling_strategy='batch_rebalance'": {"train_sampling_strategy": "batch_rebalance"},
    "dataloader_drop_last=True: it loses": {"dataloader_drop_last": True},
    "dataloader_in_order=False": {"dataloader_in_order": False},
    "ignore_data_skip=True": {"ignore_data_skip": True},
    "use_cache=True: with a cache": {"use_cache": True},
    "neftune_noise_alpha: its noise": {"neftune_noise_alpha": 5.0},
    "use_liger_kernel=True: it computes": {"use_liger_kernel": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_setting_that_would_break_packs_is_refused(message, tmp_path):
    with pytest.raises(ConfigError) as error:
        check_arguments(arguments(tmp_path, **REFUSED[message]))
    assert f"- {message}" in str(error.value).replace("- accelerator_config ", "- ")


class Elsewhere:
    """Arguments of a machine that is not this one."""

    def __init__(self, args: TrainingArguments, **differences: object) -> None:
        self.__dict__.update(differences)
        self._args = args

    def __getattr__(self, name: str) -> object:
        return getattr(self._args, name)


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        ({"n_gpu": 4}, "4 GPUs in one process"),
        ({"world_size": 2, "average_tokens_across_devices": False}, "average_tokens_across_devices=False"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, "context, sequence or tensor parallelism"),
    ],
)
def test_a_kind_of_parallelism_that_would_break_packs_is_refused(differences, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        check_arguments(Elsewhere(arguments(tmp_path), **differences))


def test_defaults_are_accepted_and_all_problems_are_named_at_once(tmp_path):
    check_arguments(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ConfigError) as error:
        check_arguments(arguments(tmp_path, use_cache=True, dataloader_drop_last=True))
    assert str(error.value).count("\n- ") == 2


def test_a_trainer_refuses_them_and_its_own(tmp_path):
    with pytest.raises(ConfigError, match="use_cache=True"):
        PackedTrainer(llama(), arguments(tmp_path, use_cache=True))
    with pytest.raises(ConfigError, match="compute_loss_func would replace the weighted loss"):
        PackedTrainer(llama(), arguments(tmp_path), compute_loss_func=lambda *_, **__: None)
    with pytest.raises(ConfigError, match="loss_weighting must be one of"):
        PackedTrainer(llama(), arguments(tmp_path), loss_weighting="mean")
