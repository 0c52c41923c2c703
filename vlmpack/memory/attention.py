"""What the attention kernels keep for backward: a log-sum-exp a head, or the whole matrix.

Fused kernels (flash, memory-efficient, flex) keep queries, keys, values, output and 4 bytes a head and
token. Eager attention keeps the probabilities, twice where the softmax runs in float32: 6 bytes times
heads times span for each token under autocast, instead of 4 bytes times heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmpack.memory.ops import repeat_heads
from vlmpack.memory.tape import NOTHING, Bytes, Tensor

if TYPE_CHECKING:
    from vlmpack.memory.ops import Kernel
    from vlmpack.memory.tape import Storage, Tape


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """How one layer attends."""

    heads: int
    """Query heads."""
    kernel: Kernel
    """The kernel that runs."""
    span: int
    """Keys that one query sees at most: patches of a tile or a window, positions of a sequence."""
    repeat_keys: bool = False
    """Copy keys and values to all query heads first; always so in eager attention and under a mask."""
    mask_per_row: int = 0
    """Elements of an additive mask that the kernel keeps in every layer, a row."""
    mask_promotes: bool = False
    """The mask is float32 and makes the scores float32 (the reference pipeline's eager attention)."""
    causal_mask_bytes: int = 0
    """Bytes of a boolean mask that `masked_fill` keeps in every layer."""
    float_softmax: bool = True
    """Run the softmax in float32 whatever the scores' type, as transformers' eager attention does."""
    pieces: bool = False
    """Attend image by image and concatenate: the kernel's outputs are kept beside the concatenation."""


def attend(t: Tape, q: Tensor, k: Tensor, v: Tensor, how: Attention) -> Tensor:
    """Run attention and return its output, laid out for the output projection.

    Args:
        t: The tape.
        q: Queries, `heads * head_dim` features.
        k: Keys, of the key heads only.
        v: Values, of the key heads only.
        how: The kernel and its mask.
    """
    repeated = [repeat_heads(t, x, q.features) if how.repeat_keys else t.cast(x, x.itemsize) for x in (k, v)]
    width = t.compute_bytes if t.autocast else q.itemsize
    parts = [t.cast(x, width) for x in (q, *repeated)]
    t.drop(*repeated)
    run = {"eager": _eager, "math": _math}.get(how.kernel, _fused)
    out = run(t, parts, how)
    t.drop(*parts)
    if how.pieces:
        joined = t.op(out.features, out.itemsize, [out], passes_gradient=True)
        t.drop(out)
        return joined
    return out


def _log_sums(t: Tape, how: Attention) -> Storage:
    """Allocate the log-sum-exps: float32 a head and token; the efficient kernel pads rows to 32."""
    tokens = -(-t.tokens // 32) * 32 if how.kernel == "efficient" and not t.cpu else t.tokens
    return t.allocate(Bytes(0, 4 * how.heads * tokens))


def _other(a: Tensor, b: Tensor) -> list[Storage]:
    """Return what a product keeps: each factor if the other one gets a gradient."""
    return ([b.storage] if a.tracked else []) + ([a.storage] if b.tracked else [])


def _fused(t: Tape, parts: list[Tensor], how: Attention) -> Tensor:
    q, k, _ = parts
    sums = _log_sums(t, how)
    # the random state that dropout would need: 2 or 3 numbers of 8 bytes
    state = t.allocate(Bytes(0 if t.cpu else 24 if how.kernel == "flash" else 16))
    mask = t.allocate(Bytes(0, how.mask_per_row * q.itemsize)) if how.mask_per_row else None
    scratch = NOTHING
    if (
        how.kernel in {"flash", "flex"} and not t.cpu
    ):  # float32 sum of dq, and dk, dv before their heads are added
        grouped = 2 if k.features != q.features else 0
        scratch = t.size(q.features, 4) + t.size(q.features * grouped, q.itemsize)
    keeps = [x.storage for x in parts] + [sums, state] + ([mask] if mask else [])
    out = t.op(q.features, q.itemsize, parts, keeps=keeps, keeps_output=True, scratch=scratch)
    for storage in (sums, state, mask):
        if storage is not None:
            t.release(storage)
    return out


def _eager(t: Tape, parts: list[Tensor], how: Attention) -> Tensor:
    q, k, v = parts
    scores_features = how.heads * how.span
    scores = t.op(scores_features, q.itemsize, [q, k], keeps=_other(q, k))
    scaled = t.op(scores_features, q.itemsize, [scores])
    t.drop(scores)
    if how.causal_mask_bytes:
        fill = t.allocate(Bytes(how.causal_mask_bytes))
        filled = t.op(scores_features, q.itemsize, [scaled], keeps=[fill])
        t.drop(scaled)
        t.release(fill)
        scaled = filled
    if how.mask_per_row:
        width = 4 if how.mask_promotes else q.itemsize
        masked = t.op(scores_features, width, [scaled], passes_gradient=True)
        t.drop(scaled)
        scaled = masked
    wide = t.cast(scaled, 4 if how.float_softmax or t.autocast else q.itemsize)
    probabilities = t.op(scores_features, wide.itemsize, [wide], keeps_output=True)
    t.drop(scaled, wide)
    narrow = t.cast(probabilities, q.itemsize)
    t.drop(probabilities)
    mixed = t.op(q.features, q.itemsize, [narrow, v], keeps=_other(narrow, v))
    t.drop(narrow)
    out = t.op(q.features, q.itemsize, [mixed])
    t.drop(mixed)
    return out


def _math(t: Tape, parts: list[Tensor], how: Attention) -> Tensor:
    """PyTorch's reference kernel: float32 copies of everything, scaled queries and keys."""
    q, k, v = [t.cast(x, 4) for x in parts]
    scaled = [t.op(x.features, 4, [x]) for x in (q, k)]
    t.drop(q, k)
    scores = t.op(how.heads * how.span, 4, scaled, keeps=_other(*scaled))
    t.drop(*scaled)
    if how.mask_per_row:
        masked = t.op(scores.features, 4, [scores], passes_gradient=True)
        t.drop(scores)
        scores = masked
    probabilities = t.op(scores.features, 4, [scores], keeps_output=True)
    t.drop(scores)
    mixed = t.op(q.features, 4, [probabilities, v], keeps=_other(probabilities, v))
    t.drop(probabilities, v)
    narrow = t.cast(mixed, parts[0].itemsize)
    t.drop(mixed)
    out = t.op(narrow.features, narrow.itemsize, [narrow])
    t.drop(narrow)
    return out
