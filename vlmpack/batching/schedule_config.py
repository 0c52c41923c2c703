"""What a batch-size schedule is made of: one strict model a kind, told apart by `type`.

| type | size after progress p | for |
|---|---|---|
| step | initial * gamma^(p // step_size) | the documented schedule: plateaus |
| linear | initial + (final - initial) * p / duration | Megatron's ramp, with `increment` |
| exponential | initial * (final / initial)^(p / duration) | the same ratio in equal times |
| cosine | initial + (final - initial) * (1 - cos(pi p / duration)) / 2 | slow at both ends |
| function | whatever yours returns | from Python only |

Progress is counted in epochs, in samples (for packed training: packs), or in packed tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

Unit: TypeAlias = Literal["epochs", "samples", "tokens"]
"""What a schedule's progress counts."""


class _BatchSizeConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", validate_assignment=True)

    unit: Unit = Field("epochs", description="what step_size and duration count")
    max_batch_size: int | None = Field(None, gt=0, description="the size never exceeds this")

    def size_at(self, progress: int, initial_batch_size: int) -> int:
        """Return the batch size after so much progress, the cap applied.

        Args:
            progress: Epochs, samples or tokens, from 0.
            initial_batch_size: The size at 0.
        """
        size = self._uncapped(progress, initial_batch_size)
        return size if self.max_batch_size is None else min(size, self.max_batch_size)

    def _uncapped(self, progress: int, initial_batch_size: int) -> int:
        raise NotImplementedError


class StepBatchSizeConfig(_BatchSizeConfig):
    """Multiply the batch size by `gamma` after every `step_size` epochs, up to `max_batch_size`."""

    type: Literal["step"] = "step"
    step_size: int = Field(gt=0, description="epochs between increases")
    gamma: int = Field(ge=2, description="what each increase multiplies by")

    def _uncapped(self, progress: int, initial_batch_size: int) -> int:
        return initial_batch_size * int(self.gamma ** (progress // self.step_size))


class _RampConfig(_BatchSizeConfig):
    """From the initial size to `final_batch_size` over `duration`, then constant."""

    final_batch_size: int = Field(gt=0, description="the size at the end of the ramp")
    duration: int = Field(gt=0, description="how long the ramp takes, in `unit`")
    increment: int = Field(1, gt=0, description="sizes on the way are initial + a multiple of this")

    def _uncapped(self, progress: int, initial_batch_size: int) -> int:
        if progress >= self.duration:
            return self.final_batch_size
        gain = self._share(progress / self.duration, initial_batch_size) * (
            self.final_batch_size - initial_batch_size
        )
        # Towards the initial size: a ramp never runs ahead of its curve. A little is added because 0.3 / 0.1
        # must count as three increments.
        whole = math.floor(abs(gain) / self.increment + 1e-9) * self.increment
        return initial_batch_size + (whole if gain > 0 else -whole)

    def _share(self, elapsed: float, initial_batch_size: int) -> float:
        raise NotImplementedError


class LinearBatchSizeConfig(_RampConfig):
    """A straight ramp; with `increment` it is the ramp of Megatron-LM's `--rampup-batch-size`."""

    type: Literal["linear"] = "linear"

    def _share(self, elapsed: float, initial_batch_size: int) -> float:
        return elapsed


class ExponentialBatchSizeConfig(_RampConfig):
    """A ramp that multiplies by the same factor in equal times: the step schedule, smooth."""

    type: Literal["exponential"] = "exponential"

    def _share(self, elapsed: float, initial_batch_size: int) -> float:
        ratio = self.final_batch_size / initial_batch_size
        return 0.0 if ratio == 1 else (ratio**elapsed - 1) / (ratio - 1)


class CosineBatchSizeConfig(_RampConfig):
    """A ramp that begins and ends slowly: half a cosine wave."""

    type: Literal["cosine"] = "cosine"

    def _share(self, elapsed: float, initial_batch_size: int) -> float:
        return (1 - math.cos(math.pi * elapsed)) / 2


class FunctionBatchSizeConfig(_BatchSizeConfig):
    """A user's own schedule: progress and initial size in, batch size out."""

    type: Literal["function"] = "function"
    function: Callable[[int, int], int] = Field(description="(progress, initial batch size) -> batch size")

    def _uncapped(self, progress: int, initial_batch_size: int) -> int:
        size = self.function(progress, initial_batch_size)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(
                f"the batch-size function returned {size!r} at {progress} {self.unit}; it must return an "
                "integer of at least 1"
            )
        return size


BatchSizeConfig: TypeAlias = Annotated[
    StepBatchSizeConfig
    | LinearBatchSizeConfig
    | ExponentialBatchSizeConfig
    | CosineBatchSizeConfig
    | FunctionBatchSizeConfig,
    Field(discriminator="type"),
]
"""Any schedule, told apart by `type`."""

_ANY: TypeAdapter[BatchSizeConfig] = TypeAdapter(BatchSizeConfig)


def parse_schedule(source: Mapping[str, Any] | str | Path) -> BatchSizeConfig:
    """Return the schedule that a mapping, a file or a line describes.

    A line is what a command line takes: `type=step,step_size=20,gamma=2`, or JSON in braces.

    Args:
        source: A mapping with `type`, the path of a YAML or JSON file, or a line.

    Raises:
        ConfigError: If a setting is missing, unknown or wrong, or there is no such file; names it.
    """
    values = _read(source)
    if not isinstance(values, dict):
        raise ConfigError(f"a batch-size schedule is a mapping with a type, got {values!r}")
    if values.get("type") == "function":
        raise ConfigError('type "function" is for Python only: pass FunctionBatchSizeConfig(function=...)')
    try:
        return _ANY.validate_python(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'schedule'}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        )
        raise ConfigError(f"not a batch-size schedule: {problems}") from error


def _read(source: Mapping[str, Any] | str | Path) -> Any:
    if isinstance(source, Path):
        if not source.is_file():
            raise ConfigError(f"there is no schedule file {source}")
        return _yaml(source.read_text(encoding="utf-8"), str(source))
    if not isinstance(source, str):
        return dict(source)
    text = source.strip()
    if text.startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not JSON: {text!r}: {error}") from error
    if "=" not in text:
        return _read(Path(text))
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {name.strip(): _yaml(value, text) for name, _, value in pairs}


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
