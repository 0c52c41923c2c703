"""The layers of vision and language transformers as programs for the tape: what each one keeps.

Every function takes the tape first and holds on to its arguments: the caller drops its own tensors
when PyTorch's variables would. Counts were checked against autograd on transformers' classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from vlmpack.memory.tape import NOTHING, Bytes, Tensor

if TYPE_CHECKING:
    from vlmpack.memory.tape import Tape

Activation: TypeAlias = Literal["gelu", "gelu_tanh", "quick_gelu", "gelu_new", "silu", "relu"]
Norm: TypeAlias = Literal["layer", "rms", "rms_gemma"]
Kernel: TypeAlias = Literal["eager", "flash", "efficient", "math", "flex"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank adapter beside a frozen linear layer."""

    rank: int
    itemsize: int
    """Bytes an element of its two matrices."""
    dropout: bool = False
    """Whether its input goes through dropout: a copy and a mask of one byte an element are kept."""


def linear(
    t: Tape, x: Tensor, out: int, *, bias: bool, trainable: bool, adapter: Adapter | None = None
) -> Tensor:
    """Run a linear layer of `x.features` inputs; an adapter freezes the layer and trains beside it."""
    y = _dense(t, x, out, bias=bias, trainable=trainable and adapter is None, itemsize=t.weight_bytes)
    if adapter is None:
        return y
    # peft: result + B(A(cast(x))) * scaling, the adapter in its own type
    cast = t.cast(x, adapter.itemsize)
    if adapter.dropout:
        mask = t.allocate(t.size(cast.features, 1))
        dropped = t.op(cast.features, cast.itemsize, [cast], keeps=[mask])
        t.drop(cast)
        t.release(mask)
        cast = dropped
    low = _dense(t, cast, adapter.rank, bias=False, trainable=True, itemsize=adapter.itemsize)
    high = _dense(t, low, out, bias=False, trainable=True, itemsize=adapter.itemsize)
    t.drop(cast, low)
    scaled = t.op(out, high.itemsize, [high])
    t.drop(high)
    total = add(t, y, scaled)
    t.drop(y, scaled)
    result = t.cast(total, y.itemsize)
    t.drop(total)
    return result


def _dense(t: Tape, x: Tensor, out: int, *, bias: bool, trainable: bool, itemsize: int) -> Tensor:
    width = t.compute_bytes if t.autocast else itemsize
    weight = t.parameter(x.features * out, trainable=trainable, matmul=True, itemsize=itemsize)
    offset = t.parameter(out, trainable=trainable, matmul=True, itemsize=itemsize) if bias else None
    xc = t.cast(x, width)
    wc = t.weight_cast(weight) if t.autocast else None
    bc = t.weight_cast(offset) if t.autocast and offset is not None else None
    keeps = [xc.storage] if trainable else []
    if wc is not None and xc.tracked:
        keeps.append(wc)
    weights = [(weight, width)] if offset is None else [(weight, width), (offset, width)]
    y = t.op(out, width, [xc], keeps=keeps, weights=weights)
    t.drop(xc)
    for copy in (wc, bc):
        if copy is not None:
            t.release(copy)
    return y


def add(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """Add two tensors; the wider type wins, and the narrower one's gradient is cast."""
    return t.op(a.features, max(a.itemsize, b.itemsize), [a, b], passes_gradient=True)


def multiply(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """Multiply element by element; each factor is kept for the other's gradient."""
    keeps = ([b.storage] if a.tracked else []) + ([a.storage] if b.tracked else [])
    return t.op(a.features, max(a.itemsize, b.itemsize), [a, b], keeps=keeps)


def normalize(t: Tape, x: Tensor, kind: Norm, *, trainable: bool, repeats: int = 1) -> Tensor:
    """Run a normalisation; `repeats` heads of `x.features / repeats` elements share one weight.

    Args:
        t: The tape.
        x: Its input.
        kind: Layer norm; RMS norm as in Llama; RMS norm as in Gemma (weight multiplied in float32).
        trainable: Whether its weight gets a gradient.
        repeats: Groups of features that are normalised alone.
    """
    if kind == "layer":
        return _layer_norm(t, x, trainable=trainable)
    wide = t.cast(x, 4)
    square = t.op(wide.features, 4, [wide], keeps=[wide.storage], scratch=t.size_of(wide))
    mean = t.op(repeats, 4, [square])
    t.drop(square)
    shifted = t.op(repeats, 4, [mean], passes_gradient=True)
    t.drop(mean)
    inverse = t.op(repeats, 4, [shifted], keeps_output=True)
    t.drop(shifted)
    h = t.op(
        wide.features,
        4,
        [wide, inverse],
        keeps=[wide.storage, inverse.storage] if wide.tracked else [],
        scratch=t.size_of(wide),
    )
    t.drop(wide, inverse)
    scaled = _scale(t, h, x, kind, trainable=trainable, features=x.features // repeats)
    t.drop(h)
    return scaled


def _scale(t: Tape, h: Tensor, x: Tensor, kind: Norm, *, trainable: bool, features: int) -> Tensor:
    weight = t.parameter(features, trainable=trainable)
    narrow = t.cast(h, 4 if kind == "rms_gemma" else x.itemsize)
    width = max(narrow.itemsize, t.weight_bytes)
    keeps = [narrow.storage] if trainable else []
    shift = None
    if kind == "rms_gemma":  # 1 + weight is a new tensor, kept for the input's gradient
        shift = t.allocate(Bytes(4 * features))
        if narrow.tracked:
            keeps.append(shift)
    scratch = t.size(h.features, width) if trainable else NOTHING
    out = t.op(h.features, width, [narrow], keeps=keeps, weights=[(weight, t.weight_bytes)], scratch=scratch)
    t.drop(narrow)
    if shift is not None:
        t.release(shift)
    if kind != "rms_gemma" or out.itemsize == x.itemsize:
        return out
    result = t.cast(out, x.itemsize)
    t.drop(out)
    return result


def _layer_norm(t: Tape, x: Tensor, *, trainable: bool) -> Tensor:
    weights = [(t.parameter(x.features, trainable=trainable), t.weight_bytes) for _ in range(2)]
    wide = t.cast(x, 4 if t.autocast and not t.cpu else x.itemsize)
    # mean and reciprocal deviation of each token; the CPU kernel keeps them in the weights' type
    stats = t.allocate(t.size(2, t.weight_bytes if t.cpu else 4))
    y = t.op(x.features, wide.itemsize, [wide], keeps=[wide.storage, stats], weights=weights)
    t.drop(wide)
    t.release(stats)
    return y


def activate(t: Tape, x: Tensor, kind: Activation) -> Tensor:
    """Run an activation function."""
    f, w = x.features, x.itemsize
    if kind == "relu":
        return t.op(f, w, [x], keeps_output=True)
    if kind == "quick_gelu":  # x * sigmoid(1.702 x)
        scaled = t.op(f, w, [x])
        gate = t.op(f, w, [scaled], keeps_output=True)
        t.drop(scaled)
        y = multiply(t, x, gate)
        t.drop(gate)
        return y
    if kind == "gelu_new":
        return _gelu_new(t, x)
    return t.op(f, w, [x], keeps=[x.storage])


def _gelu_new(t: Tape, x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(c (x + 0.044715 x^3))), operation by operation."""
    f = x.features
    half = t.op(f, x.itemsize, [x])
    cube = t.op(f, 4 if t.autocast else x.itemsize, [x], keeps=[x.storage])
    weighted = t.op(f, cube.itemsize, [cube])
    inner = add(t, x, weighted)
    t.drop(cube, weighted)
    scaled = t.op(f, inner.itemsize, [inner])
    tanh = t.op(f, scaled.itemsize, [scaled], keeps_output=True)
    t.drop(inner, scaled)
    gate = t.op(f, tanh.itemsize, [tanh], passes_gradient=True)
    y = multiply(t, half, gate)
    t.drop(half, tanh, gate)
    return y


def rotate(t: Tape, x: Tensor, *, table_bytes: int, keeps_type: bool = False) -> Tensor:
    """Rotate queries or keys by their positions.

    Args:
        t: The tape.
        x: Queries or keys.
        table_bytes: Bytes an element of the cosine and sine tables, which are kept once a model.
        keeps_type: Compute in float32 and cast back, as Qwen's vision encoder does.
    """
    source = t.cast(x, 4) if keeps_type else t.cast(x, x.itemsize)
    width = max(source.itemsize, table_bytes)
    straight = t.op(x.features, width, [source], scratch=NOTHING)
    half = t.allocate(t.size(x.features // 2, source.itemsize))
    turned = t.op(x.features, source.itemsize, [source], scratch=t.size_of(source))
    t.release(half)
    crossed = t.op(x.features, width, [turned])
    y = add(t, straight, crossed)
    t.drop(source, straight, turned, crossed)
    result = t.cast(y, x.itemsize if keeps_type else y.itemsize)
    t.drop(y)
    return result


def repeat_heads(t: Tape, x: Tensor, features: int) -> Tensor:
    """Copy each key or value head for its group of query heads."""
    if features == x.features:
        x.storage.users += 1
        return x
    return t.op(features, x.itemsize, [x], scratch=NOTHING)
