"""The parts of a vision-language model as programs for the tape: stem, blocks, neck, head.

pixels -> stem -> vision blocks -> neck (last norm, connector) -> image tokens
tokens -> embedding, merge -> language blocks -> head (last norm, logits, loss)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from vlmpack.memory.attention import Attention, attend
from vlmpack.memory.ops import Adapter, activate, add, linear, multiply, normalize, rotate
from vlmpack.memory.tape import Tape

if TYPE_CHECKING:
    from vlmpack.memory.model_shape import LanguageShape, VisionShape
    from vlmpack.memory.ops import Activation
    from vlmpack.memory.tape import BlockMemory, Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """The part of a regime that a block's program sees."""

    weight_bytes: int = 4
    compute_bytes: int = 4
    gradient_bytes: int = 4
    accumulating: bool = False
    cpu: bool = False

    def tape(self, tokens: int, *, grad_enabled: bool = True) -> Tape:
        """Return an empty tape for rows of this many tokens."""
        return Tape(
            tokens=tokens,
            weight_bytes=self.weight_bytes,
            compute_bytes=self.compute_bytes,
            gradient_bytes=self.gradient_bytes,
            grad_enabled=grad_enabled,
            accumulating=self.accumulating,
            cpu=self.cpu,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What of a part is trained, and whether its input gets a gradient."""

    weights: bool = True
    input: bool = True
    adapter: Adapter | None = None
    adapter_targets: str = ""

    def adapter_for(self, layer: str) -> Adapter | None:
        """Return the adapter of a layer, if it has one."""
        return self.adapter if layer in self.adapter_targets.split() else None


@lru_cache(maxsize=512)
def vision_block(v: VisionShape, how: Attention, numerics: Numerics, training: Training) -> BlockMemory:
    """Return what one block of the vision encoder costs; a row is a tile."""
    grad = training.weights or training.input
    t = numerics.tape(v.tokens_per_tile, grad_enabled=grad)
    width = numerics.compute_bytes if v.narrow_stream else numerics.weight_bytes
    x = t.input(v.hidden, width, tracked=training.input)
    normed = normalize(t, x, v.norm, trainable=training.weights)
    q, k, value = _vision_heads(t, v, normed, training)
    t.drop(normed)
    attended = attend(t, q, k, value, how)
    t.drop(q, k, value)
    projected = linear(t, attended, v.hidden, bias=v.attention_bias, trainable=training.weights)
    t.drop(attended)
    middle = add(t, x, projected)
    t.drop(projected)
    normed = normalize(t, middle, v.norm, trainable=training.weights)
    moved = _mlp(
        t, normed, v.intermediate, v.hidden, v.activation, gated=v.gated, bias=v.mlp_bias, training=training
    )
    t.drop(normed)
    y = add(t, middle, moved)
    t.drop(middle, moved)
    return t.finish(x, y)


def _vision_heads(t: Tape, v: VisionShape, x: Tensor, training: Training) -> list[Tensor]:
    d, bias, trainable = v.hidden, v.attention_bias, training.weights
    if v.fused_qkv:
        joined = linear(t, x, 3 * d, bias=bias, trainable=trainable)
        heads = t.split(joined, [d, d, d])
    else:
        heads = [linear(t, x, d, bias=bias, trainable=trainable) for _ in range(3)]
    if not v.rotary:
        return heads
    q, k, value = heads
    turned = [rotate(t, part, table_bytes=4, keeps_type=True) for part in (q, k)]
    t.drop(q, k)
    return [*turned, value]


def _mlp(
    t: Tape,
    x: Tensor,
    hidden: int,
    out: int,
    activation: Activation,
    *,
    gated: bool,
    bias: bool,
    training: Training,
) -> Tensor:
    def layer(source: Tensor, width: int, name: str) -> Tensor:
        return linear(
            t, source, width, bias=bias, trainable=training.weights, adapter=training.adapter_for(name)
        )

    first = layer(x, hidden, "gate" if gated else "up")
    active = activate(t, first, activation)
    t.drop(first)
    if gated:
        up = layer(x, hidden, "up")
        product = multiply(t, active, up)
        t.drop(active, up)
        active = product
    y = layer(active, out, "down")
    t.drop(active)
    return y


@lru_cache(maxsize=512)
def language_block(
    m: LanguageShape, tokens: int, how: Attention, numerics: Numerics, training: Training
) -> BlockMemory:
    """Return what one block of the language model costs; a row is a sequence of `tokens` positions."""
    grad = training.weights or training.input or training.adapter is not None
    t = numerics.tape(tokens, grad_enabled=grad)
    x = t.input(m.hidden, numerics.weight_bytes, tracked=training.input)
    normed = normalize(t, x, m.norm, trainable=training.weights)
    attended = _self_attention(t, m, normed, how, training)
    if m.parallel:
        moved = _language_mlp(t, m, normed, training)
        t.drop(normed)
        both = add(t, attended, moved)
        t.drop(attended, moved)
        y = add(t, x, both)
        t.drop(both)
        return t.finish(x, y)
    t.drop(normed)
    middle = _residual(t, m, x, attended, training)
    normed = normalize(t, middle, m.norm, trainable=training.weights)
    moved = _language_mlp(t, m, normed, training)
    t.drop(normed)
    y = _residual(t, m, middle, moved, training)
    t.drop(middle)
    return t.finish(x, y)


def _residual(t: Tape, m: LanguageShape, x: Tensor, branch: Tensor, training: Training) -> Tensor:
    """Add a branch to the residual stream; the branch is normalised first in Gemma."""
    if m.sandwich_norm:
        normed = normalize(t, branch, m.norm, trainable=training.weights)
        t.drop(branch)
        branch = normed
    y = add(t, x, branch)
    t.drop(branch)
    return y


def _language_mlp(t: Tape, m: LanguageShape, x: Tensor, training: Training) -> Tensor:
    return _mlp(
        t, x, m.intermediate, m.hidden, m.activation, gated=m.gated, bias=m.mlp_bias, training=training
    )


def _self_attention(t: Tape, m: LanguageShape, x: Tensor, how: Attention, training: Training) -> Tensor:
    wide, narrow = m.heads * m.head_width, m.kv_heads * m.head_width
    table = t.weight_bytes  # cosine and sine take the residual stream's type
    heads = []
    for name, width, number in (("q", wide, m.heads), ("k", narrow, m.kv_heads), ("v", narrow, m.kv_heads)):
        part = linear(
            t,
            x,
            width,
            bias=m.attention_bias,
            trainable=training.weights,
            adapter=training.adapter_for(name),
        )
        if name != "v" and m.qk_norm:
            normed = normalize(t, part, m.norm, trainable=training.weights, repeats=number)
            t.drop(part)
            part = normed
        heads.append(part)
    q, k, value = heads
    turned = [rotate(t, part, table_bytes=table) for part in (q, k)]
    t.drop(q, k)
    attended = attend(t, turned[0], turned[1], value, how)
    t.drop(*turned, value)
    projected = linear(
        t,
        attended,
        m.hidden,
        bias=m.output_bias,
        trainable=training.weights,
        adapter=training.adapter_for("o"),
    )
    t.drop(attended)
    return projected
