"""The tape's bookkeeping, and the closed forms that it gives for the common blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlmpack.memory.attention import Attention
from vlmpack.memory.blocks import Numerics, Training, language_block, vision_block
from vlmpack.memory.ends import head, vision_stem
from vlmpack.memory.model_shape import LanguageShape, VisionShape
from vlmpack.memory.ops import add, linear
from vlmpack.memory.tape import Bytes, Tape, highest

AMP = Numerics(weight_bytes=4, compute_bytes=2)
FP32 = Numerics()
BF16 = Numerics(weight_bytes=2, compute_bytes=2, gradient_bytes=2)

# SigLIP-B: hidden 768, MLP 3072, 12 heads, 1,024 patches; SmolLM2-360M: 960, 2560, 15 heads, 5 key heads
EYES = VisionShape(layers=12, hidden=768, intermediate=3072, heads=12, patch_size=16, tile_size=512)
TEXT = LanguageShape(layers=32, hidden=960, intermediate=2560, heads=15, kv_heads=5, vocab=49218)


def per_token(block, tokens):
    assert block.saved.per_row % tokens == 0
    return block.saved.per_row // tokens


# ---- bookkeeping -------------------------------------------------------------------------------
def test_amounts_are_affine_in_rows():
    # 7 + 3 * 5 = 22
    assert Bytes(7, 3).at(5) == 22
    assert Bytes(7, 3) + Bytes(1, 1) == Bytes(8, 4)
    assert Bytes(7, 3) * 2 == Bytes(14, 6)


def test_the_envelope_drops_amounts_that_another_exceeds_everywhere():
    low, steep, high = Bytes(0, 1), Bytes(0, 5), Bytes(100, 0)
    assert set(highest([low, steep, high])) == {steep, high}


def test_a_linear_layer_keeps_its_input_and_hands_back_two_gradients():
    tape = Tape(tokens=10)
    x = tape.input(8, 4, tracked=True)
    y = linear(tape, x, 16, bias=False, trainable=True)
    result = tape.finish(x, y)
    assert result.saved == Bytes(0, 10 * 8 * 4)  # the input
    assert result.gradients == 8 * 16 * 4
    assert result.input_gradient == Bytes(0, 10 * 8 * 4)
    # backward: kept input 320 + incoming 640 + new 320, and the weight's gradient of 512
    assert result.backward == (Bytes(512, 320 + 640 + 320),)


def test_a_frozen_linear_layer_keeps_nothing():
    tape = Tape(tokens=10)
    x = tape.input(8, 4, tracked=True)
    result = tape.finish(x, linear(tape, x, 16, bias=True, trainable=False))
    assert result.saved == Bytes()
    assert result.gradients == 0


def test_autocast_keeps_the_weights_copy_too():
    tape = Tape(tokens=10, weight_bytes=4, compute_bytes=2)
    x = tape.input(8, 4, tracked=True)
    result = tape.finish(x, linear(tape, x, 16, bias=False, trainable=True))
    # the input in 2 bytes, and 8 * 16 weights in 2 bytes
    assert result.saved == Bytes(8 * 16 * 2, 10 * 8 * 2)
    assert result.cached_casts == 8 * 16 * 2


def test_without_gradients_nothing_is_kept():
    tape = Tape(tokens=10, grad_enabled=False)
    x = tape.input(8, 4, tracked=True)
    result = tape.finish(x, linear(tape, x, 16, bias=True, trainable=True))
    assert result.saved == Bytes()
    assert result.backward == (Bytes(),)


def test_a_residual_sum_shares_the_incoming_gradient():
    tape = Tape(tokens=1)
    x = tape.input(4, 4, tracked=True)
    y = linear(tape, x, 4, bias=False, trainable=False)
    total = add(tape, x, y)
    tape.drop(y)
    result = tape.finish(x, total)
    # the sum's gradient (16 bytes) is both branches' gradient; the layer adds its own 16
    assert result.backward == (Bytes(0, 32),)


def test_gradients_that_exist_already_make_new_ones_temporary():
    def run(accumulating: bool) -> Bytes:
        tape = Tape(tokens=1, accumulating=accumulating)
        x = tape.input(4, 4, tracked=True)
        tape.finish(x, linear(tape, x, 4, bias=False, trainable=True))
        return tape.live

    assert run(False) == Bytes(4 * 4 * 4, 16)
    assert run(True) == Bytes(0, 16)


# ---- closed forms, bytes a token ---------------------------------------------------------------
VISION_FORMS = [
    # d = 768, f = 3072, h = 12, S = 1024; d, f and the 4 bytes a head as counted on real kernels
    (AMP, True, "flash", 20 * 768 + 4 * 3072 + 4 * 12 + 16),  # 27,712
    (AMP, False, "flash", 24 * 768 + 4 * 3072 + 4 * 12 + 16),  # 30,784
    (AMP, False, "eager", 24 * 768 + 4 * 3072 + 6 * 12 * 1024 + 16),  # 104,464
    (BF16, False, "flash", 16 * 768 + 4 * 3072 + 4 * 12 + 16),  # 24,640
    (BF16, False, "eager", 16 * 768 + 4 * 3072 + 6 * 12 * 1024 + 16),  # 98,320
    (FP32, False, "flash", 32 * 768 + 8 * 3072 + 4 * 12 + 16),  # 49,216
    (FP32, True, "eager", 32 * 768 + 8 * 3072 + 4 * 12 * 1024 + 16),  # 98,320
]


@pytest.mark.parametrize(("numerics", "fused", "kernel", "expected"), VISION_FORMS)
def test_a_vision_block_has_the_counted_closed_form(numerics, fused, kernel, expected):
    shape = replace(EYES, fused_qkv=fused)
    block = vision_block(shape, Attention(heads=12, kernel=kernel, span=1024), numerics, Training())
    assert per_token(block, 1024) == expected


LANGUAGE_FORMS = [
    # d = 960, f = 2560, h = 15, k = 5 * 64 = 320, k' = d where keys are copied to all heads
    (AMP, False, 30 * 960 + 8 * 2560 + 4 * 320 + 4 * 15 + 8),  # 50,628
    (AMP, True, 30 * 960 + 8 * 2560 + 4 * 960 + 4 * 15 + 8),  # 53,188
    (BF16, False, 20 * 960 + 8 * 2560 + 4 * 320 + 4 * 15 + 8),  # 41,028
    (FP32, False, 32 * 960 + 16 * 2560 + 8 * 320 + 4 * 15 + 8),  # 74,308
]


@pytest.mark.parametrize(("numerics", "repeat", "expected"), LANGUAGE_FORMS)
def test_a_language_block_has_the_counted_closed_form(numerics, repeat, expected):
    how = Attention(heads=15, kernel="flash", span=4096, repeat_keys=repeat)
    assert per_token(language_block(TEXT, 4096, how, numerics, Training()), 4096) == expected


@pytest.mark.parametrize(("numerics", "each"), [(AMP, 6), (BF16, 6), (FP32, 4)])
def test_eager_attention_keeps_the_whole_matrix(numerics, each):
    fused = Attention(heads=15, kernel="flash", span=512, repeat_keys=True)
    eager = replace(fused, kernel="eager")
    blocks = [language_block(TEXT, 512, how, numerics, Training()) for how in (fused, eager)]
    # instead of 4 bytes a head and token, `each` bytes a head, token and key
    assert per_token(blocks[1], 512) - per_token(blocks[0], 512) == each * 15 * 512 - 4 * 15


def test_weight_casts_are_two_bytes_a_matmul_parameter():
    block = language_block(TEXT, 64, Attention(heads=15, kernel="flash", span=64), AMP, Training())
    # q and o: 960 * 960, k and v: 960 * 320, three MLP matrices of 960 * 2560
    matmul = 2 * 960 * 960 + 2 * 960 * 320 + 3 * 960 * 2560
    assert block.cached_casts == 2 * matmul
    assert block.gradients == 4 * (matmul + 2 * 960)


LOSS_FORMS = [
    # bytes a position and vocabulary entry at the end of forward and at the peak of backward; the logits
    # that the reference loop still holds (2 under autocast) are counted apart
    (AMP, "raw", 8, 10),
    (AMP, "float", 10, 12),
    (BF16, "float", 10, 12),
    (FP32, "float", 8, 12),
]


@pytest.mark.parametrize(("numerics", "loss", "forward", "backward"), LOSS_FORMS)
def test_the_loss_has_the_counted_peaks(numerics, loss, forward, backward):
    block = head(TEXT, 256, loss, 1024, numerics, trainable=True, norm_trainable=True)
    entries = 256 * TEXT.vocab

    def most(lines):
        return max(line.per_row for line in lines) / entries

    # what the norm keeps adds less than half a byte an entry here
    assert forward <= most(block.forward) < forward + 0.5
    assert backward <= most(block.backward) < backward + 0.5


def test_a_chunked_loss_holds_one_chunk_of_logits():
    whole = head(TEXT, 4096, "float", 1024, AMP, trainable=True, norm_trainable=True)
    parts = head(TEXT, 4096, "chunked", 1024, AMP, trainable=True, norm_trainable=True)
    block = 1024 * TEXT.vocab
    assert max(line.at(1) for line in whole.backward) > 4 * 12 * block
    # 14 of its own, and the head's weight gradient: 6 bytes * 960 * vocabulary = 5.6 blocks
    assert max(line.at(1) for line in parts.backward) < 20 * block


def test_the_stem_keeps_autocasts_copy_of_the_pixels():
    # 3 * 512 * 512 pixels in 2 bytes, and the projection's 768 * 768 weights in 2 bytes
    assert vision_stem(EYES, AMP, trainable=True).saved == Bytes(768 * 768 * 2, 3 * 512 * 512 * 2)
    assert vision_stem(EYES, FP32, trainable=True).saved == Bytes()
