"""The closed forms against autograd: bytes kept by transformers' own classes, counted by hooks on the CPU.

Two models that differ by one layer give that layer's bytes; the estimator has never seen either figure.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.unit.memory import oracle  # noqa: E402
from vlmpack.memory import ModelShape, TrainingRegime, VisionShape, estimate  # noqa: E402
from vlmpack.memory.attention import Attention  # noqa: E402
from vlmpack.memory.blocks import Numerics, Training, language_block, vision_block  # noqa: E402
from vlmpack.memory.chain import language_attention  # noqa: E402
from vlmpack.memory.ops import Adapter  # noqa: E402
from vlmpack.memory.sections import read_language  # noqa: E402

SIZES = [
    {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4},
    {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6},
]
TEXT_SIZES = [
    {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    {
        "vocab_size": 53,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
]
ROWS, TOKENS = 2, 24
WIDTHS = pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "amp"])
KERNELS = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def numerics(autocast: bool) -> Numerics:
    return Numerics(compute_bytes=2 if autocast else 4, cpu=True)


def one_layer(bytes_of) -> int:
    """Return what the second of two layers adds."""
    return bytes_of(3) - bytes_of(2)


# ---- vision ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["siglip", "siglip2", "clip"])
@pytest.mark.parametrize("size", SIZES, ids=["64", "48"])
@KERNELS
@WIDTHS
def test_a_vision_layer_keeps_the_bytes_that_autograd_keeps(kind, size, attention, autocast):
    def measured(layers: int) -> int:
        model, inputs = oracle.vision_tower(kind, attention, layers=layers, size=size)
        return oracle.kept_bytes(
            model, lambda: model(**inputs(ROWS)).last_hidden_state.sum(), autocast=autocast
        )

    shape = VisionShape(
        layers=2,
        hidden=size["hidden_size"],
        intermediate=size["intermediate_size"],
        heads=size["num_attention_heads"],
        patch_size=16,
        tile_size=64,
        class_token=kind == "clip",
        activation="quick_gelu" if kind == "clip" else "gelu_tanh",
    )
    how = Attention(
        heads=shape.heads, kernel="eager" if attention == "eager" else "flash", span=shape.tokens_per_tile
    )
    block = vision_block(shape, how, numerics(autocast), Training())
    assert block.saved.at(ROWS) == one_layer(measured)


def test_a_recomputed_vision_layer_keeps_its_input_only():
    def measured(layers: int) -> int:
        model, inputs = oracle.vision_tower("siglip", "sdpa", layers=layers, size=SIZES[0])
        model.activation_checkpointing_enable()
        return oracle.kept_bytes(model, lambda: model(**inputs(ROWS)).last_hidden_state.sum(), autocast=False)

    # 2 tiles * 16 patches * 64 features * 4 bytes
    assert one_layer(measured) == 2 * 16 * 64 * 4


# ---- language ----------------------------------------------------------------------------------
def language_bytes(kind, size, attention, autocast, *, packed=False, recompute=False, layers=2, prepare=None):
    model = oracle.language_model(kind, attention, layers=layers, size=size)
    if recompute:
        model.activation_checkpointing_enable()
    if prepare is not None:
        prepare(model)
    ids = torch.randint(0, size["vocab_size"], (ROWS, TOKENS))
    positions = torch.arange(TOKENS // 2).repeat(2)[None].expand(ROWS, -1) if packed else None
    return oracle.kept_bytes(
        model,
        lambda: model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss,
        autocast=autocast,
        ignore=[ids],
    )


def language_shape(kind, size):
    return read_language({**size, "num_hidden_layers": 2}, kind, tied=None)


def language_kernel(shape, attention, *, packed=False):
    regime = TrainingRegime(
        attention="eager" if attention == "eager" else "sdpa", mask="packed" if packed else "none"
    )
    return language_attention(shape, regime, TOKENS, cpu=True)


CASES = [
    ("llama", TEXT_SIZES[0]),
    ("llama", TEXT_SIZES[1]),
    ("mistral", TEXT_SIZES[0]),
    ("qwen2", TEXT_SIZES[0]),
    ("qwen3", {**TEXT_SIZES[0], "head_dim": 32}),
    ("gemma3_text", {**TEXT_SIZES[0], "head_dim": 32}),
]


@pytest.mark.parametrize(("kind", "size"), CASES)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@KERNELS
@WIDTHS
def test_a_language_layer_keeps_the_bytes_that_autograd_keeps(kind, size, packed, attention, autocast):
    shape = language_shape(kind, size)
    if kind == "gemma3_text" and not packed:
        # text alone has no dense mask, unlike Gemma with pictures
        from dataclasses import replace

        shape = replace(shape, dense_mask=False)
    how = language_kernel(shape, attention, packed=packed)
    block = language_block(shape, TOKENS, how, numerics(autocast), Training())
    measured = one_layer(
        lambda layers: language_bytes(kind, size, attention, autocast, packed=packed, layers=layers)
    )
    assert block.saved.at(ROWS) == measured


@pytest.mark.parametrize("size", TEXT_SIZES, ids=["grouped", "all-heads"])
def test_the_reference_kernel_keeps_the_bytes_that_autograd_keeps(size):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = language_shape("llama", size)
    how = language_attention(shape, TrainingRegime(autocast=None, attention="math"), TOKENS, cpu=True)
    block = language_block(shape, TOKENS, how, numerics(False), Training())
    with sdpa_kernel(SDPBackend.MATH):
        measured = one_layer(lambda n: language_bytes("llama", size, "sdpa", False, layers=n))
    assert block.saved.at(ROWS) == measured


@WIDTHS
def test_a_recomputed_language_layer_keeps_its_input_only(autocast):
    measured = one_layer(
        lambda layers: language_bytes("llama", TEXT_SIZES[0], "sdpa", autocast, recompute=True, layers=layers)
    )
    # 2 rows * 24 positions * 64 features * 4 bytes: autocast leaves the residual stream in float32
    assert measured == 2 * 24 * 64 * 4


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("q v", ("q_proj", "v_proj")),
        ("q k v o", ("q_proj", "k_proj", "v_proj", "o_proj")),
        (
            "q k v o gate up down",
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ),
    ],
)
@WIDTHS
def test_adapters_keep_the_bytes_that_autograd_keeps(targets, names, autocast):
    size = TEXT_SIZES[0]
    shape = language_shape("llama", size)
    training = Training(weights=False, input=True, adapter=Adapter(4, 4), adapter_targets=targets)
    block = language_block(shape, TOKENS, language_kernel(shape, "sdpa"), numerics(autocast), training)
    measured = one_layer(
        lambda layers: language_bytes(
            "llama",
            size,
            "sdpa",
            autocast,
            layers=layers,
            prepare=lambda model: oracle.adapt(model, names, 4),
        )
    )
    assert block.saved.at(ROWS) == measured


# ---- whole models ------------------------------------------------------------------------------
def check_whole_model(family: str, attention: str, autocast: bool) -> None:
    tiny = oracle.FAMILIES[family](attention)
    measured = oracle.whole_model_bytes(tiny, autocast=autocast)
    shape = ModelShape.from_config(tiny.model.config, tile_size=tiny.tile_size)
    regime = TrainingRegime(
        autocast="bf16" if autocast else None, attention="eager" if attention == "eager" else "sdpa"
    )
    predicted = estimate(shape, regime, cpu=True, **tiny.load).saved_bytes
    assert abs(predicted - measured) <= 0.001 * measured
    assert shape.num_parameters == sum(p.numel() for p in tiny.model.parameters())


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_a_whole_model_keeps_the_bytes_that_autograd_keeps(family):
    check_whole_model(family, "sdpa", False)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(oracle.FAMILIES))
@KERNELS
@WIDTHS
def test_every_family_keeps_the_bytes_that_autograd_keeps(family, attention, autocast):
    check_whole_model(family, attention, autocast)


def test_a_frozen_vision_encoder_keeps_nothing():
    tiny = oracle.idefics3("sdpa")
    tiny.model.model.vision_model.requires_grad_(False)
    measured = oracle.whole_model_bytes(tiny, autocast=False)
    shape = ModelShape.from_config(tiny.model.config)
    regime = TrainingRegime(autocast=None, frozen=("vision",))
    predicted = estimate(shape, regime, cpu=True, **tiny.load)
    assert abs(predicted.saved_bytes - measured) <= 0.001 * measured
    assert predicted.components["vision"] == 0


def test_a_recomputed_model_keeps_inputs_and_logits():
    tiny = oracle.idefics3("sdpa")
    tiny.model.activation_checkpointing_enable()
    measured = oracle.whole_model_bytes(tiny, autocast=False)
    shape = ModelShape.from_config(tiny.model.config)
    regime = TrainingRegime(autocast=None, checkpoint_vision=True, checkpoint_language=True)
    predicted = estimate(shape, regime, cpu=True, **tiny.load).saved_bytes
    # checkpointing holds the cosine and sine tables in a closure, which the hooks do not see:
    # 2 tables * 96 positions * 16 features a head * 4 bytes
    assert abs(predicted - (measured + 2 * 96 * 16 * 4)) <= 0.001 * measured
