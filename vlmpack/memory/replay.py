"""A whole training step, move by move, through a model of the caching allocator.

`estimate` counts bytes; whether they find a place depends on what lies between them. Here the blocks'
programs are strung together as a training loop runs them, and every allocation is placed:

    weights, workspaces | batch, forward, backward, optimizer | batch, forward, backward, optimizer
                          first step: states are made            the state that every later step has

The second step is the one that counts: states and weights lie where the first one left room. It takes some
ten milliseconds, not microseconds, and a larger batch may run where a smaller one does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from vlmpack.errors import ConfigError
from vlmpack.memory.caching import CachingAllocator, DoesNotFitError
from vlmpack.memory.chain import build_chain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vlmpack.memory.caching import Block
    from vlmpack.memory.chain import Chain, Segment
    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.program import Program
    from vlmpack.memory.regime import TrainingRegime

STEPS: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What became of a training run's memory."""

    fits: bool
    """Whether every allocation found a place."""
    peak_requested: int
    """Most bytes asked for at a time."""
    peak_allocated: int
    """`torch.cuda.max_memory_allocated`."""
    peak_reserved: int
    """`torch.cuda.max_memory_reserved`; with CUDA's context what nvidia-smi shows."""


def can_replay(regime: TrainingRegime) -> bool:
    """Return whether a step under this regime can be replayed: not sharded, no sub-batches of the encoder."""
    return regime.sharding == "none" and regime.vision_sub_batch is None


@lru_cache(maxsize=4096)
def replay(
    model: ModelShape,
    regime: TrainingRegime,
    *,
    rows: int,
    tokens_per_row: int,
    tiles: float = 0,
    capacity: int | None = None,
) -> Replayed:
    """Run two training steps on sizes through the allocator; cached.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        rows: Packed sequences of the batch.
        tokens_per_row: Positions of each.
        tiles: Tiles of the batch.
        capacity: Bytes that the allocator may reserve, CUDA's context left out; None: no limit.

    Raises:
        ConfigError: If the regime cannot be replayed.
    """
    if not can_replay(regime):
        raise ConfigError("a sharded step, or one with sub-batches of the encoder, cannot be replayed")
    run = _Run(model, regime, rows, tokens_per_row, tiles, CachingAllocator(capacity))
    fits = True
    try:
        run.train()
    except DoesNotFitError:
        fits = False
    return Replayed(
        fits=fits,
        peak_requested=run.peak_requested,
        peak_allocated=run.allocator.peak_allocated,
        peak_reserved=run.allocator.peak_reserved,
    )


@dataclass(slots=True)
class _Frame:
    """One block between its forward and its backward pass."""

    program: Program
    rows: float
    places: dict[int, Block]
    """Where its storages lie."""
    source: Block | None = None
    """The input of a block that is recomputed."""
    again: Program | None = None
    """What is recomputed in backward."""


class _Run:
    """A training run: what is alive, and where."""

    def __init__(
        self,
        model: ModelShape,
        regime: TrainingRegime,
        rows: int,
        tokens: int,
        tiles: float,
        allocator: CachingAllocator,
    ) -> None:
        self.model, self.regime = model, regime
        self.rows, self.tokens, self.tiles = rows, tokens, tiles
        self.allocator = allocator
        self.requested = self.peak_requested = 0
        self._sizes: dict[int, int] = {}
        self._gradients: list[Block] = []
        self._states: list[Block] | None = None
        self._batch: list[Block] = []
        self._held: Block | None = None
        """The last step's logits, where the loop keeps them."""
        self._next_held: Block | None = None

    # ---- memory --------------------------------------------------------------------------------
    def _new(self, size: int) -> Block | None:
        if size <= 0:
            return None
        block = self.allocator.allocate(size)
        self._sizes[block.number] = size
        self.requested += size
        self.peak_requested = max(self.peak_requested, self.requested)
        return block

    def _free(self, *blocks: Block | None) -> None:
        for block in blocks:
            if block is not None:
                self.requested -= self._sizes.pop(block.number)
                self.allocator.release(block)

    def _some(self, sizes: Iterable[int]) -> list[Block]:
        return [block for block in map(self._new, sizes) if block is not None]

    def _move(self, frame: _Frame, moves: Iterable[int], *, keep: frozenset[int] = frozenset()) -> None:
        """Make a program's moves; storages in `keep` are not freed."""
        places, sizes, rows = frame.places, frame.program.sizes, frame.rows
        for number in moves:
            if number >= 0:
                block = self._new(sizes[number].at(rows))
                if block is not None:
                    places[number] = block
            elif ~number not in keep:
                self._free(places.pop(~number, None))

    # ---- a run ---------------------------------------------------------------------------------
    def train(self) -> None:
        """Run the steps."""
        chain = self._chain(accumulating=self.regime.accumulation)
        self._some(w.elements * w.itemsize for _, w in chain.weights)
        self._some([self.model.buffer_bytes, *[self.regime.workspace_bytes // 2] * 2])
        for _ in range(STEPS):
            if self.regime.accumulation:
                self._micro_step(self._chain(accumulating=False))
            self._micro_step(chain)
            self._optimize(chain)

    def _chain(self, *, accumulating: bool) -> Chain:
        regime = self.regime
        if regime.accumulation != accumulating:
            regime = regime.model_copy(update={"accumulation": accumulating})
        return build_chain(self.model, regime, self.tokens)

    def _optimize(self, chain: Chain) -> None:
        """Make the states once, the temporary each time, and let go of the gradients."""
        own = [(w.elements, w.itemsize) for _, w in chain.weights if w.trainable]
        if self._states is None:
            parts = self._state_parts()
            self._states = self._some(n * (part or width) for n, width in own for part in parts)
        if self.regime.optimizer == "adamw_foreach":
            self._free(*self._some(n * width for n, width in own))
        self._free(*self._gradients)
        self._gradients = []

    def _state_parts(self) -> list[int]:
        """Return the bytes an element of each state; 0: those of the weight."""
        regime = self.regime
        number = {"sgd": 0, "sgd_momentum": 1}.get(regime.optimizer, 2)
        copy = [4] if regime.master_weights else []
        each = (regime.state_bytes - sum(copy)) // max(number, 1)
        follows = regime.optimizer_state is None and regime.optimizer != "adamw_8bit"
        return [0 if follows else each] * number + copy

    def _micro_step(self, chain: Chain) -> None:
        self._load()
        copies: list[Block] = []  # autocast's, to the end of the forward pass
        entry = _Frame(chain.embedding.memory.program, self.rows, {})
        vision, indices, x = self._enter(chain, entry, copies)
        tables, mask = (self._new(size.at(self.rows)) for size in (chain.tables, chain.mask))
        language: list[_Frame] = []
        for segment in chain.language:
            if segment.component == "logits" and not self.regime.checkpoint_language:
                self._free(mask)  # no variable holds it any more
                mask = None
            x = self._forward(segment, self.rows, x, language, copies)
        self._free(x, *copies)
        if self.regime.holds_logits:
            self._free(self._held)
            self._held, self._next_held = self._next_held, None
        gradient: Block | None = None
        for frame in reversed(language):
            gradient = self._backward(frame, gradient)
        self._free(tables, mask)
        self._leave(chain, entry, vision, indices, gradient)

    def _load(self) -> None:
        """Make a batch; the loop's variable lets go of the one before only then."""
        before = self._batch
        positions = self.rows * self.tokens
        pixels = self.model.vision.pixels_per_tile if self.model.vision else 0
        columns = 2 if self.regime.mask == "none" else 3
        sizes = [8 * positions] * columns + [int(self.tiles * pixels) * self.regime.weight_bytes]
        self._batch = self._some(sizes)
        self._free(*before)

    # ---- embedding, encoder, merge -------------------------------------------------------------
    def _enter(
        self, chain: Chain, entry: _Frame, copies: list[Block]
    ) -> tuple[list[_Frame], Block | None, Block | None]:
        """Embed the tokens, run the encoder, merge; return its frames, the merge's indices, the output."""
        program, frames = entry.program, list[_Frame]()
        self._move(entry, program.forward[:1])  # the embeddings come first, then the pictures
        seen: Block | None = None
        indices: Block | None = None
        if self.tiles:
            for segment in chain.vision:
                seen = self._forward(segment, self.tiles, seen, frames, copies)
            if self.model.merge == "index":
                indices = self._new(int(16 * self.model.tokens_per_tile * self.tiles))
        self._move(entry, program.forward[1:])
        self._move(entry, program.after, keep=frozenset([program.output]))
        self._free(seen)
        return frames, indices, entry.places.pop(program.output, None)

    def _leave(
        self,
        chain: Chain,
        entry: _Frame,
        frames: list[_Frame],
        indices: Block | None,
        gradient: Block | None,
    ) -> None:
        """Go back through the merge, the encoder and the embeddings."""
        moves = entry.program.backward
        cut = 0
        if moves:
            if gradient is not None:
                entry.places[moves[0]] = gradient
            cut = moves.index(~moves[0]) + 1 if self.tiles and ~moves[0] in moves else 1
        if not self.tiles:
            self._free(indices)
            self._end(entry, moves[1:])
            self._free(*([] if moves else [gradient]))
            return
        tracked = any(frame.program.backward for frame in frames)
        pictures = self._new(int(chain.image_tokens_bytes * self.tiles)) if tracked else None
        self._move(entry, moves[1:cut])
        if not moves:
            self._free(gradient)
        self._free(indices)
        for frame in reversed(frames):
            pictures = self._backward(frame, pictures)
        self._free(pictures)
        self._end(entry, moves[cut:] if moves else ())

    def _end(self, frame: _Frame, moves: Iterable[int]) -> Block | None:
        """Make the last moves of a backward pass; return the input's gradient."""
        self._move(frame, moves)
        program, places = frame.program, frame.places
        for number in program.weight_gradients:
            block = places.pop(number, None)
            if block is not None:
                self._gradients.append(block)
        handed = program.input_gradient
        gradient = places.pop(handed, None) if handed is not None else None
        assert not places, f"{len(places)} storages outlive their backward pass"
        return gradient

    # ---- blocks --------------------------------------------------------------------------------
    def _forward(
        self,
        segment: Segment,
        rows: float,
        x: Block | None,
        frames: list[_Frame],
        copies: list[Block],
    ) -> Block | None:
        """Run equal blocks forward; return the last one's output."""
        for _ in range(segment.count):
            x = self._forward_one(segment, rows, x, frames, copies)
        return x

    def _forward_one(
        self, segment: Segment, rows: float, x: Block | None, frames: list[_Frame], copies: list[Block]
    ) -> Block | None:
        recomputed = segment.recomputed
        program = (segment.plain if recomputed else segment.memory).program
        frame = _Frame(program, rows, {})
        if program.input is not None and x is not None:
            frame.places[program.input] = x
        # under recomputation autocast still holds the copies of trained weights
        cached = program.copies if recomputed and segment.memory.cached_casts else program.cached
        kept = cached | {program.output}
        held = self._logits(segment, program)
        if recomputed and program.input is not None:
            kept |= {program.input}
        self._move(frame, [n for n in program.forward if n != program.input], keep=kept | held)
        self._move(frame, program.after, keep=kept | held)
        for number in held:
            self._next_held = frame.places.pop(number, None)
        output = frame.places.pop(program.output, None)
        if recomputed:
            copies += [frame.places.pop(n) for n in tuple(cached) if n in frame.places]
            source = frame.places.pop(program.input, None) if program.input is not None else None
            frames.append(_Frame(segment.memory.program, rows, {}, source, segment.memory.program))
        else:
            # a copy that backward needs as well stays after the forward pass
            gone = {~n for n in program.after if n < 0} & cached
            copies += [frame.places.pop(n) for n in sorted(gone) if n in frame.places]
            frames.append(frame)
        return output

    def _logits(self, segment: Segment, program: Program) -> frozenset[int]:
        """Return the storage of the logits where the loop keeps them."""
        if segment.component != "logits" or not self.regime.holds_logits:
            return frozenset()
        size = self.tokens * self.model.language.vocab * self.regime.compute_bytes
        large = [n for n in program.forward if n >= 0 and program.sizes[n].per_row == size]
        return frozenset(large[:1])

    def _backward(self, frame: _Frame, gradient: Block | None) -> Block | None:
        """Run one block backward; return its input's gradient."""
        program = frame.program
        if frame.again is not None:
            if program.input is not None and frame.source is not None:
                frame.places[program.input] = frame.source
            self._move(frame, [n for n in program.forward if n != program.input])
            self._move(frame, program.after)
        moves = program.backward
        if not moves:
            self._free(gradient)
        elif gradient is not None:
            frame.places[moves[0]] = gradient
        return self._end(frame, moves[1:])
