"""The rule by which a batch fits a GPU.

A batch fits if

    (1 + margin) * requested peak + largest logits block + CUDA context <= the GPU's bytes

The logits block, 4 bytes * positions * vocabulary, stands for fragmentation: the native allocator has to
find it in one piece, and smaller tensors sit in what is free. With expandable segments free memory can be
moved, and only what rounding adds takes its place: 1.5 % of the peak.
Each side of the rule grows with every size, so limits are monotone. It is wasteful where the logits are a
large part of the GPU. A replay of the allocator (`replay_limit`) comes within a few per cent of the real
limit; it takes about a second, is not monotone, and is used where it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from vlmpack.budget import BatchBudget, PackBudget
from vlmpack.errors import ConfigError
from vlmpack.memory.estimate import estimate
from vlmpack.memory.gpus import Gpu, find_gpu
from vlmpack.memory.replay import can_replay
from vlmpack.memory.replay_limit import replayed_tiles

if TYPE_CHECKING:
    from vlmpack.memory.estimate import MemoryEstimate
    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.regime import TrainingRegime

DEFAULT_MARGIN: Final = 0.03
"""Share of the peak that is left free for what the model does not see."""
ROUNDING: Final = 0.015
"""Share of the peak that stands for the allocator's rounding where no logits block is kept free: 0.1 to 1.4 %
were measured. Without it the rule was 2 tiles over the 41 of a published limit with expandable segments."""
MAX_ROWS: Final = 64
"""Packs at which the Pareto front ends unless told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileLimit:
    """The most tiles of a batch, and why no more."""

    tiles: int
    """Tiles of the batch."""
    by_tokens: int
    """What the rows' tokens allow."""
    bound: Literal["memory", "tokens"]
    """Which of the two decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontPoint:
    """One choice between many packs and many tiles a pack."""

    rows: int
    """Packs of a batch."""
    tiles: int
    """Tiles of the batch."""
    tiles_per_row: int
    """Tiles that every pack may hold at once."""
    required_bytes: int
    """What the rule counts for it, the context included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a batch fits a GPU."""

    fits: bool
    """The rule's answer."""
    required_bytes: int
    """What the rule counts."""
    available_bytes: int
    """What the GPU offers."""

    @property
    def short_bytes(self) -> int:
        """Bytes that are missing; 0 where it fits."""
        return max(0, self.required_bytes - self.available_bytes)


def _check_margin(margin: float) -> None:
    if not 0 <= margin < 1:
        hint = f" (did you mean {margin / 100}?)" if 1 <= margin < 100 else ""
        raise ConfigError(f"margin is a fraction of the peak, 0 <= margin < 1, got {margin}{hint}")


def required_bytes(
    model: ModelShape, regime: TrainingRegime, step: MemoryEstimate, *, margin: float = DEFAULT_MARGIN
) -> int:
    """Return what a GPU has to offer for this step by the rule in the module's first lines.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        step: Its estimate.
        margin: Share of the peak that is left free.

    Raises:
        ConfigError: If the margin is no fraction.
    """
    _check_margin(margin)
    positions = step.rows * step.tokens_per_row
    if regime.cross_entropy != "full":
        positions = min(positions, regime.loss_chunk)
    block = 4 * positions * model.language.vocab
    if regime.expandable_segments:
        block = int(ROUNDING * step.peak_requested)
    return int((1 + margin) * step.peak_requested) + block + regime.context_bytes


def token_bound(
    model: ModelShape, *, rows: int, tokens_per_row: int, position_tokens: int | None = None
) -> int:
    """Return the most tiles whose image tokens fit into the rows.

    Args:
        model: The model's sizes.
        rows: Packs of the batch.
        tokens_per_row: Positions of each.
        position_tokens: Tokens before each tile that say where it lies; None: the model's own.
    """
    if model.vision is None:
        return 0
    before = model.position_tokens if position_tokens is None else position_tokens
    return rows * (tokens_per_row // (model.tokens_per_tile + before))


def gib(size: float) -> str:
    """Return bytes for people: GiB, and MiB below a tenth of one."""
    return f"{size / 2**30:.2f} GiB" if abs(size) >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True, kw_only=True, slots=True)
class FitRule:
    """The rule for one model, regime, GPU and pack length.

    Raises:
        ConfigError: If the margin is no fraction.
    """

    model: ModelShape
    """The model's sizes."""
    regime: TrainingRegime
    """How it is trained, with this GPU's workspaces."""
    gpu: Gpu
    """The device."""
    tokens_per_row: int
    """Positions of a pack."""
    margin: float = DEFAULT_MARGIN
    """Share of the peak that is left free."""
    position_tokens: int | None = None
    """Tokens before each tile that say where it lies; None: the model's own."""
    bounded: bool = True
    """Every tile has the model's number of tokens, so tokens bound the tiles. Not so where a family joins
    tokens of large pictures."""
    replay: bool = False
    """Let a batch pass, too, that the rule refuses and a replay of the allocator takes."""

    def __post_init__(self) -> None:
        _check_margin(self.margin)

    @classmethod
    def of(
        cls,
        model: ModelShape,
        regime: TrainingRegime,
        gpu: Gpu | str | int,
        *,
        tokens_per_row: int,
        margin: float = DEFAULT_MARGIN,
        position_tokens: int | None = None,
        replay: bool = False,
    ) -> FitRule:
        """Return the rule for a GPU by name or by its bytes; a name sets the regime's workspaces too."""
        found = gpu if isinstance(gpu, Gpu) else find_gpu(gpu)
        if not isinstance(gpu, int):
            regime = regime.model_copy(update={"workspace_bytes": found.workspace_bytes})
        return cls(
            model=model,
            regime=regime,
            gpu=found,
            tokens_per_row=tokens_per_row,
            margin=margin,
            position_tokens=position_tokens,
            replay=replay,
        )

    def with_regime(self, regime: TrainingRegime) -> FitRule:
        """Return the same rule for another regime."""
        return replace(self, regime=regime)

    def for_rows_of(self, tokens: int) -> FitRule:
        """Return the same rule for another pack length."""
        return self if tokens == self.tokens_per_row else replace(self, tokens_per_row=tokens)

    def verdict(self, rows: int, tiles: float) -> Verdict:
        """Return whether a batch fits, and by how much not."""
        step = estimate(self.model, self.regime, rows=rows, tokens_per_row=self.tokens_per_row, tiles=tiles)
        required = required_bytes(self.model, self.regime, step, margin=self.margin)
        available = self.gpu.total_bytes
        if required > available and self.replay and tiles <= self._replayed(rows):
            required = available
        return Verdict(fits=required <= available, required_bytes=required, available_bytes=available)

    def most_tiles(self, rows: int) -> TileLimit:
        """Return the most tiles of a batch of `rows` packs; O(log tiles) estimates.

        Raises:
            ConfigError: If it does not fit even without a picture; says what is missing.
        """
        text = self.verdict(rows, 0)
        if not text.fits:
            raise ConfigError(self._shortage(rows, text))
        by_tokens = self._most_by_tokens(rows)
        low, high = max(0, min(self._replayed(rows), by_tokens)) if self.replay else 0, by_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.verdict(rows, middle).fits:
                low = middle
            else:
                high = middle - 1
        return TileLimit(tiles=low, by_tokens=by_tokens, bound="tokens" if low == by_tokens else "memory")

    def front(self, max_rows: int) -> tuple[FrontPoint, ...]:
        """Return the choices of (packs, tiles a pack) of which none is beaten in both."""
        points: list[FrontPoint] = []
        for rows in range(1, max_rows + 1):
            if rows > 1 and not self.verdict(rows, 0).fits:
                break
            tiles = self.most_tiles(rows).tiles
            points.append(
                FrontPoint(
                    rows=rows,
                    tiles=tiles,
                    tiles_per_row=tiles // rows,
                    required_bytes=self.verdict(rows, tiles).required_bytes,
                )
            )
        # more rows never allow more tiles a row: a point stands unless the next one allows as many
        pairs = zip(points, [*points[1:], None], strict=True)
        return tuple(p for p, after in pairs if after is None or after.tiles_per_row < p.tiles_per_row)

    def batch_budget(self, rows: int | None = None) -> BatchBudget:
        """Return the largest batch of `rows` packs, or of as many as may all be full of tiles."""
        if rows is None:
            full, rows = self._most_by_tokens(1), 1
            while rows < MAX_ROWS and self.verdict(rows + 1, (rows + 1) * full).fits:
                rows += 1
        patches = self.most_tiles(rows).tiles * self.model.patches_per_tile
        return BatchBudget(max_packs=rows, max_patches=patches, max_tokens=rows * self.tokens_per_row)

    def pack_budget(self, rows: int, max_images: int | None = None) -> PackBudget:
        """Return what each of `rows` packs may hold so that no batch of them can be too large."""
        patches = self.most_tiles(rows).tiles // rows * self.model.patches_per_tile
        return PackBudget(max_tokens=self.tokens_per_row, max_images=max_images, max_patches=patches)

    def _most_by_tokens(self, rows: int) -> int:
        """Return the most tiles whose tokens fit the rows; at least one token a tile."""
        if not self.bounded:
            return rows * self.tokens_per_row if self.model.vision is not None else 0
        return token_bound(
            self.model, rows=rows, tokens_per_row=self.tokens_per_row, position_tokens=self.position_tokens
        )

    def _replayed(self, rows: int) -> int:
        """Return the most tiles by a replay; -1 where none is possible or none fits."""
        if not can_replay(self.regime) or self.regime.expandable_segments:
            return -1
        return replayed_tiles(
            self.model,
            self.regime,
            self.gpu.total_bytes - self.regime.context_bytes,
            rows=rows,
            tokens_per_row=self.tokens_per_row,
        )

    def _shortage(self, rows: int, text: Verdict) -> str:
        model, gpu = self.model, self.gpu
        step = estimate(model, self.regime, rows=rows, tokens_per_row=self.tokens_per_row)
        parts = step.components
        static = sum(parts[name] for name in ("weights", "gradients", "optimizer", "context"))
        if static > gpu.total_bytes:
            return (
                f"{model.name} does not fit {gpu.name}: weights, gradients, optimizer state and CUDA's "
                f"context need {gib(static)} of {gib(gpu.total_bytes)}, {gib(static - gpu.total_bytes)} too "
                "much before the first batch. Use bfloat16 weights, an 8-bit optimizer, adapters "
                "(lora_rank), or sharding."
            )
        return (
            f"{model.name} on {gpu.name}: {rows} row(s) of {self.tokens_per_row} tokens need "
            f"{gib(text.required_bytes)} of {gib(gpu.total_bytes)} without a single picture, "
            f"{gib(text.short_bytes)} too much. Use fewer or shorter rows, checkpoint_language, or "
            "cross_entropy='chunked'."
        )
