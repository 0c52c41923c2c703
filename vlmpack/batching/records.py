"""What the batch-size control knows of a sample, and the record that carries one optimizer step.

A data set says what its samples cost before they are read: `get_sample_metadata(index)` returns at least
the task and the number of images. The plan and the split are made of that; pixels come later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypedDict, runtime_checkable

from vlmpack.errors import ConfigError
from vlmpack.packing.assemble import PackedSequence

if TYPE_CHECKING:
    from collections.abc import Iterable

DEFAULT_TASK: Final = "default"
"""The task of samples that name none."""


class _RequiredMetadata(TypedDict):
    task_type: str
    num_images: int


class SampleMetadata(_RequiredMetadata, total=False):
    """What `get_sample_metadata` returns; task_type and num_images are needed, the rest is optional."""

    num_tokens: int
    num_patches: int
    key: str


@runtime_checkable
class SupportsSampleMetadata(Protocol):
    """A map-style data set that knows its samples without reading them."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def get_sample_metadata(self, idx: int) -> Mapping[str, Any]:
        """Return the task, the number of images, and what else is known of a sample.

        Args:
            idx: The sample's position.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleShape:
    """What a sample costs, as far as it is known before it is read.

    Raises:
        ConfigError: If a number is no count or the task has no name; names the sample.
    """

    key: str
    """Names the sample in reports and errors."""
    task_type: str = DEFAULT_TASK
    """The task it belongs to."""
    num_images: int = 0
    """Images, not tiles."""
    num_tokens: int = 0
    """Positions of the language model; 0 where nobody knows."""
    num_patches: int = 0
    """ViT patches; 0 where nobody knows."""
    num_samples: int = 1
    """Samples that it holds: more than 1 in a pack."""

    def __post_init__(self) -> None:
        counts = (self.num_images, self.num_tokens, self.num_patches)
        if type(self.task_type) is str and self.task_type and all(map(_is_count, counts)):
            return
        if not isinstance(self.task_type, str) or not self.task_type:
            raise ConfigError(f"sample {self.key}: task_type must be a name, got {self.task_type!r}")
        for name in ("num_images", "num_tokens", "num_patches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"sample {self.key}: {name} must be a count of 0 or more, got {value!r}")

    def counts(self, features: Sequence[str]) -> dict[str, float]:
        """Return how much this sample adds to each feature of a linear cost.

        "batch" is the whole batch's and left out. Every name that is no count stands for a task.

        Args:
            features: Names of the cost's features.

        Raises:
            ConfigError: If the cost tells tasks apart and does not know this one.
        """
        found: dict[str, float] = {}
        tasks = []
        for name in features:
            if name == "batch":
                continue
            if name in COUNTS:
                found[name] = float(COUNTS[name](self))
            else:
                tasks.append(name)
        if tasks:
            if self.task_type not in tasks:
                raise ConfigError(
                    f"sample {self.key} is of task {self.task_type!r}, but the memory formula knows only "
                    f"{tasks}: correct its metadata, or give a formula that has it, such as "
                    f"task_cost({{..., {self.task_type!r}: 1.0}})"
                )
            found[self.task_type] = 1.0
        return found


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


COUNTS: Final[dict[str, Callable[[SampleShape], int]]] = {
    "samples": lambda shape: shape.num_samples,
    "rows": lambda _: 1,
    "tokens": lambda shape: shape.num_tokens,
    "images": lambda shape: shape.num_images,
    "extra_images": lambda shape: max(0, shape.num_images - 1),
    "patches": lambda shape: shape.num_patches,
}
"""Features of a linear cost that are counts."""


def shape_from_metadata(metadata: Mapping[str, Any], key: str) -> SampleShape:
    """Return the shape that a data set's metadata describes.

    Args:
        metadata: From `get_sample_metadata`.
        key: Names the sample where the metadata does not.

    Raises:
        ConfigError: If task_type or num_images is missing, or a value is of the wrong kind.
    """
    missing = [name for name in ("task_type", "num_images") if name not in metadata]
    if missing:
        raise ConfigError(
            f"sample {key}: get_sample_metadata must return task_type and num_images, {missing} is missing "
            f"from {dict(metadata)}"
        )
    return SampleShape(
        key=str(metadata.get("key", key)),
        task_type=metadata["task_type"],
        num_images=metadata["num_images"],
        num_tokens=metadata.get("num_tokens", 0),
        num_patches=metadata.get("num_patches", 0),
    )


def shape_of(item: Any, key: str) -> SampleShape:
    """Return the shape of a sample that was read: a pack, a mapping, or anything else (one default sample).

    Args:
        item: What the data set returned.
        key: Names the sample where it has no name of its own.
    """
    if type(item) is not dict and isinstance(item, PackedSequence):
        cost = item.cost
        return SampleShape(
            key="+".join(item.keys) or key,
            num_images=cost.num_images,
            num_tokens=len(item),
            num_patches=cost.num_patches,
            num_samples=max(1, len(item.keys)),
        )
    if type(item) is dict or isinstance(item, Mapping):
        ids = item.get("input_ids")
        return SampleShape(
            key=str(item.get("key", key)),
            task_type=str(item.get("task_type", DEFAULT_TASK)),
            num_images=num_images(item) if _has_images(item) else 0,
            num_tokens=len(ids) if isinstance(ids, Sized) else 0,
        )
    return SampleShape(key=key)


def _has_images(sample: Mapping[str, Any]) -> bool:
    return "images" in sample or "pixel_values" in sample or "subject_id" in sample


def num_images(sample: Mapping[str, Any], *, legacy: bool = False) -> int:
    """Return how many images a sample has.

    Args:
        sample: With `images` or `pixel_values`, or with a `subject_id` that names one image or lists several.
        legacy: The reference document's expression, `len(sample.get("subject_id", [1]))`, which counts the
            characters of a name: 8 images for "sub-0001".
    """
    if legacy:
        return len(sample.get("subject_id", [1]))
    for name in ("images", "pixel_values"):
        value = sample.get(name)
        if value is not None:
            return _count(value, sample.get("num_images"))
    subjects = sample.get("subject_id", [1])
    return 1 if isinstance(subjects, str) or not isinstance(subjects, Sized) else len(subjects)


def _count(images: Any, told: Any) -> int:
    """Count the images of a list or a tensor; four axes are a volume (C, H, W, D) unless `told` says n."""
    if isinstance(images, Sequence):
        return len(images)
    shape: tuple[int, ...] = tuple(getattr(images, "shape", ()))
    if len(shape) == 5 or (len(shape) == 4 and told == shape[0]):
        return int(shape[0])
    return 1


def infer_task_type(sample: Mapping[str, Any]) -> str:
    """Return T1 for one image, T2 for several images of one subject, T3 for several subjects.

    Args:
        sample: With `subject_id` (a name or a list of names) and, possibly, `images`.
    """
    subjects = sample.get("subject_id")
    if isinstance(subjects, list | tuple) and len(subjects) > 1:
        return "T3"
    return "T2" if num_images(sample) > 1 else "T1"


def legacy_sample_metadata(sample: Mapping[str, Any]) -> SampleMetadata:
    """Return the reference document's metadata, its slip included: `1 or 2` is 1, and T2 cannot occur.

    Args:
        sample: With `subject_id`.
    """
    task_type = "T1" if not isinstance(sample["subject_id"], list) else "T3"
    return {"task_type": task_type, "num_images": 1 or 2}  # noqa: SIM222 - the slip is the point


def sample_metadata(sample: Mapping[str, Any]) -> SampleMetadata:
    """Return what `get_sample_metadata` should: the task and the true number of images.

    Args:
        sample: With `subject_id` or `images`.
    """
    return {"task_type": infer_task_type(sample), "num_images": num_images(sample)}


def worst_case_images(samples: Iterable[Mapping[str, Any]], *, legacy: bool = False) -> int:
    """Return the most images of any sample.

    Args:
        samples: At least one.
        legacy: Count as the reference document does; see `num_images`.

    Raises:
        ConfigError: If there is no sample.
    """
    most = max((num_images(sample, legacy=legacy) for sample in samples), default=None)
    if most is None:
        raise ConfigError("there is no sample, so there is no worst case")
    return most


class StepIndices(list[int]):
    """The samples of one step, with its place in the run; a list, as a `DataLoader` wants it.

    Args:
        indices: Positions in the data set.
        step: Number of the step in the run, from 0.
        epoch: The pass over the data, from 0.
    """

    def __init__(self, indices: Iterable[int] = (), step: int = 0, epoch: int = 0) -> None:
        super().__init__(indices)
        self.step = step
        self.epoch = epoch

    def __reduce__(self) -> tuple[object, ...]:
        return (StepIndices, (list(self), self.step, self.epoch))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """The samples of one optimizer step on one rank, not yet collated: how they are split is decided later.

    Raises:
        ConfigError: If samples and shapes differ in number.
    """

    items: tuple[Any, ...] = field(repr=False)
    """What the data set returned for each sample; may be empty where there are more ranks than samples."""
    shapes: tuple[SampleShape, ...]
    """What each costs."""
    step: int = 0
    """Number of the step in the run, from 0."""
    epoch: int = 0
    """The pass over the data, from 0."""

    def __post_init__(self) -> None:
        if len(self.items) != len(self.shapes):
            raise ConfigError(f"{len(self.items)} samples, but {len(self.shapes)} shapes")

    def __len__(self) -> int:
        return len(self.items)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the samples."""
        return tuple(shape.key for shape in self.shapes)


class StepDataset:
    """A map-style data set read a step at a time: a list of positions gives a `StepBatch`.

    Args:
        dataset: With `__len__` and `__getitem__`, and possibly `get_sample_metadata`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        # asked once: a protocol's check takes longer than reading a sample
        self._has_metadata = isinstance(dataset, SupportsSampleMetadata)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> StepBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> StepBatch:
        items = tuple(self.dataset[index] for index in indices)
        shapes = tuple(self._shape(index, item) for index, item in zip(indices, items, strict=True))
        return StepBatch(
            items=items,
            shapes=shapes,
            step=getattr(indices, "step", 0),
            epoch=getattr(indices, "epoch", 0),
        )

    def _shape(self, index: int, item: Any) -> SampleShape:
        read = shape_of(item, str(index))
        if not self._has_metadata:
            return read
        told = shape_from_metadata(self.dataset.get_sample_metadata(index), str(index))
        if isinstance(item, Mapping) and _has_images(item) and told.num_images != read.num_images:
            raise ConfigError(
                f"sample {told.key}: get_sample_metadata says {told.num_images} image(s), the sample has "
                f"{read.num_images}: the plan's costs would be wrong; correct the metadata"
            )
        return told
