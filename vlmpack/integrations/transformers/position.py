"""Position: where a run stands in its data, as a small JSON file of each rank in a Trainer's checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments


class Position(BaseModel):
    """What a checkpoint says about the data. Read from a file, so strictly checked."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    loader: Any = Field(description="state of this rank's loader; None where it has none")
    kind: str = Field(description="class of the loader")
    world_size: int = Field(gt=0, description="ranks of the run")
    packs_per_step: int = Field(gt=0, description="packs of an optimizer step over all ranks")
    counts: list[int] = Field(
        min_length=4, max_length=4, description="samples, tokens, positions, supervised tokens"
    )

    def check_steps(self, packs_per_step: int, max_steps: int) -> None:
        """Check that a step is as large as it was, or that the run is not counted in epochs.

        Args:
            packs_per_step: Of this run.
            max_steps: Of this run; not positive where it is counted in epochs.

        Raises:
            ConfigError: If the Trainer would take old steps for new ones.
        """
        if packs_per_step != self.packs_per_step and max_steps <= 0:
            raise ConfigError(
                f"a step had {self.packs_per_step} packs over all ranks when the checkpoint was saved, and "
                f"has {packs_per_step} now. The position in the data is exact nevertheless, but the Trainer "
                "counts epochs by steps and would stop at the wrong one: set max_steps, or change "
                "gradient_accumulation_steps so that a step stays as large"
            )


def checkpoint_folder(resume_from_checkpoint: Any) -> Path | None:
    """Return the folder to resume from, None for a fresh run.

    Args:
        resume_from_checkpoint: As for `Trainer.train`, with True resolved.
    """
    return Path(resume_from_checkpoint) if resume_from_checkpoint else None


def write_position(run_folder: str, step: int, position: Position, args: TrainingArguments) -> None:
    """Write this rank's position into a checkpoint's folder; whole or not at all.

    Args:
        run_folder: Where checkpoints lie.
        step: Names the checkpoint.
        position: To write.
        args: The rank.

    Raises:
        ConfigError: If the loader's state is not fit for JSON.
    """
    folder = Path(run_folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps(position.model_dump())
    except TypeError as error:
        raise ConfigError(
            f"the loader's state is not plain values, so it cannot be saved beside the weights ({error}): "
            "its state_dict() must be fit for JSON"
        ) from error
    path = folder / _name(args.process_index, args.world_size)
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    os.replace(draft, path)


def read_position(folder: Path, args: TrainingArguments) -> Position:
    """Return this rank's position. Where the ranks were others, the first one's, which may suit all.

    Args:
        folder: A checkpoint's.
        args: The rank.

    Raises:
        ConfigError: If there is none, or its file is damaged.
    """
    path = folder / _name(args.process_index, args.world_size)
    if not path.exists():
        path = next(iter(sorted(folder.glob("data_position_0_of_*.json"))), path)
    if not path.exists():
        raise ConfigError(
            f"{folder} has no {path.name}: it was not saved by a PackedTrainer, so nobody knows where it "
            "stands in the data. Start afresh from its weights instead of resuming"
        )
    try:
        return Position.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def _name(rank: int, world_size: int) -> str:
    return f"data_position_{rank}_of_{world_size}.json"
