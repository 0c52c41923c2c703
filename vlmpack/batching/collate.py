"""Collate samples that differ: any number of images, of any number of spatial dimensions, and text.

    sample 0   one image  (1, 4, 6)          pixel_values [2, 2, 1, 5, 6]    image_mask  1 0
    sample 1   two images (1, 5, 6) (1, 3, 2)                                            1 1

Images are padded with zeros behind each axis to the largest of the batch, 2-D tiles as 3-D volumes;
`image_sizes` keeps what each really was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from vlmpack.batching.records import infer_task_type
from vlmpack.errors import ConfigError
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS: Final = ("T1", "T2", "T3")
"""The documented tasks; their ids are 0, 1, 2."""
MODEL_FIELDS: Final = ("pixel_values", "image_mask", "input_ids", "attention_mask", "labels")
"""What the model is given."""
_TENSORS: Final = (*MODEL_FIELDS, "task_ids", "image_sizes")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeterogeneousBatch(Mapping[str, Any]):
    """Samples of one micro-batch, padded to common shapes. B samples, M images, C channels, L positions.

    As a mapping it holds what the model is given, so `model(**batch)` works; fields that a batch does not
    have are None and left out of it.
    """

    pixel_values: torch.Tensor | None = field(default=None, repr=False)
    """``[B, M, C, *spatial]``: (H, W) for pictures, (H, W, D) for volumes; None without any image."""
    image_mask: torch.Tensor | None = field(default=None, repr=False)
    """bool [B, M], true where there is an image."""
    task_types: tuple[str, ...] = ()
    """The task of each sample."""
    task_ids: torch.Tensor | None = field(default=None, repr=False)
    """int64 [B], the tasks as numbers."""
    input_ids: torch.Tensor | None = field(default=None, repr=False)
    """int64 [B, L], padded on the right."""
    attention_mask: torch.Tensor | None = field(default=None, repr=False)
    """int64 [B, L], 1 on text."""
    labels: torch.Tensor | None = field(default=None, repr=False)
    """int64 [B, L], -100 where nothing is learnt."""
    image_sizes: torch.Tensor | None = field(default=None, repr=False)
    """int64 [B, M, number of spatial axes], each image's own size; 0 where there is none."""
    metadata: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    """What else each sample carried, untouched."""

    def __getitem__(self, name: str) -> Any:
        if name not in self._present():
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def _present(self) -> list[str]:
        return [name for name in MODEL_FIELDS if getattr(self, name) is not None]

    @property
    def num_samples(self) -> int:
        """Samples of the batch."""
        return len(self.task_types)

    def to(self, *args: Any, **kwargs: Any) -> HeterogeneousBatch:
        """Return the batch with its tensors moved, as `torch.Tensor.to` does; integers keep their type.

        Args:
            *args: A device.
            **kwargs: For `torch.Tensor.to`.
        """
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> HeterogeneousBatch:
        """Return the batch with its tensors in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Any) -> HeterogeneousBatch:
        moved = {
            each.name: change(value)
            for each in fields(self)
            if each.name in _TENSORS and (value := getattr(self, each.name)) is not None
        }
        return replace(self, **moved)


class HeterogeneousCollator:
    """Pads samples to consistent shapes and keeps their tasks and metadata.

    A sample is a mapping. Its images stand in `images` or `pixel_values`: one tensor ``(C, *spatial)``, or a
    list of them, or a tensor ``(n, C, *spatial)`` where `num_images` says that it holds several. Its text is
    `input_ids` (with `labels` and `attention_mask` where there are any), or `text` for the tokenizer.
    Everything else goes to `metadata`.

    Args:
        tokenizer: Tokenises `text` and gives the padding token; not needed for `input_ids` alone, which are
            then padded with 0.
        tasks: The tasks in the order of their ids.
        max_images: Most images of a sample; the reference document's samples have 1 to 3. None: any number.

    Raises:
        ConfigError: If the tasks are none or not distinct, or max_images is negative.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        tasks: Sequence[str] = TASKS,
        max_images: int | None = None,
    ) -> None:
        if not tasks or len(set(tasks)) != len(tasks):
            raise ConfigError(f"tasks must be distinct names, got {list(tasks)}")
        if max_images is not None and max_images < 0:
            raise ConfigError(f"max_images must not be negative, got {max_images}")
        self._tokenizer = tokenizer
        self._tasks = {task: number for number, task in enumerate(tasks)}
        self._max_images = max_images
        pad = getattr(tokenizer, "pad_token_id", None)
        self._pad = 0 if pad is None else int(pad)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> HeterogeneousBatch:
        """Return the batch. O(its bytes).

        Args:
            samples: At least one.

        Raises:
            ConfigError: If there is no sample, a task is unknown, or samples contradict each other; names
                the sample.
        """
        if not samples:
            raise ConfigError("a batch needs at least one sample")
        tasks = tuple(self._task(sample, _key(sample, row)) for row, sample in enumerate(samples))
        pixels, mask, sizes = self._stack_images(samples)
        return HeterogeneousBatch(
            pixel_values=pixels,
            image_mask=mask,
            image_sizes=sizes,
            task_types=tasks,
            task_ids=torch.tensor([self._tasks[task] for task in tasks]),
            metadata=tuple({k: v for k, v in sample.items() if k not in _USED} for sample in samples),
            **self._stack_text(samples),
        )

    def _task(self, sample: Mapping[str, Any], key: str) -> str:
        task = sample.get("task_type")
        task = infer_task_type(sample) if task is None else task
        if task not in self._tasks:
            raise ConfigError(
                f"sample {key} is of task {task!r}, but the collator knows {list(self._tasks)}: "
                f"give it tasks=(..., {task!r})"
            )
        return str(task)

    def _stack_images(
        self, samples: Sequence[Mapping[str, Any]]
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        rows = [_images(sample, _key(sample, row)) for row, sample in enumerate(samples)]
        for row, images in enumerate(rows):
            if self._max_images is not None and len(images) > self._max_images:
                raise ConfigError(
                    f"sample {_key(samples[row], row)} has {len(images)} images, over max_images "
                    f"{self._max_images}; raise it, or leave the sample out"
                )
        most = max(map(len, rows))
        mask = torch.zeros((len(rows), most), dtype=torch.bool)
        found = [(row, at, image) for row, images in enumerate(rows) for at, image in enumerate(images)]
        if not found:
            return None, mask, None
        first = found[0][2]
        for row, _, image in found:
            if image.ndim != first.ndim or image.shape[0] != first.shape[0]:
                raise ConfigError(
                    f"sample {_key(samples[row], row)} has an image of shape {tuple(image.shape)}, the first "
                    f"of the batch is {tuple(first.shape)}: channels and number of axes must agree"
                )
        spatial = [max(image.shape[axis] for *_, image in found) for axis in range(1, first.ndim)]
        dtype = torch.result_type(first, found[-1][2])
        pixels = torch.zeros((len(rows), most, first.shape[0], *spatial), dtype=dtype)
        sizes = torch.zeros((len(rows), most, len(spatial)), dtype=torch.int64)
        for row, at, image in found:
            place = pixels[row, at]
            for axis, size in enumerate(image.shape):
                place = place.narrow(axis, 0, size)
            place.copy_(image)
            sizes[row, at] = torch.tensor(image.shape[1:])
            mask[row, at] = True
        return pixels, mask, sizes

    def _stack_text(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [self._text(sample, _key(sample, row)) for row, sample in enumerate(samples)]
        names = set(texts[0])
        for row, text in enumerate(texts):
            if set(text) != names:
                raise ConfigError(
                    f"sample {_key(samples[row], row)} has {sorted(text)}, the first one of the batch "
                    f"{sorted(names)}: all samples need the same text fields"
                )
        if not names:
            return {}
        length = max(len(text["input_ids"]) for text in texts)
        fill = {"input_ids": self._pad, "attention_mask": 0, "labels": IGNORE_INDEX}
        stacked = {}
        for name in sorted(names):
            rows = torch.full((len(texts), length), fill[name], dtype=torch.int64)
            for row, text in enumerate(texts):
                rows[row, : len(text[name])] = text[name]
            stacked[name] = rows
        return stacked

    def _text(self, sample: Mapping[str, Any], key: str) -> dict[str, torch.Tensor]:
        ids = sample.get("input_ids")
        if ids is None:
            if "text" not in sample:
                return {}
            if self._tokenizer is None:
                raise ConfigError(f"sample {key} has text, but the collator has no tokenizer")
            ids = self._tokenizer(sample["text"])["input_ids"]
        text = {"input_ids": torch.as_tensor(ids, dtype=torch.int64)}
        for name, default in (("attention_mask", torch.ones_like), ("labels", torch.clone)):
            value = sample.get(name)
            text[name] = (
                default(text["input_ids"]) if value is None else torch.as_tensor(value, dtype=torch.int64)
            )
            if text[name].shape != text["input_ids"].shape:
                raise ConfigError(
                    f"sample {key}: {name} has shape {tuple(text[name].shape)}, input_ids "
                    f"{tuple(text['input_ids'].shape)}"
                )
        return text


_USED: Final = frozenset({
    "images",
    "pixel_values",
    "input_ids",
    "attention_mask",
    "labels",
    "text",
    "task_type",
})


def _key(sample: Mapping[str, Any], row: int) -> str:
    return str(sample.get("key", f"in row {row} of the batch"))


def _images(sample: Mapping[str, Any], key: str) -> list[torch.Tensor]:
    """Return the images of a sample one by one, each (C, *spatial).

    Raises:
        ConfigError: If `num_images` is not their number, or one has no channels; names the sample.
    """
    images = sample.get("images", sample.get("pixel_values"))
    if images is None:
        return []
    if isinstance(images, Sequence):
        listed = [torch.as_tensor(image) for image in images]
    else:
        tensor = torch.as_tensor(images)
        number = sample.get("num_images")
        several = tensor.ndim == 5 or (number is not None and tensor.shape[0] == number and tensor.ndim > 3)
        listed = list(tensor) if several else [tensor]
    told = sample.get("num_images")
    if told is not None and told != len(listed):
        raise ConfigError(f"sample {key}: num_images says {told}, but there are {len(listed)} images")
    for image in listed:
        if image.ndim < 2:
            raise ConfigError(f"sample {key}: an image needs (C, *spatial), got shape {tuple(image.shape)}")
    return listed
