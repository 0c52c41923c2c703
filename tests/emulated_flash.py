"""Flash attention's two functions in plain torch, so that transformers' own path to them runs without a GPU.

What is under test is which segments reach `flash_attn_varlen_func`, not the kernel.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers import modeling_flash_attention_utils as flash

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
):
    """Attention over [B, T, heads, dim]; every row is one sequence."""
    groups = q.shape[2] // k.shape[2]
    k, v = (part.repeat_interleave(groups, dim=2) for part in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
):  # fmt: skip
    """Attention over [T, heads, dim]; each span between two lengths is one sequence."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    edges = cu_seqlens_q.tolist()
    assert edges[0] == 0
    assert edges[-1] == len(q)
    assert max_seqlen_q == max_seqlen_k == max(stop - start for start, stop in pairwise(edges))
    return torch.cat([
        flash_attn_func(
            *(part[None, start:stop] for part in (q, k, v)), softmax_scale=softmax_scale, causal=causal
        )[0]
        for start, stop in pairwise(edges)
    ])


@contextmanager
def emulated() -> Iterator[None]:
    """Let `flash_attention_2` run on a CPU meanwhile."""
    names = ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn")
    before = [getattr(flash, name, None) for name in names]
    process = flash._lazy_define_process_function(flash_attn_varlen_func)
    values = ("flash_attention_2", flash_attn_func, flash_attn_varlen_func, process)
    for name in ("_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn", "_process_with_kvcache_kwargs_fn"):
        setattr(flash, name, getattr(flash, name, None))
    try:
        for name, value in zip(names, values, strict=True):
            setattr(flash, name, value)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(flash, name, value)


def use_flash(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a model's language model to flash attention, past the check for the package."""
    inner = model.model
    language = getattr(inner, "language_model", None) or inner.text_model
    for module in language.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "flash_attention_2"
    return model
