"""The parts before, between and after the blocks: stem, connector, embedding, logits and loss."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

from vlmpack.memory.ops import activate, linear, normalize
from vlmpack.memory.tape import NOTHING, Bytes, Storage, Tensor

if TYPE_CHECKING:
    from vlmpack.memory.blocks import Numerics
    from vlmpack.memory.model_shape import ConnectorShape, LanguageShape, Merge, VisionShape
    from vlmpack.memory.ops import Norm
    from vlmpack.memory.tape import BlockMemory, Tape

Loss: TypeAlias = Literal["raw", "float", "chunked", "fused"]


@lru_cache(maxsize=256)
def vision_stem(v: VisionShape, numerics: Numerics, *, trainable: bool) -> BlockMemory:
    """Return what patch projection and positions cost; a row is a tile.

    The pixels belong to the training loop and are counted as inputs; autocast's copy of them is kept here.
    """
    t = numerics.tape(v.tokens_per_tile, grad_enabled=trainable)
    patch = 3 * v.frames * v.patch_size**2
    pixels = Tensor(Storage(NOTHING), 0, t.weight_bytes, tracked=False)
    copied = t.autocast or v.copies_pixels
    kept = t.allocate(Bytes(0, v.pixels_per_tile * t.compute_bytes)) if copied else pixels.storage
    weight = t.parameter(patch * v.hidden, trainable=trainable, matmul=True)
    weights = [(weight, t.compute_bytes)]
    if v.patch_bias:
        weights.append((t.parameter(v.hidden, trainable=trainable, matmul=True), t.compute_bytes))
    cast = t.weight_cast(weight) if t.autocast else None
    keeps = [kept] if cast is None else [kept, cast]
    tables = _tables(t, v)
    x = t.op(v.hidden, t.compute_bytes, [], keeps=[*keeps, tables], weights=weights)
    for storage in [*keeps[0 if copied else 1 :], tables]:
        t.release(storage)
    if v.class_token:
        token = t.parameter(v.hidden, trainable=trainable)
        joined = t.op(v.hidden, t.weight_bytes, [x], weights=[(token, t.weight_bytes)])
        t.drop(x)
        x = joined
    if v.position_embedding:
        places = t.parameter(v.tokens_per_tile * v.hidden, trainable=trainable)
        placed = t.op(v.hidden, t.weight_bytes, [x], weights=[(places, t.weight_bytes)], passes_gradient=True)
        t.drop(x)
        x = placed
    if v.pre_norm:
        normed = normalize(t, x, "layer", trainable=trainable)
        t.drop(x)
        x = normed
    return t.finish(pixels, x)


def stream_bytes(v: VisionShape, numerics: Numerics) -> int:
    """Return the bytes an element of the residual stream: float32 positions make it float32 in autocast."""
    return numerics.compute_bytes if v.narrow_stream else numerics.weight_bytes


def _tables(t: Tape, v: VisionShape) -> Storage:
    """Allocate what all blocks share: cosines and sines in float32, or the indices of the positions."""
    if v.rotary:
        return t.allocate(t.size(2 * v.hidden // v.heads, 4))
    return t.allocate(t.size(1, 8) if v.copies_pixels else NOTHING)


@lru_cache(maxsize=256)
def tower_norm(v: VisionShape, kind: Norm, numerics: Numerics, *, trainable: bool) -> BlockMemory:
    """Return what the norm after the last vision block costs; a row is a tile."""
    t = numerics.tape(v.tokens_per_tile, grad_enabled=trainable)
    x = t.input(v.hidden, stream_bytes(v, numerics), tracked=trainable)
    return t.finish(x, normalize(t, x, kind, trainable=trainable))


@lru_cache(maxsize=256)
def connector(
    c: ConnectorShape,
    v: VisionShape,
    out: int,
    itemsize: int,
    numerics: Numerics,
    *,
    trainable: bool,
    tracked: bool,
) -> BlockMemory:
    """Return what the connector costs; a row is a tile.

    Args:
        c: The connector.
        v: The vision encoder before it.
        out: The language model's width.
        itemsize: Bytes an element of what the encoder hands on.
        numerics: Types.
        trainable: Whether the connector is trained.
        tracked: Whether the encoder is.
    """
    tokens = (v.tile_size // v.patch_size // c.factor) ** 2
    t = numerics.tape(tokens, grad_enabled=trainable or tracked)
    joined = v.hidden * c.factor**2
    x = t.input(joined, itemsize, tracked=tracked)
    if c.kind == "pool":
        return t.finish(x, _pooled(t, c, x, v.hidden, out, trainable=trainable))
    if c.kind in {"pixel_shuffle", "linear"}:
        source = t.op(joined, x.itemsize, [x]) if c.kind == "pixel_shuffle" else t.cast(x, x.itemsize)
        y = linear(t, source, out, bias=c.bias, trainable=trainable)
        t.drop(source)
        return t.finish(x, y)
    middle = c.hidden or (joined if c.kind == "merger" else out)
    first = linear(t, x, middle, bias=c.bias, trainable=trainable)
    active = activate(t, first, c.activation)
    t.drop(first)
    y = linear(t, active, out, bias=c.bias, trainable=trainable)
    t.drop(active)
    return t.finish(x, y)


def _pooled(t: Tape, c: ConnectorShape, x: Tensor, hidden: int, out: int, *, trainable: bool) -> Tensor:
    """Gemma's connector: the average of factor x factor patches, a norm, one matrix."""
    copy = t.op(x.features, x.itemsize, [x])
    pooled = t.op(hidden, x.itemsize, [copy], keeps=[copy.storage])
    t.drop(copy)
    normed = normalize(t, pooled, "rms_gemma", trainable=trainable)
    t.drop(pooled)
    y = linear(t, normed, out, bias=c.bias, trainable=trainable)
    t.drop(normed)
    return y


@lru_cache(maxsize=256)
def embedding(
    m: LanguageShape, tokens: int, merge: Merge, numerics: Numerics, *, trainable: bool, images: bool
) -> BlockMemory:
    """Return what the token embedding costs until the image tokens are in it; a row is a sequence."""
    t = numerics.tape(tokens, grad_enabled=trainable)
    ids = Tensor(Storage(NOTHING), 0, 8, tracked=False)
    table = t.parameter(m.vocab * m.hidden, trainable=trainable)
    x = t.op(m.hidden, t.weight_bytes, [ids], weights=[(table, t.weight_bytes)])
    if images:
        mask = t.allocate(t.size(1, 1)) if merge == "scatter" else None
        merged = t.op(m.hidden, t.weight_bytes, [x], keeps=[mask] if mask else [])
        if mask is not None:
            t.release(mask)
        t.drop(x)
        x = merged
    return t.finish(ids, x)


@lru_cache(maxsize=256)
def head(
    m: LanguageShape,
    tokens: int,
    loss: Loss,
    chunk: int,
    numerics: Numerics,
    *,
    trainable: bool,
    norm_trainable: bool,
    tracked: bool = True,
) -> BlockMemory:
    """Return what the last norm, the logits and the loss cost; a row is a sequence.

    Per position and vocabulary entry, under autocast: 2 bytes of logits, and for the loss on raw logits
    2 (log-probabilities) + 4 (their float32 copy) + 4 (its gradient), 12 in all; with logits cast to
    float32 first 4 + 4 + 4 at the same place in backward, where the 2 are gone.
    """
    t = numerics.tape(tokens, grad_enabled=True)
    x = t.input(m.hidden, t.weight_bytes, tracked=tracked)
    normed = normalize(t, x, m.norm, trainable=norm_trainable)
    if loss in {"chunked", "fused"}:
        y = _piecewise(t, m, normed, chunk, fused=loss == "fused", trainable=trainable)
        t.drop(normed)
        return t.finish(x, y)
    logits = linear(t, normed, m.vocab, bias=m.head_bias, trainable=trainable)
    source = t.cast(logits, 4) if loss == "float" else t.cast(logits, logits.itemsize)
    scores = t.op(m.vocab, source.itemsize, [source], keeps_output=True)
    wide = t.cast(scores, 4 if t.autocast else scores.itemsize)
    # transformers shifts the labels into a copy
    labels = t.allocate(t.size(1, 8) if loss == "float" else NOTHING)
    y = t.op(0, 4, [wide], keeps=[wide.storage, labels])
    t.release(labels)
    t.drop(wide, scores, source, logits, normed)  # all of them are variables until the loss is returned
    return t.finish(x, y)


def _piecewise(t: Tape, m: LanguageShape, x: Tensor, chunk: int, *, fused: bool, trainable: bool) -> Tensor:
    """The loss in chunks of positions: only one chunk's logits live at a time.

    In 16 bits 2 bytes of logits and two float32 arrays a chunk. Backward recomputes them to three float32
    arrays, when the 2 bytes are gone (chunked); or the forward pass has made the gradients already, beside
    the logits of the chunk before (fused).
    """
    weight = t.parameter(m.vocab * m.hidden, trainable=trainable, matmul=True)
    # a chunk goes over rows' ends, so it is whole unless the batch has fewer positions
    forward = Bytes(chunk * m.vocab * ((2 if fused else 1) * t.compute_bytes + 8))
    backward = Bytes(chunk * m.vocab * 12)
    xc = t.cast(x, t.compute_bytes)
    cast = t.weight_cast(weight) if t.autocast else None
    keeps = [xc.storage] if not fused else []
    if cast is not None and not fused:
        keeps.append(cast)
    made = []
    if fused:  # gradients of the input and of the weight, made in the forward pass
        made = [t.allocate(t.size_of(xc))]
        if trainable:
            made.append(t.allocate(Bytes(weight.elements * t.weight_bytes)))
    y = t.op(
        0,
        4,
        [xc],
        keeps=keeps + made,
        weights=[(weight, t.compute_bytes)],
        forward_scratch=forward,
        scratch=NOTHING if fused else backward,
    )
    t.drop(xc)
    for storage in [*made, *([cast] if cast is not None else [])]:
        t.release(storage)
    return y
