"""What is known of a sample before it is read, and the slips of the reference document."""

from __future__ import annotations

import pickle

import pytest
import torch

from vlmpack.batching.records import (
    DEFAULT_TASK,
    SampleShape,
    StepDataset,
    StepIndices,
    infer_task_type,
    legacy_sample_metadata,
    num_images,
    sample_metadata,
    shape_from_metadata,
    shape_of,
    worst_case_images,
)
from vlmpack.errors import ConfigError
from vlmpack.memory import LLAVA_7B, TASKS_3D


class Volumes:
    """Samples of one or two images, whose metadata may lie."""

    def __init__(self, told: int = 1) -> None:
        self.told = told

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict:
        return {"images": [torch.zeros(1, 2, 2, 2)], "input_ids": [1, 2, 3]}

    def get_sample_metadata(self, idx: int) -> dict:
        return {"task_type": "T1", "num_images": self.told}


@pytest.mark.parametrize(
    ("sample", "count", "task"),
    [
        ({"subject_id": "sub-0001"}, 1, "T1"),
        ({"subject_id": ["sub-0001"]}, 1, "T1"),
        ({"subject_id": ["a", "b"]}, 2, "T3"),
        ({"subject_id": "a", "images": [0, 0]}, 2, "T2"),
        ({"images": [torch.zeros(1, 2, 2)]}, 1, "T1"),
        ({"images": torch.zeros(2, 1, 2, 2, 2)}, 2, "T2"),
        ({"images": torch.zeros(3, 4, 4, 4)}, 1, "T1"),  # a volume of three channels
        ({"images": torch.zeros(3, 4, 4, 4), "num_images": 3}, 3, "T2"),
        ({}, 1, "T1"),
    ],
)
def test_images_are_counted_and_tasks_inferred(sample, count, task):
    assert num_images(sample) == count
    assert infer_task_type(sample) == task
    assert sample_metadata(sample) == {"task_type": task, "num_images": count}


def test_the_documented_metadata_never_says_two_images_or_t2():
    assert legacy_sample_metadata({"subject_id": ["a", "b"]}) == {"task_type": "T3", "num_images": 1}
    assert legacy_sample_metadata({"subject_id": "a"}) == {"task_type": "T1", "num_images": 1}


def test_the_documented_worst_case_counts_the_letters_of_a_name():
    samples = [{"subject_id": "sub-0001"}, {"subject_id": ["a", "b"]}, {}]
    assert worst_case_images(samples, legacy=True) == len("sub-0001") == 8
    assert worst_case_images(samples) == 2
    with pytest.raises(ConfigError, match="no sample"):
        worst_case_images([])


def test_a_shape_is_counted_in_the_features_of_any_formula():
    shape = SampleShape(key="a", task_type="T2", num_images=3)
    assert shape.counts(TASKS_3D.features) == {"T2": 1.0}
    assert shape.counts(LLAVA_7B.features) == {"samples": 1.0, "extra_images": 2.0}


def test_a_task_that_the_formula_never_saw_is_named():
    with pytest.raises(ConfigError, match=r"sample 17 is of task 'T9'.*\['T1', 'T2', 'T3'\].*task_cost"):
        SampleShape(key="17", task_type="T9").counts(TASKS_3D.features)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"num_images": 1}, r"sample 4: .*\['task_type'\] is missing"),
        ({"task_type": "T1"}, r"\['num_images'\] is missing"),
        ({"task_type": "", "num_images": 1}, "task_type must be a name"),
        ({"task_type": 3, "num_images": 1}, "task_type must be a name, got 3"),
        ({"task_type": "T1", "num_images": -1}, "num_images must be a count of 0 or more, got -1"),
        ({"task_type": "T1", "num_images": True}, "got True"),
        ({"task_type": "T1", "num_images": 1, "num_tokens": 1.5}, "num_tokens must be a count"),
    ],
)
def test_wrong_metadata_names_sample_and_value(metadata, message):
    with pytest.raises(ConfigError, match=message):
        shape_from_metadata(metadata, "4")


def test_a_step_is_read_with_its_place_in_the_run():
    step = StepDataset(Volumes()).__getitems__(StepIndices([2, 0], step=7, epoch=1))
    assert (step.keys, step.step, step.epoch, len(step)) == (("2", "0"), 7, 1, 2)
    assert StepDataset(Volumes())[1].keys == ("1",)
    twin = pickle.loads(pickle.dumps(StepIndices([2, 0], step=7, epoch=1)))  # noqa: S301 - our own
    assert (list(twin), twin.step, twin.epoch) == ([2, 0], 7, 1)


def test_metadata_that_lies_about_images_is_refused_when_the_sample_is_read():
    with pytest.raises(ConfigError, match=r"sample 1: get_sample_metadata says 2 .* the sample has 1"):
        StepDataset(Volumes(told=2)).__getitems__([1])


def test_a_sample_without_metadata_speaks_for_itself():
    assert shape_of({"input_ids": [1, 2]}, "3") == SampleShape(key="3", num_tokens=2)
    assert shape_of(object(), "3").task_type == DEFAULT_TASK
