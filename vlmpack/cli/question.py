"""What `vlmpack estimate` is asked, and the answer as plain figures."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from vlmpack.cli.regime import regime_of
from vlmpack.errors import ConfigError
from vlmpack.geometry import Tiling
from vlmpack.memory.estimate import MemoryEstimate, estimate
from vlmpack.memory.fit_rule import (
    MAX_ROWS,
    FitRule,
    FrontPoint,
    TileLimit,
    Verdict,
    required_bytes,
    token_bound,
)
from vlmpack.memory.model_shape import ModelShape
from vlmpack.memory.remedies import Remedy, most_tiles_of_image, remedies
from vlmpack.memory.replay import Replayed, replay

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmpack.budget import PackBudget
    from vlmpack.memory.gpus import Gpu
    from vlmpack.memory.regime import TrainingRegime

_UNITS: Final = {"": 1, "mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A model, how it is trained, a batch and, if named, a GPU."""

    model: ModelShape
    """The model's sizes."""
    regime: TrainingRegime
    """How it is trained."""
    gpu: Gpu | None
    """The device; None: no verdict is asked for."""
    rows: int
    """Packs of the batch."""
    tokens: int
    """Positions of each."""
    tiles: float
    """Tiles of the batch."""
    images: int | None
    """Images of the batch, where it was told in images."""
    tiling: Tiling | None
    """How they are cut."""
    margin: float
    """Share of the peak that is left free."""
    position_tokens: int | None
    """Tokens that say where a tile lies; None: the model's own."""
    replay: bool
    """Whether the step is replayed in the allocator."""

    def answer(self) -> Answer:
        """Return everything that the command shows."""
        step = estimate(self.model, self.regime, rows=self.rows, tokens_per_row=self.tokens, tiles=self.tiles)
        if self.gpu is None:
            return Answer(question=self, step=step, replayed=self._replayed())
        rule = FitRule.of(
            self.model,
            self.regime,
            self.gpu,
            tokens_per_row=self.tokens,
            margin=self.margin,
            position_tokens=self.position_tokens,
            replay=self.replay,
        )
        quick = replace(rule, replay=False)
        verdict = rule.verdict(self.rows, self.tiles)
        helps = remedies(
            self.model,
            rule.regime,
            self.gpu,
            rows=self.rows,
            tokens_per_row=self.tokens,
            tiles=self.tiles,
            tiling=self.tiling,
            images=self.images,
            margin=self.margin,
        )
        return Answer(
            question=self,
            step=step,
            reserve_bytes=required_bytes(self.model, rule.regime, step, margin=self.margin)
            - step.device_bytes,
            verdict=verdict,
            remedies=helps,
            **_room(rule, quick, self.rows),
            replayed=self._replayed(),
        )

    def _replayed(self) -> Replayed | None:
        """Return what the allocator does with the step, if that is asked for."""
        if not self.replay:
            return None
        return replay(self.model, self.regime, rows=self.rows, tokens_per_row=self.tokens, tiles=self.tiles)


def _room(rule: FitRule, quick: FitRule, rows: int) -> dict[str, Any]:
    """Return what else would fit, or by how much not even text does; the front without a replay."""
    front = quick.front(MAX_ROWS) if quick.verdict(1, 0).fits else ()
    try:
        return {"limit": rule.most_tiles(rows), "budget": rule.pack_budget(rows), "front": front}
    except ConfigError as error:
        return {"shortage": str(error), "front": front}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What `vlmpack estimate` says."""

    question: Question
    """What was asked."""
    step: MemoryEstimate
    """The bytes of the step."""
    reserve_bytes: int = 0
    """What the rule leaves free beyond them: margin and fragmentation."""
    verdict: Verdict | None = None
    """Whether it fits; None without a GPU."""
    limit: TileLimit | None = None
    """The most tiles of such a batch."""
    budget: PackBudget | None = None
    """What a pack may hold so that such a batch always fits."""
    front: tuple[FrontPoint, ...] = ()
    """Choices between packs and tiles."""
    remedies: tuple[Remedy, ...] = ()
    """What helps, the largest saving first."""
    replayed: Replayed | None = None
    """What the allocator does with the step."""
    shortage: str | None = None
    """Why not even a batch without pictures fits."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        ask, step = self.question, self.step
        return {
            "model": ask.model.name,
            "num_parameters": ask.model.num_parameters,
            "gpu": None if ask.gpu is None else asdict(ask.gpu),
            "regime": ask.regime.model_dump(mode="json"),
            "batch": {
                "rows": ask.rows,
                "tokens_per_row": ask.tokens,
                "tiles": ask.tiles,
                "images": ask.images,
            },
            "peak": {
                "phase": step.peak.name,
                "requested_bytes": step.peak_requested,
                "allocator_bytes": step.allocator_bytes,
                "context_bytes": step.context_bytes,
                "total_bytes": step.device_bytes,
            },
            "phases": [{"name": phase.name, "parts": dict(phase.parts)} for phase in step.phases],
            "verdict": None
            if self.verdict is None
            else {**asdict(self.verdict), "short_bytes": self.verdict.short_bytes},
            "limit": None if self.limit is None else asdict(self.limit),
            "pack_budget": None if self.budget is None else asdict(self.budget),
            "front": [asdict(point) for point in self.front],
            "remedies": [asdict(remedy) for remedy in self.remedies],
            "replayed": None if self.replayed is None else asdict(self.replayed),
            "shortage": self.shortage,
        }


def ask(values: Mapping[str, Any]) -> Question:
    """Return a command's arguments as a checked question.

    Args:
        values: The arguments of `vlmpack estimate` by name.

    Raises:
        ConfigError: If one is missing, unknown or impossible.
    """
    from vlmpack.memory.gpus import find_gpu
    from vlmpack.memory.presets import PRESETS

    if values["model"] is None:
        raise ConfigError(f"name a model: {', '.join(PRESETS)}, or a config.json")
    model = ModelShape.from_config(
        values["model"], tile_size=values["tile_size"], text_only=values["text_only"]
    )
    regime = regime_of(values)
    gpu = None if values["gpu"] is None else find_gpu(_gpu_words(values["gpu"]))
    if gpu is not None and isinstance(_gpu_words(values["gpu"]), str):
        regime = regime.model_copy(update={"workspace_bytes": gpu.workspace_bytes})
    for name in ("rows", "tokens", "side"):
        if values[name] < 1:
            raise ConfigError(f"--{name} must be at least 1, got {values[name]}")
    tiling = None if values["images"] is None else _tiling(model, values)
    return Question(
        model=model,
        regime=regime,
        gpu=gpu,
        rows=values["rows"],
        tokens=values["tokens"],
        tiles=_tiles(model, tiling, values),
        images=values["images"],
        tiling=tiling,
        margin=values["margin"],
        position_tokens=values["position_tokens"],
        replay=values["replay"],
    )


def _gpu_words(text: str) -> str | int:
    """Return a size as bytes, and a name as it is."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mg]i?b)?", text.strip().lower())
    # a bare number with few digits is a card's name: 3090
    if found is None or (found[2] is None and len(text.strip()) < 6):
        return text
    return int(float(found[1]) * _UNITS[found[2] or ""])


def _tiling(model: ModelShape, values: Mapping[str, Any]) -> Tiling:
    """Return the rule by which images are cut for this model.

    Raises:
        ConfigError: If the model takes no images.
    """
    vision = model.vision
    if vision is None:
        raise ConfigError(f"{model.name} has no vision encoder, so it cannot take images")
    whole = -(-values["side"] // vision.tile_size) * vision.tile_size
    return Tiling(
        tile_size=vision.tile_size,
        max_side=whole,
        patch_size=1 if vision.tile_size % vision.patch_size else vision.patch_size,
        tokens_per_tile=model.tokens_per_tile,
        position_tokens=min(1, values["position_tokens"] or 0),
    )


def _tiles(model: ModelShape, tiling: Tiling | None, values: Mapping[str, Any]) -> float:
    """Return the batch's tiles from what the command line says of them.

    Raises:
        ConfigError: If both tiles and images are given, or one is negative.
    """
    tiles: float | None = values["tiles"]
    images: int | None = values["images"]
    if tiles is not None and images is not None:
        raise ConfigError("give --tiles or --images, not both")
    for name, number in (("tiles", tiles), ("images", images)):
        if number is not None and number < 0:
            raise ConfigError(f"--{name} must not be negative, got {number}")
    if images is not None and tiling is not None and model.vision is not None:
        vision = model.vision
        if vision.rotary:  # any size as it is, without tiles
            patches = (int(values["side"]) // vision.patch_size) ** 2
            return images * patches / vision.patches_per_tile
        return images * most_tiles_of_image(tiling)
    if tiles is not None:
        return tiles if tiles % 1 else int(tiles)
    return token_bound(
        model, rows=values["rows"], tokens_per_row=values["tokens"], position_tokens=values["position_tokens"]
    )
