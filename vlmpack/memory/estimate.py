"""How many bytes a training step needs, by component and phase: closed forms, no torch, no GPU.

Read `tape` for what a block keeps and `chain` for the parts of a model; here they are put along the
step's phases. The peak is the highest phase, not the sum of all components:

    forward    resident | + blocks kept so far + transient of the current block | + logits, loss
    backward   + everything kept + transient, then fewer kept tensors and more gradients, block by block
    step       weights + gradients + optimizer + its temporary
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmpack.errors import ConfigError
from vlmpack.memory.allocator import expected_slack
from vlmpack.memory.chain import build_chain
from vlmpack.memory.static import static_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vlmpack.memory.chain import Chain, Segment
    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.regime import TrainingRegime
    from vlmpack.memory.tape import Bytes

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One point of a training step: what is alive there."""

    name: str
    """Where in the step."""
    parts: Mapping[str, int]
    """Bytes by component; they add up to `total`."""

    @property
    def total(self) -> int:
        """Bytes in use."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """What one training step needs."""

    rows: int
    """Packed sequences of the batch."""
    tokens_per_row: int
    """Positions of each."""
    tiles: float
    """Tiles of the batch."""
    phases: tuple[Phase, ...]
    """The step from its first allocation to the optimizer."""
    allocator_bytes: int
    """What the allocator hands out beyond what was asked for."""
    context_bytes: int
    """What CUDA takes itself, outside the allocator."""
    saved_bytes: int
    """What autograd keeps for backward, the batch itself left out; `probe` measures the same."""

    @property
    def peak(self) -> Phase:
        """The fullest phase."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak_requested(self) -> int:
        """Bytes asked for at the peak."""
        return self.peak.total

    @property
    def peak_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` would show."""
        return self.peak.total + self.allocator_bytes

    @property
    def device_bytes(self) -> int:
        """What the device gives up: the peak and CUDA's own share, without fragmentation."""
        return self.peak_bytes + self.context_bytes

    @property
    def components(self) -> dict[str, int]:
        """Bytes of each component at its fullest; their sum is above the peak, since phases differ."""
        fullest: dict[str, int] = {}
        for phase in self.phases:
            for name, size in phase.parts.items():
                key = f"transient_{phase.name.split()[0]}" if name == "transient" else name
                fullest[key] = max(fullest.get(key, 0), size)
        fullest["allocator"] = self.allocator_bytes
        fullest["context"] = self.context_bytes
        return fullest


def estimate(
    model: ModelShape,
    regime: TrainingRegime,
    *,
    rows: int,
    tokens_per_row: int,
    tiles: float = 0,
    cpu: bool = False,
) -> MemoryEstimate:
    """Return what a training step on one device needs.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        rows: Packed sequences in the batch, at least 1.
        tokens_per_row: Positions of each, at least 1.
        tiles: Tiles in the batch, 0 for text alone. A model of any resolution may have fractions: patches
            over `model.patches_per_tile`.
        cpu: Count what the CPU kernels keep, to compare with a measurement without a GPU.

    Raises:
        ConfigError: If a number is negative, or there are tiles for a model without vision.
    """
    if rows < 1:
        raise ConfigError(f"a batch needs at least one row, got {rows}")
    if tiles < 0:
        raise ConfigError(f"tiles must not be negative, got {tiles}")
    if tiles and model.vision is None:
        raise ConfigError(f"{model.name} has no vision encoder, so it cannot take {tiles} tiles")
    chain = build_chain(model, regime, tokens_per_row, cpu=cpu)
    walk = _Walk(model, regime, chain, rows, tokens_per_row, tiles)
    phases = walk.run()
    return MemoryEstimate(
        rows=rows,
        tokens_per_row=tokens_per_row,
        tiles=tiles,
        phases=phases,
        allocator_bytes=walk.slack(),
        context_bytes=regime.context_bytes,
        saved_bytes=walk.saved,
    )


def _most(lines: Iterable[Bytes], rows: float) -> int:
    return max((line.at(rows) for line in lines), default=0)


@dataclass(slots=True)
class _Walk:
    """Goes through a step and notes what is alive at the points where the peak can lie."""

    model: ModelShape
    regime: TrainingRegime
    chain: Chain
    rows: int
    tokens: int
    tiles: float
    alive: dict[str, int] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    saved: int = 0

    def run(self) -> tuple[Phase, ...]:
        """Return the phases of one step."""
        self._start()
        before = self._activations()
        self._forward()
        self.saved = self._activations() - before
        self._backward()
        self._step()
        return tuple(self.phases)

    def _activations(self) -> int:
        return sum(self.alive[name] for name in ("vision", "connector", "language", "logits"))

    def _note(self, name: str, transient: int) -> None:
        self.phases.append(Phase(name=name, parts={**self.alive, "transient": transient}))

    def _start(self) -> None:
        static = static_bytes(self.model, self.regime, self.tokens)
        positions = self.rows * self.tokens
        columns = 2 if self.regime.mask == "none" else 3  # ids, labels, mask or positions: int64
        pixels = self.model.vision.pixels_per_tile if self.model.vision else 0
        logits = positions * self.model.language.vocab * self.regime.compute_bytes
        self.alive = {
            "weights": static.weights,
            "gradients": static.gradients if self.regime.accumulation else 0,
            "optimizer": static.optimizer,
            "inputs": int(self.tiles * pixels) * self.regime.weight_bytes + 8 * columns * positions,
            "workspace": self.regime.workspace_bytes + static.gather,
            "logits": logits if self.regime.holds_logits else 0,
            "vision": 0,
            "connector": 0,
            "language": 0,
            "casts": 0,
        }

    # ---- forward -------------------------------------------------------------------------------
    def _forward(self) -> None:
        embedding = self.chain.embedding.memory
        self.alive["language"] += embedding.output.at(self.rows)
        if self.tiles:
            image_tokens = int(self.chain.image_tokens_bytes * self.tiles)
            if self._piece():
                self._forward_pieces(image_tokens)
            else:
                for segment in self.chain.vision:
                    self._forward_segment(segment, self.tiles)
            self._note("forward merge", embedding.output.at(self.rows) + image_tokens)
            self.alive["language"] += self._indices()
        self.alive["language"] += embedding.saved.at(self.rows) - embedding.output.at(self.rows)
        self.alive["language"] += self.chain.tables.at(self.rows) + self.chain.mask.at(self.rows)
        for segment in self.chain.language:
            if segment.component == "logits" and not self.regime.checkpoint_language:
                self.alive["language"] -= self.chain.mask.at(self.rows)  # no variable holds it any more
            self._forward_segment(segment, self.rows)

    def _piece(self) -> float:
        """Return how many tiles the vision encoder takes at a time when it runs in sub-batches, else 0."""
        return min(self.regime.vision_sub_batch or 0, self.tiles)

    def _forward_pieces(self, image_tokens: int) -> None:
        """Run the encoder piece by piece; nothing is kept but the pixels and the image tokens."""
        piece = self._piece()
        for segment in self.chain.vision:
            transient = image_tokens + _most(segment.plain.forward, piece)
            self._note(f"forward {segment.name} of {piece} tiles", transient)

    def _backward_pieces(self) -> None:
        """Go back through the last piece: the others have left their gradients."""
        piece = self._piece()
        held = int(self.chain.image_tokens_bytes * self.tiles)
        self.alive["connector"] += held
        for segment in self.chain.vision:
            self._collect(segment, segment.count)
            self.alive[segment.component] += _kept(segment).at(piece) * segment.count
        for segment in reversed(self.chain.vision):
            kept = _kept(segment).at(piece)
            self._note(
                f"backward {segment.name} of {piece} tiles", self._backward_transient(segment, piece) - kept
            )
            self.alive[segment.component] -= kept * segment.count
        self.alive["connector"] -= held

    def _forward_segment(self, segment: Segment, rows: float) -> None:
        """Note the last of the equal parts: everything that the others keep is alive there."""
        kept = _kept(segment).at(rows)
        running = (segment.plain if segment.recomputed else segment.memory).forward
        self.alive[segment.component] += kept * (segment.count - 1)
        if segment.recomputed:
            self.alive["casts"] += segment.memory.cached_casts * (segment.count - 1)
        self._note(f"forward {segment.name}", _most(running, rows))
        self.alive[segment.component] += kept
        if segment.recomputed:
            self.alive["casts"] += segment.memory.cached_casts

    def _indices(self) -> int:
        """Return the bytes of the image tokens' places that an indexed write keeps: row and column."""
        return int(16 * self.model.tokens_per_tile * self.tiles) if self.model.merge == "index" else 0

    # ---- backward ------------------------------------------------------------------------------
    def _backward(self) -> None:
        self.alive["casts"] = 0  # autocast's cache ends with the forward pass
        mask = self.chain.mask.at(self.rows)
        if not self.regime.checkpoint_language:
            mask = 0
        for segment in reversed(self.chain.language):
            self._backward_segment(segment, self.rows)
        self.alive["language"] -= self.chain.tables.at(self.rows) + mask
        embedding = self.chain.embedding.memory
        self._note("backward merge", _most(embedding.backward, self.rows))
        self.alive["language"] -= embedding.saved.at(self.rows) + self._indices()
        self.alive["language"] += embedding.output.at(self.rows)  # the embeddings' gradient waits its turn
        if self.tiles:
            if self._piece():
                self._backward_pieces()
            else:
                for segment in reversed(self.chain.vision):
                    self._backward_segment(segment, self.tiles)
        self.alive["language"] -= embedding.output.at(self.rows)
        self._collect(self.chain.embedding)

    def _backward_segment(self, segment: Segment, rows: float) -> None:
        kept = _kept(segment).at(rows)
        transient = self._backward_transient(segment, rows) - kept
        self._note(f"backward {segment.name}", transient)
        if segment.count > 1:
            self.alive[segment.component] -= kept * (segment.count - 1)
            self._collect(segment, segment.count - 1)
            self._note(f"backward first {segment.name}", transient)
        self.alive[segment.component] -= kept
        self._collect(segment, 1)

    @staticmethod
    def _backward_transient(segment: Segment, rows: float) -> int:
        """Return the most that one part needs in backward, its kept tensors included."""
        transient = _most(segment.memory.backward, rows)
        if segment.recomputed:
            again = _most(segment.memory.forward, rows) + segment.memory.output.at(rows)
            transient = max(transient, again)
        return transient

    def _collect(self, segment: Segment, count: int = 1) -> None:
        """Keep the weights' gradients of parts whose backward is done."""
        if not self.regime.accumulation and not segment.shares_gradient:
            n = self.regime.shards if self.regime.sharding in {"zero2", "zero3"} else 1
            self.alive["gradients"] += segment.memory.gradients * count // n

    def slack(self) -> int:
        """Return what the allocator adds at the peak."""
        static = static_bytes(self.model, self.regime, self.tokens)
        peak = max(self.phases, key=lambda phase: phase.total)
        present = peak.parts["gradients"] / max(static.gradients, 1)
        slack = static.weight_slack + static.state_slack + int(static.gradient_slack * present)
        if peak.name == "step":
            return slack + (static.gradient_slack if static.step else 0)
        return slack + self._activation_slack()

    def _activation_slack(self) -> int:
        total = 0
        for segments, rows in ((self.chain.vision, self.tiles), (self.chain.language, self.rows)):
            for segment in segments if rows else ():
                kept = (segment.memory.output,) if segment.recomputed else segment.memory.kept_tensors
                total += segment.count * sum(expected_slack(size.at(rows)) for size in kept)
        return total

    # ---- optimizer -----------------------------------------------------------------------------
    def _step(self) -> None:
        static = static_bytes(self.model, self.regime, self.tokens)
        self.alive["gradients"] = static.gradients
        self._note("step", static.step)


def _kept(segment: Segment) -> Bytes:
    """Return what a part keeps for backward: only its input where it is recomputed."""
    return segment.memory.output if segment.recomputed else segment.memory.saved
