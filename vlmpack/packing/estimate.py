"""Estimate: about how many packs a pass has, from some of its rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmpack.samples import Refusal, Sample

if TYPE_CHECKING:
    from vlmpack.packing.stream import StreamPacker
    from vlmpack.stages.admit import Admission


def estimate_num_packs(source: Any, admit: Admission, packer: StreamPacker, max_rows: int) -> int:
    """Return about how many packs a pass has. O(max_rows).

    Args:
        source: Samples by row number.
        admit: The limits that each sample must keep.
        packer: A new one.
        max_rows: Rows to read, spread evenly over the data.

    Raises:
        TypeError: If the data set is a stream, whose length nobody knows.
    """
    num_rows = getattr(source, "num_rows", None)
    if num_rows is None:
        raise TypeError("a streaming data set has no length, so its packs cannot be counted ahead")
    indices = np.unique(np.linspace(0, num_rows - 1, min(max_rows, num_rows)).astype(int)).tolist()
    num_packs = 0
    for index in indices:
        item = source[index]
        sample = item if isinstance(item, Refusal) else admit(item)
        if isinstance(sample, Sample):
            num_packs += len(packer.push(admit.packed_cost(sample)))
    num_packs += len(packer.flush())
    # 2 % for the packs that workers leave half full at the end of their part.
    return math.ceil(1.02 * num_packs * int(num_rows) / max(len(indices), 1))
