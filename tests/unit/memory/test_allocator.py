"""The allocator's rounding, by hand and against a slow replay written from its description."""

from __future__ import annotations

import pytest

from vlmpack.memory.allocator import expected_slack, replayed_slack

MIB = 2**20


@pytest.mark.parametrize(
    ("sizes", "slack"),
    [
        ([], 0),
        ([1], 511),  # every request is rounded to 512 bytes
        ([512], 0),
        ([MIB // 2, MIB // 2], 0),  # two halves of a 2 MiB segment's first half
        ([20 * MIB], 0),  # a segment of its own
        ([15 * MIB], MIB),  # 16 MiB, of which 1 MiB is too little to split off
        ([15 * MIB - 512], 0),  # more than 1 MiB remains, so it is split off
        ([9 * MIB, 9 * MIB], 0),  # both in a segment of 20 MiB, 2 MiB remain
        ([9 * MIB, 9 * MIB, 2 * MIB], 0),  # and hold a third
        ([9 * MIB, 10 * MIB - 512], 0),  # 1 MiB + 512 remain: a remainder above 1 MiB is split off
    ],
)
def test_weights_are_rounded_as_the_allocator_does(sizes, slack):
    assert replayed_slack(sizes) == slack


def test_the_reference_models_weights_cost_what_was_traced():
    # traced: 1,860,797,952 bytes handed out for 1,840,456,064; the order of the tensors shifts a little
    from vlmpack.memory import PRESETS, TrainingRegime
    from vlmpack.memory.chain import build_chain

    weights = build_chain(PRESETS["nanovlm-460m"], TrainingRegime(), 4096).weights
    assert replayed_slack(4 * w.elements for _, w in weights) == pytest.approx(
        1_860_797_952 - 1_840_456_064, rel=0.1
    )


@pytest.mark.parametrize(
    ("size", "slack"),
    [(1, 511), (MIB, 0), (7 * MIB + 100, 0), (15 * MIB, MIB), (16 * MIB, 0), (33 * MIB, MIB), (30 * MIB, 0)],
)
def test_activations_lose_what_their_segment_has_left(size, slack):
    assert expected_slack(size) == slack
