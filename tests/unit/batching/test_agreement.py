"""One process alone agrees with itself; buckets are cut by size and type."""

from __future__ import annotations

import pytest
import torch

from vlmpack.batching import agreement
from vlmpack.batching.agreement import Ranks


def parameters(*sizes: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[torch.nn.Parameter]:
    made = []
    for number, size in enumerate(sizes):
        each = torch.nn.Parameter(torch.zeros(size, dtype=dtypes[number % len(dtypes)]))
        each.grad = torch.full_like(each, float(number + 1))
        made.append(each)
    return made


def test_alone_a_vote_is_ones_own_and_gradients_only_change_by_the_scale():
    ranks, held = Ranks(), parameters(3, 2)
    held[1].grad = None
    verdict = ranks.vote(held, failed=False, not_finite=True, num_items=7.0)
    assert (verdict.num_failed, verdict.num_not_finite, verdict.num_items) == (0, 1, 7.0)
    assert verdict.has_gradient == (True, False)
    ranks.average_gradients(held, verdict.has_gradient, scale=0.5)
    assert held[0].grad.tolist() == [0.5, 0.5, 0.5]
    assert held[1].grad is None
    assert ranks.total([1.0, 2.0]) == [1.0, 2.0]
    ranks.broadcast_buffers(torch.nn.BatchNorm1d(2))


def test_buckets_are_cut_by_size_and_type_and_large_gradients_are_not_copied(monkeypatch):
    summed: list[tuple[int, torch.dtype, bool]] = []
    held = parameters(3, 2, 4, 50, 2, 2, dtypes=(torch.float32, torch.float32, torch.float64))
    places = {each.grad.data_ptr() for each in held}

    def all_reduce(tensor, group=None):
        summed.append((tensor.numel(), tensor.dtype, tensor.data_ptr() in places))
        tensor.mul_(2)  # two ranks with the same gradient

    monkeypatch.setattr(agreement.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(agreement, "BUCKET_BYTES", 40)
    ranks = Ranks()
    ranks.world_size = 2
    ranks.average_gradients(held, [True] * 6)
    # 3 + 2 together; the 4 of float64 wait until the 50, which are large, have gone ahead in place; then the
    # type changes, and changes again
    assert summed == [
        (5, torch.float32, False),
        (50, torch.float32, True),
        (4, torch.float64, True),
        (2, torch.float32, True),
        (2, torch.float64, True),
    ]
    for number, each in enumerate(held):
        assert each.grad.tolist() == pytest.approx([number + 1.0] * each.numel())
