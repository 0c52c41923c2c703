"""How kernels are compiled."""

from __future__ import annotations

import re

import numba
import numpy as np
import pytest

from vlmpack.kernels import warm_up, window_feed, worst_fit_decreasing
from vlmpack.kernels.compiled import kernel
from vlmpack.packing import StreamPacker

needs_jit = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="there is nothing compiled")


def test_a_kernel_computes_what_its_python_computes():
    @kernel
    def total(values):
        result = 0
        for value in values:
            result += value
        return result

    assert total(np.arange(5)) == 10


@needs_jit
def test_kernels_hand_arrays_on_without_counting_references():
    # Counting halves the speed of the window packer. If numba drops the option, this test says so.
    warm_up()
    functions = [
        text for text in window_feed.inspect_llvm().values() for text in re.split(r"\n(?=define )", text)
    ]
    bodies = [text for text in functions if "window_feed" in text.split("(")[0] and "cpython" not in text]
    assert bodies
    assert not any("NRT_incref" in body for body in bodies)


@needs_jit
def test_after_warming_up_a_stream_compiles_nothing_more():
    warm_up(drop_in=True)
    before = len(window_feed.signatures), len(worst_fit_decreasing.signatures)
    for method in ("balanced", "worst_fit_decreasing"):
        packer = StreamPacker([10, 5, 7], method=method, lookahead=2)
        packer.push((3, 1, 2))
        packer.push((4, 1, 2))
        packer.flush()
    assert (len(window_feed.signatures), len(worst_fit_decreasing.signatures)) == before
