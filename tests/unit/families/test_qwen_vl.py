"""M-RoPE positions against the transformers classes' own, sample by sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.family_models import model_of, packs_of
from vlmpack.families.qwen_vl import mrope_positions

IMAGE = 9
PARTS = st.lists(
    st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 4), st.integers(1, 4))), min_size=1, max_size=6
)
"""A number: so many tokens of text; a pair: an image of so many merged rows and columns."""


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@given(parts=PARTS)
@settings(max_examples=60)
def test_positions_are_those_of_get_rope_index(name, parts):
    ids: list[int] = []
    grids = []
    for part in parts:
        if isinstance(part, int):
            ids += [1] * part
        else:
            ids += [2] + [IMAGE] * part[0] * part[1]  # two images never touch: each has its start token
            grids.append(part)
    tokens = torch.tensor([ids])
    expected, _ = model_of(name).model.get_rope_index(
        tokens,
        (tokens == IMAGE).int(),
        image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
        if grids
        else None,
    )
    ours = mrope_positions((tokens[0] == IMAGE).numpy(), grids)
    assert ours.tolist() == expected[:, 0].tolist()


def test_a_row_restarts_all_axes_in_each_sample_and_leaves_padding_at_0():
    # Sample 3 has an image of 2 x 2 patches, one image token; sample 4 is text.
    from tests.family_models import collator_of

    packs = packs_of("qwen2_vl", [[3, 4]], append_pad=True)
    batch = collator_of("qwen2_vl", len(packs[0]) + 2)(packs)
    first = packs[0].costs[0].num_tokens - 1
    positions = batch["position_ids"][:, 0]
    assert positions[:, 0].tolist() == [0] * 4
    assert positions[:, first].tolist() == [0] * 4  # the pad that is appended to sample 3
    assert positions[:, first + 1 : first + 4].tolist() == [[0, 1, 2]] * 4
    assert positions[:, -2:].tolist() == [[0, 0]] * 4
