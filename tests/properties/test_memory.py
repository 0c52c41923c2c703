"""Estimates and limits hold for any model, regime and load: parts add up, more never needs less."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import assume, event, given
from hypothesis import strategies as st

from vlmpack.errors import ConfigError
from vlmpack.memory import (
    ConnectorShape,
    LanguageShape,
    ModelShape,
    TrainingRegime,
    VisionShape,
    check,
    estimate,
    max_tiles,
    pareto_front,
    replay,
)
from vlmpack.memory.allocator import replayed_slack
from vlmpack.memory.fit_rule import token_bound
from vlmpack.memory.replay import can_replay
from vlmpack.memory.tape import Bytes, highest

MIB = 2**20


@st.composite
def models(draw):
    heads = draw(st.sampled_from([2, 4, 6]))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 3, 6) if heads % n == 0]))
    width = draw(st.sampled_from([8, 16]))
    eyes = draw(st.sampled_from([2, 4]))
    return ModelShape(
        name="any",
        vision=VisionShape(
            layers=draw(st.integers(1, 4)),
            hidden=eyes * 16,
            intermediate=draw(st.integers(8, 128)),
            heads=eyes,
            patch_size=8,
            tile_size=64,
            fused_qkv=draw(st.booleans()),
            gated=draw(st.booleans()),
            norm=draw(st.sampled_from(["layer", "rms"])),
            activation=draw(st.sampled_from(["gelu", "quick_gelu", "silu", "relu"])),
            rotary=draw(st.booleans()),
        ),
        connector=ConnectorShape(
            kind=draw(st.sampled_from(["pixel_shuffle", "mlp", "merger", "linear"])),
            factor=1 if draw(st.booleans()) else 2,
        ),
        language=LanguageShape(
            layers=draw(st.integers(1, 4)),
            hidden=heads * width,
            intermediate=draw(st.integers(8, 128)),
            heads=heads,
            kv_heads=kv_heads,
            vocab=draw(st.integers(16, 512)),
            tied=draw(st.booleans()),
            qk_norm=draw(st.booleans()),
            sandwich_norm=draw(st.booleans()),
            parallel=draw(st.booleans()),
            float_logits=draw(st.booleans()),
        ),
    )


@st.composite
def regimes(draw):
    weights = draw(st.sampled_from(["fp32", "bf16"]))
    return TrainingRegime(
        weights=weights,
        autocast=draw(st.sampled_from(["bf16", None])) if weights == "fp32" else None,
        attention=draw(st.sampled_from(["sdpa", "eager", "flash", "math", "flex"])),
        mask=draw(st.sampled_from(["none", "padding", "packed"])),
        checkpoint_vision=draw(st.booleans()),
        checkpoint_language=draw(st.booleans()),
        vision_sub_batch=draw(st.sampled_from([None, 4])),
        frozen=tuple(draw(st.sets(st.sampled_from(["vision", "connector"])))),
        lora_rank=draw(st.sampled_from([None, 4])),
        lora_targets=draw(st.sampled_from(["qv", "attention", "all"])),
        optimizer=draw(st.sampled_from(["adamw_foreach", "adamw_fused", "adamw_8bit", "sgd"])),
        cross_entropy=draw(st.sampled_from(["full", "chunked", "fused"])),
        accumulation=draw(st.booleans()),
        holds_logits=draw(st.booleans()),
        expandable_segments=draw(st.booleans()),
        workspace_bytes=0,
        context_bytes=0,
    )


@given(models(), regimes(), st.integers(1, 4), st.integers(1, 64), st.integers(0, 12))
def test_parts_are_never_negative_and_add_up(model, regime, rows, tokens, tiles):
    step = estimate(model, regime, rows=rows, tokens_per_row=tokens, tiles=tiles)
    assert step.phases
    for phase in step.phases:
        assert all(size >= 0 for size in phase.parts.values()), phase
        assert phase.total == sum(phase.parts.values())
    assert step.peak_requested == max(phase.total for phase in step.phases)
    assert step.saved_bytes >= 0
    assert step.allocator_bytes >= 0


@given(models(), regimes(), st.integers(1, 4), st.integers(1, 64), st.integers(0, 12), st.data())
def test_a_larger_load_never_needs_less(model, regime, rows, tokens, tiles, data):
    more = {
        "rows": rows + data.draw(st.integers(0, 3)),
        "tokens_per_row": tokens + data.draw(st.integers(0, 32)),
        "tiles": tiles + data.draw(st.integers(0, 8)),
    }
    small = estimate(model, regime, rows=rows, tokens_per_row=tokens, tiles=tiles)
    large = estimate(model, regime, **more)
    assert large.peak_requested >= small.peak_requested


@given(models(), regimes(), st.integers(1, 3), st.integers(8, 64), st.integers(1, 12))
def test_a_replay_asks_for_what_the_closed_form_says(model, regime, rows, tokens, tiles):
    assume(can_replay(regime))
    load = {"rows": rows, "tokens_per_row": tokens, "tiles": tiles}
    run = replay(model, regime, **load)
    assert run.fits
    assert run.peak_requested <= run.peak_allocated <= run.peak_reserved
    # two ways through the same blocks: move by move, and by the points where a peak can lie
    step = estimate(model, regime, **load)
    # (models of half a megabyte: a kilobyte that only one of them counts is a fifth of a percent)
    assert abs(run.peak_requested - step.peak_requested) <= 0.06 * step.peak_requested


@given(models(), regimes(), st.integers(1, 3), st.integers(1, 64), st.integers(0, 12))
def test_recomputing_the_encoder_never_keeps_more(model, regime, rows, tokens, tiles):
    plain = regime.model_copy(update={"checkpoint_vision": False, "vision_sub_batch": None})
    again = plain.model_copy(update={"checkpoint_vision": True})
    load = {"rows": rows, "tokens_per_row": tokens, "tiles": tiles}
    assert estimate(model, again, **load).saved_bytes <= estimate(model, plain, **load).saved_bytes


@given(
    models(),
    regimes(),
    st.integers(0, 110),
    st.integers(0, 4 * MIB),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.03, 0.1]),
)
def test_limits_are_monotone_in_every_argument(model, regime, percent, more, rows, margin):
    tokens = 128

    def needed(tiles, rows=rows):
        return check(
            model, regime, 1, rows=rows, tokens_per_row=tokens, tiles=tiles, margin=margin
        ).required_bytes

    def limit(gpu, margin=margin, rows=rows):
        return max_tiles(model, regime, gpu, rows=rows, tokens_per_row=tokens, margin=margin)

    # a GPU between one that takes text alone and one that takes every tile that the tokens allow
    most = token_bound(model, rows=rows, tokens_per_row=tokens)
    size = needed(0) + (needed(most) - needed(0)) * percent // 100
    found = limit(size)
    event(found.bound)
    assert limit(size + more).tiles >= found.tiles
    assert limit(size, margin=0.0).tiles >= found.tiles
    if rows > 1:
        # fewer rows leave more memory: each of them can hold at least as many tiles
        assert limit(size, rows=rows - 1).tiles // (rows - 1) >= found.tiles // rows
    assert needed(found.tiles) <= size
    assert found.tiles == most or needed(found.tiles + 1) > size
    assert (found.bound == "tokens") == (found.tiles == most)


@given(models(), regimes(), st.integers(4, 512))
def test_a_front_is_a_front(model, regime, mib):
    try:
        front = pareto_front(model, regime, mib * MIB, tokens_per_row=64, max_rows=8)
    except ConfigError:
        assume(False)
    assert front
    for left, right in pairwise(front):
        assert left.rows < right.rows
        assert left.tiles_per_row > right.tiles_per_row
    assert all(point.required_bytes <= mib * MIB for point in front)


@given(st.lists(st.builds(Bytes, st.integers(0, 1000), st.integers(0, 1000)), min_size=1), st.integers(0, 50))
def test_the_envelope_keeps_the_maximum(amounts, rows):
    assert max(b.at(rows) for b in highest(amounts)) == max(b.at(rows) for b in amounts)


@given(st.lists(st.integers(1, 64 * MIB), max_size=40))
def test_slack_is_below_a_mebibyte_a_tensor(sizes):
    slack = replayed_slack(sizes)
    assert 0 <= slack <= len(sizes) * (MIB + 512)
    # the same tensors in the slow way: lists of free pieces, best fit by sorting each time
    assert slack == slow_slack(sizes)


def slow_slack(sizes):
    free = {True: [], False: []}
    handed_out = 0
    for size in sizes:
        need = max(512, (size + 511) // 512 * 512)
        small = need <= MIB
        fitting = sorted(piece for piece in free[small] if piece >= need)
        if fitting:
            piece = fitting[0]
            free[small].remove(piece)
        elif small:
            piece = 2 * MIB
        elif need < 10 * MIB:
            piece = 20 * MIB
        else:
            piece = (need + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
        rest = piece - need
        if (small and rest >= 512) or (not small and rest > MIB):
            free[small].append(rest)
            piece = need
        handed_out += piece
    return handed_out - sum(sizes)
