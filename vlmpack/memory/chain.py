"""A model under a regime as a chain of parts, each with its closed form, in the order of the forward pass.

stem  vision block x L  norm  connector | embedding, merge | language block x L  head
`------------ rows are tiles ----------'`------------ rows are sequences --------------'
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

from vlmpack.errors import ConfigError
from vlmpack.memory.attention import Attention
from vlmpack.memory.blocks import Numerics, Training, language_block, vision_block
from vlmpack.memory.ends import connector, embedding, head, tower_norm, vision_stem
from vlmpack.memory.ops import Adapter
from vlmpack.memory.regime import ITEMSIZE
from vlmpack.memory.tape import NOTHING, Bytes

if TYPE_CHECKING:
    from vlmpack.memory.ends import Loss
    from vlmpack.memory.model_shape import LanguageShape, ModelShape, VisionShape
    from vlmpack.memory.ops import Kernel
    from vlmpack.memory.regime import TrainingRegime
    from vlmpack.memory.tape import BlockMemory, Weight

Component: TypeAlias = Literal["vision", "connector", "language", "logits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Equal parts that follow each other."""

    name: str
    """For the phase's name."""
    component: Component
    """What its activations are counted as."""
    memory: BlockMemory
    """One part, when gradients are recorded."""
    plain: BlockMemory
    """One part without recording: what its forward pass needs under checkpointing or when frozen."""
    count: int
    """Number of parts."""
    recomputed: bool = False
    """Only its input is kept; backward runs it again."""
    shares_gradient: bool = False
    """Its weights' gradients are counted elsewhere (a tied embedding)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """All parts of a model under one regime and one sequence length."""

    vision: tuple[Segment, ...]
    """Rows are tiles."""
    embedding: Segment
    """Rows are sequences."""
    language: tuple[Segment, ...]
    """Rows are sequences."""
    image_tokens_bytes: int
    """Bytes of a tile's image tokens between connector and merge."""
    weights: tuple[tuple[str, Weight], ...]
    """Each parameter once, with its part."""
    tables: Bytes
    """The rotary tables, which all language blocks share and keep."""
    mask: Bytes
    """A mask of all positions against all, alive in the forward pass (and kept for recomputation)."""


def numerics_of(regime: TrainingRegime, *, cpu: bool = False) -> Numerics:
    """Return what of a regime the blocks' programs see."""
    return Numerics(
        weight_bytes=regime.weight_bytes,
        compute_bytes=regime.compute_bytes,
        gradient_bytes=regime.gradient_bytes,
        accumulating=regime.accumulation,
        cpu=cpu,
    )


def _kernel(regime: TrainingRegime, *, masked: bool, head_dim: int, fewer_keys: bool = False) -> Kernel:
    """Return the kernel that SDPA takes on a GPU, where the regime leaves it the choice.

    Flash takes 16 bits without a mask. The memory-efficient kernel takes the rest, but no keys of fewer heads
    than queries, which transformers hands over as they are: then only the reference kernel is left, and it
    keeps the whole matrix.
    """
    if regime.attention != "sdpa":
        return regime.attention
    if not masked and regime.compute_bytes == 2 and head_dim <= 256:
        return "flash"
    return "math" if fewer_keys else "efficient"


def vision_attention(v: VisionShape, regime: TrainingRegime, *, span: int) -> Attention:
    """Return how a vision block attends."""
    return Attention(
        heads=v.heads,
        kernel=_kernel(regime, masked=False, head_dim=v.hidden // v.heads),
        span=span,
        pieces=v.rotary and regime.attention not in {"flash", "flex"},
    )


def language_attention(
    m: LanguageShape, regime: TrainingRegime, tokens: int, *, cpu: bool = False
) -> Attention:
    """Return how a language block attends in rows of this many positions."""
    masked = regime.mask != "none" or m.dense_mask
    # under a mask transformers copies the keys itself; the CPU's kernel takes them as they are
    fewer_keys = m.heads != m.kv_heads and not masked and not m.always_repeats_keys and not cpu
    kernel = _kernel(regime, masked=masked, head_dim=m.head_width, fewer_keys=fewer_keys)
    square = tokens * tokens
    # transformers expands a padding mask to all pairs of positions; the reference pipeline broadcasts it
    elements = {"none": 0, "padding": tokens if m.plain_eager else square, "packed": square}[regime.mask]
    if m.dense_mask:
        elements = square
    if kernel == "eager" and not m.plain_eager:
        elements = square  # causality itself is an additive mask there
    if kernel in {"flash", "flex"}:
        elements = 0
    grouped = m.heads != m.kv_heads
    return Attention(
        heads=m.heads,
        kernel=kernel,
        span=tokens,
        repeat_keys=grouped and (m.always_repeats_keys or kernel in {"eager", "math"} or elements > 0),
        mask_per_row=elements,
        mask_promotes=m.plain_eager,
        causal_mask_bytes=square if m.plain_eager and kernel == "eager" else 0,
        float_softmax=not m.plain_eager,
    )


def adapter_targets(regime: TrainingRegime) -> str:
    """Return the names of the layers that get an adapter."""
    return {"qv": "q v", "attention": "q k v o", "all": "q k v o gate up down"}[regime.lora_targets]


@lru_cache(maxsize=128)
def build_chain(shape: ModelShape, regime: TrainingRegime, tokens: int, *, cpu: bool = False) -> Chain:
    """Return the parts of `shape` under `regime` for rows of `tokens` positions; cached.

    Raises:
        ConfigError: If `tokens` is not positive, or the regime trains nothing.
    """
    if tokens < 1:
        raise ConfigError(f"a row needs at least one token, got {tokens}")
    numerics = numerics_of(regime, cpu=cpu)
    trains = {part: part not in regime.frozen for part in ("vision", "connector", "language")}
    if shape.vision is None:
        trains["vision"] = trains["connector"] = False
    if not any(trains.values()):
        raise ConfigError(f"{shape.name}: frozen={regime.frozen} leaves nothing to train")
    full_language = trains["language"] and regime.lora_rank is None
    vision = _vision_segments(shape, regime, numerics, trains)
    images = shape.vision is not None
    tracked = full_language or trains["vision"] or trains["connector"] or regime.input_gradients
    tied = shape.language.tied
    embed = _embedding_segment(
        shape, tokens, numerics, trainable=full_language, images=images, tracked=tracked
    )
    parts = _LanguageParts(
        shape=shape.language, regime=regime, tokens=tokens, numerics=numerics, trainable=full_language
    )
    language = _language_segments(parts, tracked=tracked)
    weights = [(_part(s.component), w) for s in vision for _ in range(s.count) for w in s.memory.weights]
    weights += [("vision", w) for w in _idle_weights(shape, vision)]
    weights += [("language", w) for w in embed.memory.weights]
    weights += [("language", w) for s in language[:-1] for _ in range(s.count) for w in s.memory.weights]
    last = language[-1].memory.weights
    weights += [("language", w) for w in (_without_table(last, shape.language) if tied else last)]
    tables, mask = _shared(shape.language, regime, tokens, cpu=cpu)
    return Chain(
        vision=vision,
        embedding=embed,
        language=language,
        image_tokens_bytes=shape.tokens_per_tile * shape.language.hidden * numerics.compute_bytes,
        weights=tuple(weights),
        tables=tables,
        mask=mask,
    )


def _idle_weights(shape: ModelShape, segments: tuple[Segment, ...]) -> list[Weight]:
    """Return the vision parameters that take no part in the loss: blocks after the chosen layer, a head."""
    v = shape.vision
    if v is None:
        return []
    block = next(s.memory.weights for s in segments if s.name == "vision block")
    idle = [replace(w, trainable=False) for w in block] * v.unused_layers
    if v.idle_parameters:
        idle.append(replace(block[0], elements=v.idle_parameters, trainable=False))
    return idle


def _part(component: Component) -> str:
    return "language" if component == "logits" else component


def _without_table(weights: tuple[Weight, ...], m: LanguageShape) -> list[Weight]:
    return [w for w in weights if w.elements != m.vocab * m.hidden]


def _shared(m: LanguageShape, regime: TrainingRegime, tokens: int, *, cpu: bool) -> tuple[Bytes, Bytes]:
    """Return the rotary tables and the mask that all blocks read."""
    each = 2 * int(m.head_width * m.rotary_share) * regime.weight_bytes * tokens
    attention = language_attention(m, regime, tokens, cpu=cpu)
    # transformers makes one table for the whole batch unless rows have positions of their own
    shared = regime.mask != "packed" and not m.plain_eager and not m.own_positions
    tables = Bytes(each) if shared else Bytes(0, each)
    if not attention.mask_per_row or m.plain_eager:
        return tables, NOTHING
    # boolean for SDPA, additive for eager attention
    return tables, Bytes(
        0, attention.mask_per_row * (regime.weight_bytes if attention.kernel == "eager" else 1)
    )


def _vision_segments(
    shape: ModelShape, regime: TrainingRegime, numerics: Numerics, trains: dict[str, bool]
) -> tuple[Segment, ...]:
    v, c = shape.vision, shape.connector
    if v is None or c is None:
        return ()
    on = trains["vision"]
    stem = [vision_stem(v, numerics, trainable=flag) for flag in (on, False)]
    segments = [Segment(name="stem", component="vision", memory=stem[0], plain=stem[1], count=1)]
    whole = v.layers - v.unused_layers
    full = whole if not v.window_patches else min(v.full_layers, whole)
    for span, count in ((v.window_patches, whole - full), (v.tokens_per_tile, full)):
        if count:
            how = vision_attention(v, regime, span=min(span, v.tokens_per_tile))
            segments.append(
                Segment(
                    name="vision block",
                    component="vision",
                    memory=vision_block(v, how, numerics, Training(weights=on, input=on)),
                    plain=vision_block(v, how, numerics, Training(weights=False, input=False)),
                    count=count,
                    recomputed=regime.checkpoint_vision and on,
                )
            )
    if v.final_norm or c.kind == "merger":
        kind = c.norm if c.kind == "merger" else v.norm
        norm = [tower_norm(v, kind, numerics, trainable=flag) for flag in (on, False)]
        segments.append(
            Segment(name="vision norm", component="vision", memory=norm[0], plain=norm[1], count=1)
        )
    out = shape.language.hidden
    width = segments[-1].memory.output.per_row // (v.tokens_per_tile * v.hidden)
    joins = [
        connector(c, v, out, width, numerics, trainable=trains["connector"] and grad, tracked=on and grad)
        for grad in (True, False)
    ]
    segments.append(
        Segment(name="connector", component="connector", memory=joins[0], plain=joins[1], count=1)
    )
    return tuple(segments)


def _embedding_segment(
    shape: ModelShape, tokens: int, numerics: Numerics, *, trainable: bool, images: bool, tracked: bool
) -> Segment:
    tied = shape.language.tied
    inner = replace(numerics, accumulating=numerics.accumulating or tied)
    memory = embedding(shape.language, tokens, shape.merge, inner, trainable=trainable, images=images)
    plain = embedding(shape.language, tokens, shape.merge, inner, trainable=False, images=images)
    if tracked and not trainable:
        plain = memory
    return Segment(
        name="embedding", component="language", memory=memory, plain=plain, count=1, shares_gradient=tied
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _LanguageParts:
    """Makes the segments of a language model."""

    shape: LanguageShape
    regime: TrainingRegime
    tokens: int
    numerics: Numerics
    trainable: bool

    def block(self, count: int, *, grad_input: bool) -> Segment:
        """Return equal blocks; the first one may have an input without a gradient."""
        how = language_attention(self.shape, self.regime, self.tokens, cpu=self.numerics.cpu)
        sizes = (self.shape, self.tokens, how, self.numerics)
        adapter = self.adapter
        training = Training(
            weights=self.trainable,
            input=grad_input,
            adapter=adapter,
            adapter_targets=adapter_targets(self.regime) if adapter else "",
        )
        return Segment(
            name="language block",
            component="language",
            memory=language_block(*sizes, training),
            plain=language_block(*sizes, Training(weights=False, input=False)),
            count=count,
            recomputed=self.regime.checkpoint_language,
        )

    @property
    def adapter(self) -> Adapter | None:
        """The adapters; peft keeps them in float32 unless told otherwise."""
        regime = self.regime
        if not regime.lora_rank:
            return None
        return Adapter(regime.lora_rank, ITEMSIZE[regime.lora_dtype or "fp32"], regime.lora_dropout)

    def head(self, *, tracked: bool) -> Segment:
        """Return last norm, logits and loss."""
        loss: Loss = "float" if self.shape.float_logits else "raw"
        if self.regime.cross_entropy != "full":
            loss = self.regime.cross_entropy
        ends = head(
            self.shape,
            self.tokens,
            loss,
            self.regime.loss_chunk,
            self.numerics,
            trainable=self.trainable,
            norm_trainable=self.trainable,
            tracked=tracked,
        )
        return Segment(name="loss", component="logits", memory=ends, plain=ends, count=1)


def _language_segments(parts: _LanguageParts, *, tracked: bool) -> tuple[Segment, ...]:
    """Return the blocks and the head; `tracked` says whether the embeddings have a gradient."""
    layers = parts.shape.layers
    records = tracked or parts.trainable or parts.adapter is not None
    if tracked or not records:
        return (parts.block(layers, grad_input=tracked), parts.head(tracked=records))
    rest = (parts.block(layers - 1, grad_input=True),) if layers > 1 else ()
    return (parts.block(1, grad_input=False), *rest, parts.head(tracked=records))
