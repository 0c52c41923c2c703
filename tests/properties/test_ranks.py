"""Ranks in index mode: every sample once, as many batches for each, and a run that resumes anywhere."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
from hypothesis import event, given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from vlmpack.ranks import PackLoader


class MadePacks(Dataset):
    """Packs as the loader sees them: where each begins, what samples load; a pack is its samples' places."""

    def __init__(self, sizes, seed):
        self.index = SimpleNamespace(digest=f"{sizes} {seed}")
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.num_samples = int(self.starts[-1])
        self._loads = np.random.default_rng(seed).integers(0, 1 << 20, (self.num_samples, 2))

    def load_prefix(self):
        return np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(self._loads, axis=0)])

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, span):
        return list(range(*span))


def made_packs():
    """Packs with enough samples for every number of ranks below, also where few are left of an epoch."""
    sizes = st.integers(1, 90).flatmap(
        lambda count: st.lists(st.integers(1, 6), min_size=count, max_size=count)
    )
    return st.builds(lambda sizes, seed: MadePacks([8, *sizes, 8], seed), sizes, st.integers(0, 9))


def orders():
    """Settings that decide the order."""
    balanced = st.fixed_dictionaries({
        "balance": st.sampled_from(["patches", "attention", "both"]),
        "window": st.one_of(st.none(), st.integers(24, 60)),
        "seed": st.integers(0, 5),
    })
    return st.one_of(balanced, balanced, st.fixed_dictionaries({"seed": st.integers(0, 5)}))


def sizes():
    """Ranks, and packs a batch."""
    return st.tuples(st.integers(1, 4), st.integers(1, 3))


def run(packs, order, size, num_steps, state=None):
    """Return the batches of all ranks, step by step, and the state that they agree on."""
    world_size, batch_size = size
    ranks = [
        PackLoader(packs, batch_size=batch_size, collate_fn=list, rank=rank, world_size=world_size, **order)
        for rank in range(world_size)
    ]
    for rank in ranks:
        if state is not None:
            rank.load_state_dict(json.loads(json.dumps(state)))
    lengths = {len(rank) for rank in ranks}
    assert len(lengths) == 1
    count = min(num_steps, lengths.pop())
    iterators = [iter(rank) for rank in ranks]
    steps = [[next(iterator) for iterator in iterators] for _ in range(count)]
    if count < num_steps:
        assert all(next(iterator, None) is None for iterator in iterators)
    states = [rank.state_dict() for rank in ranks]
    assert all(state == states[0] for state in states)
    return steps, states[0]


def samples_in(steps):
    return sorted(sample for step in steps for batch in step for pack in batch for sample in pack)


ALL = 1 << 30


@given(packs=made_packs(), order=orders(), size=sizes())
def test_every_sample_comes_once_and_each_step_has_as_many_packs_for_each_rank(packs, order, size):
    steps, state = run(packs, order, size, ALL)
    assert samples_in(steps) == list(range(packs.num_samples))
    assert all(len({len(batch) for batch in step}) == 1 for step in steps)
    assert all(len(batch) == size[1] for step in steps[:-1] for batch in step)
    assert (state["epoch"], state["stages"]) == (1, [])
    again, _ = run(packs, order, size, ALL)
    assert again == steps


@given(packs=made_packs(), order=orders(), size=sizes(), stops=st.lists(st.integers(0, 9), max_size=3))
def test_a_run_that_stops_anywhere_goes_on_as_if_it_had_not(packs, order, size, stops):
    whole, _ = run(packs, order, size, ALL)
    got, state = [], None
    for stop in stops:
        steps, state = run(packs, order, size, min(stop, len(whole) - len(got)), state)
        got += steps
    rest, _ = run(packs, order, size, ALL, state)
    assert got + rest == whole


@given(
    packs=made_packs(),
    order=orders(),
    parts=st.lists(st.tuples(sizes(), st.integers(0, 4)), min_size=1, max_size=4),
    last=sizes(),
)
def test_a_run_goes_on_with_other_ranks_and_batches(packs, order, parts, last):
    got, state = [], None
    for size, num_steps in parts:
        left = packs.num_samples - len(samples_in(got))
        if left < 8:
            event("near the end of the epoch")
            break
        steps, state = run(packs, order, size, num_steps, state)
        got += steps
        if state["epoch"]:
            event("an epoch ended")
            assert samples_in(got) == list(range(packs.num_samples))
            return
    if packs.num_samples - len(samples_in(got)) >= last[0]:
        event(f"{len(parts)} parts, balanced: {'balance' in order}")
        rest, state = run(packs, order, last, ALL, state)
        assert samples_in(got + rest) == list(range(packs.num_samples))
        assert (state["epoch"], state["stages"]) == (1, [])
