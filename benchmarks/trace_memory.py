"""Trace whole training steps and tile limits into benchmarks/memory_traced.json.

    python -m benchmarks.trace_memory              all cases that the file does not have, about ten minutes
    python -m benchmarks.trace_memory NAME ...     these cases again

The reference model here is written from its description; transformers' side is SigLIP, a pixel shuffle and
Llama. The formulas of vlmpack.memory are not used: this is what they are measured against.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_tracer import MIB, OutOfMemoryError, Tracer, load_fake_cuda

load_fake_cuda()

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

TARGET = Path(__file__).with_name("memory_traced.json")
Case = dict[str, Any]


# ---- the reference model -----------------------------------------------------------------------
class Norm(nn.Module):
    """RMS norm in the input's type."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inverse = torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-5)
        return x * inverse * self.weight


def heads_of(x: torch.Tensor, width: int) -> torch.Tensor:
    """[B, T, D] -> [B, heads, T, width]"""
    return x.view(*x.shape[:2], -1, width).transpose(1, 2)


class EyeBlock(nn.Module):
    """A SigLIP block with one projection for queries, keys and values."""

    def __init__(self, size: Case, eager: bool) -> None:
        super().__init__()
        d = size["hidden"]
        self.width, self.eager = d // size["heads"], eager
        self.before, self.between = nn.LayerNorm(d), nn.LayerNorm(d)
        self.joined, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(
            nn.Linear(d, size["inter"]), nn.GELU(approximate="tanh"), nn.Linear(size["inter"], d)
        )

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads_of(part, self.width) for part in self.joined(x).split(x.shape[-1], dim=2))
        if self.eager:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(self.width))
            y = F.softmax(scores, dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).contiguous().view_as(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.before(x))
        return x + self.mlp(self.between(x))


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate by positions."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)


class TextBlock(nn.Module):
    """A Llama block that copies keys and values to all heads before attention."""

    def __init__(self, size: Case, eager: bool) -> None:
        super().__init__()
        d, f = size["hidden"], size["inter"]
        self.width, self.groups, self.eager = d // size["heads"], size["heads"] // size["kv_heads"], eager
        narrow = size["kv_heads"] * self.width
        self.before, self.between = Norm(d), Norm(d)
        self.q, self.k = nn.Linear(d, d, bias=False), nn.Linear(d, narrow, bias=False)
        self.v, self.o = nn.Linear(d, narrow, bias=False), nn.Linear(d, d, bias=False)
        self.gate, self.up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def attend(self, x: torch.Tensor, tables: Any, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (heads_of(layer(x), self.width) for layer in (self.q, self.k, self.v))
        q, k = turned(q, *tables), turned(k, *tables)
        k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        bias = None
        if mask is not None:
            bias = (1.0 - mask[:, None, None].float()) * torch.finfo(q.dtype).min
        if self.eager:
            y = self.eager_attention(q, k, v, bias)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=True)
        return self.o(y.transpose(1, 2).contiguous().view_as(x))

    def eager_attention(self, q: Any, k: Any, v: Any, bias: torch.Tensor | None) -> torch.Tensor:
        t = q.shape[2]
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.width)
        seen = torch.tril(torch.ones(t, t, device=q.device, dtype=torch.bool)).view(1, 1, t, t)
        scores = scores.masked_fill(~seen, float("-inf"))
        if bias is not None:
            scores = scores + bias
        return F.softmax(scores, dim=-1) @ v

    def forward(self, x: torch.Tensor, tables: Any, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attend(self.before(x), tables, mask)
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Reference(nn.Module):
    """ViT, pixel shuffle, language model, loss on raw logits."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        v, m, eager = case["vit"], case["lm"], case["attn"] == "eager"
        self.case = case
        self.patches = nn.Conv2d(3, v["hidden"], v["patch"], v["patch"])
        self.places = nn.Parameter(torch.zeros(1, (v["image"] // v["patch"]) ** 2, v["hidden"]))
        self.eyes = nn.ModuleList([EyeBlock(v, eager) for _ in range(v["layers"])])
        self.eyes_norm = nn.LayerNorm(v["hidden"])
        self.projector = nn.Linear(v["hidden"] * case["shuffle"] ** 2, m["hidden"], bias=False)
        self.embedding = nn.Embedding(m["vocab"], m["hidden"])
        self.register_buffer("frequencies", torch.ones(m["hidden"] // m["heads"] // 2))
        self.text = nn.ModuleList([TextBlock(m, eager) for _ in range(m["layers"])])
        self.text_norm = Norm(m["hidden"])

    def parts(self) -> dict[str, list[nn.Parameter]]:
        vision = [*self.patches.parameters(), self.places, *self.eyes.parameters()]
        language = [*self.embedding.parameters(), *self.text.parameters(), *self.text_norm.parameters()]
        return {
            "vit": [*vision, *self.eyes_norm.parameters()],
            "mp": list(self.projector.parameters()),
            "lm": language,
        }

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.places
        for block in self.eyes:
            x = checkpoint(block, x, use_reentrant=False) if self.case["ckpt_vit"] else block(x)
        return self.projector(shuffled(self.eyes_norm(x), self.case["shuffle"]))

    @torch.no_grad()
    def tables(self, rows: int, tokens: int) -> Any:
        places = torch.arange(tokens, device="cuda").unsqueeze(0).expand(rows, -1)
        angles = (places.reshape(-1).float()[:, None] * self.frequencies[None]).reshape(rows, tokens, -1)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos()[:, None] * 1.0, angles.sin()[:, None] * 1.0

    def forward(self, batch: Case) -> Any:
        x = self.embedding(batch["ids"])
        if batch["pixels"] is not None:
            seen = self.see(batch["pixels"])
            filled = x.clone()
            filled[image_places(seen)] = seen.view(-1, seen.shape[-1]).to(x.dtype)
            x = filled
        tables = self.tables(*batch["ids"].shape)
        for block in self.text:
            args = (x, tables, batch["mask"])
            x = checkpoint(block, *args, use_reentrant=False) if self.case["ckpt_lm"] else block(*args)
        x = self.text_norm(x)
        logits = F.linear(x, self.embedding.weight)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch["labels"].reshape(-1))
        return logits, loss


def shuffled(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Put factor x factor patches side by side."""
    tiles, patches, d = x.shape
    side = math.isqrt(patches) // factor
    x = x.view(tiles, side, factor, side, factor, d).permute(0, 1, 3, 2, 4, 5).contiguous()
    return x.reshape(tiles, side * side, d * factor**2)


def image_places(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and column of each image token, as a mask's nonzero would."""
    places = torch.empty(seen.shape[0] * seen.shape[1], 2, dtype=torch.long, device="cuda")
    return places[:, 0], places[:, 1]


# ---- losses without all logits at once ---------------------------------------------------------
LOSS_CHUNK = 1024


def chunked_loss(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, size: int) -> torch.Tensor:
    """Cross-entropy of some positions at a time, their logits computed again in backward."""

    def part(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")

    pairs = zip(x.split(size), labels.split(size), strict=True)
    return sum(checkpoint(part, *pair, use_reentrant=False) for pair in pairs) / len(labels)


class FusedLoss(torch.autograd.Function):
    """The same, with the gradients made in the forward pass, as in Liger's fused linear cross-entropy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, size: int) -> Any:
        narrow = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        source, matrix = x.to(narrow), weight.to(narrow)
        gradient, of_weight = torch.empty_like(source), torch.zeros_like(weight)
        total = torch.zeros((), device=x.device)
        for start in range(0, len(labels), size):
            piece = slice(start, start + size)
            logits = (source[piece] @ matrix.t()).float()
            total = total + F.cross_entropy(logits, labels[piece], reduction="sum")
            scores = torch.softmax(logits, dim=-1).to(narrow)
            gradient[piece] = scores @ matrix
            of_weight += scores.t() @ source[piece]
        ctx.save_for_backward(gradient, of_weight)
        ctx.dtype = x.dtype
        return total / len(labels)

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Any:
        gradient, of_weight = ctx.saved_tensors
        return gradient.mul_(outer).to(ctx.dtype), of_weight.mul_(outer), None, None


# ---- transformers ------------------------------------------------------------------------------
class Adapted(nn.Module):
    """A linear layer with an adapter in float32 beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, device="cuda")
        self.up = nn.Linear(rank, base.out_features, bias=False, device="cuda")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return (y + self.up(self.down(x.to(self.down.weight.dtype))) * 2.0).to(y.dtype)


class Composed(nn.Module):
    """transformers' SigLIP and Llama with a pixel shuffle between them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        v, m = case["vit"], case["lm"]
        self.case = case
        vision = transformers.SiglipVisionConfig(
            hidden_size=v["hidden"],
            intermediate_size=v["inter"],
            num_hidden_layers=v["layers"],
            num_attention_heads=v["heads"],
            patch_size=v["patch"],
            image_size=v["image"],
            vision_use_head=False,
            attn_implementation=case["attn"],
        )
        text = transformers.LlamaConfig(
            vocab_size=m["vocab"],
            hidden_size=m["hidden"],
            intermediate_size=m["inter"],
            num_hidden_layers=m["layers"],
            num_attention_heads=m["heads"],
            num_key_value_heads=m["kv_heads"],
            tie_word_embeddings=m.get("tied", True),
            max_position_embeddings=8192,
            attn_implementation=case["attn"],
        )
        self.eyes = transformers.SiglipVisionModel(vision)
        self.projector = nn.Linear(v["hidden"] * case["shuffle"] ** 2, m["hidden"], bias=False)
        self.text = transformers.LlamaForCausalLM(text)
        self.train()
        if case["ckpt_vit"]:
            self.eyes.activation_checkpointing_enable()
        if case["ckpt_lm"]:
            self.text.activation_checkpointing_enable()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {
            "vit": list(self.eyes.parameters()),
            "mp": list(self.projector.parameters()),
            "lm": list(self.text.parameters()),
        }

    def adapt(self, rank: int, names: list[str]) -> None:
        self.text.requires_grad_(False)
        for parent in list(self.text.modules()):
            for name, child in list(parent.named_children()):
                if name in names:
                    setattr(parent, name, Adapted(child, rank))

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.projector(shuffled(self.eyes(pixels).last_hidden_state, self.case["shuffle"]))

    def see_all(self, pixels: torch.Tensor) -> torch.Tensor:
        """Run the encoder, some tiles at a time if the case says so, each part computed again in backward."""
        if not self.case.get("sub_batch"):
            return self.see(pixels)
        parts = pixels.split(self.case["sub_batch"])
        return torch.cat([checkpoint(self.see, part, use_reentrant=False) for part in parts])

    def forward(self, batch: Case) -> Any:
        x = self.text.get_input_embeddings()(batch["ids"])
        if batch["pixels"] is not None:
            seen = self.see_all(batch["pixels"])
            filled = x.clone()
            filled[image_places(seen)] = seen.reshape(-1, seen.shape[-1]).to(x.dtype)
            x = filled
        places = torch.zeros_like(batch["ids"]) if self.case.get("packed_mask") else None
        # fake tensors hide that there is nothing to mask, so it is said here
        dense = self.case.get("packed_mask") or self.case["attn"] == "eager"
        modeling_llama.create_causal_mask = MAKE_MASK if dense else (lambda *_args, **_kwargs: None)
        inputs = {"inputs_embeds": x, "position_ids": places, "use_cache": False}
        if self.case.get("loss"):
            hidden = self.text.model(**inputs).last_hidden_state.flatten(0, 1)
            run = {"chunked": chunked_loss, "fused": FusedLoss.apply}[self.case["loss"]]
            return None, run(hidden, self.text.lm_head.weight, batch["labels"].flatten(), LOSS_CHUNK)
        return None, self.text(labels=batch["labels"], **inputs).loss


MAKE_MASK = modeling_llama.create_causal_mask
ADAPTED = {
    "qv": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def on_gpu(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give every parameter and buffer fake memory on the GPU; tied ones stay tied."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                new = known.get(id(value))
                if new is None:
                    new = nn.Parameter(torch.empty(value.shape, dtype=dtype or value.dtype, device="cuda"))
                    known[id(value)] = new
                module._parameters[name] = new
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")


# ---- steps -------------------------------------------------------------------------------------
def batch_of(case: Case) -> Case:
    """Return fake inputs."""
    shape, side = (case["batch"], case["seq"]), case["vit"]["image"]
    whole = {"dtype": torch.long, "device": "cuda"}
    width = torch.bfloat16 if case["dtype"] == "bf16" else torch.float32
    pixels = torch.zeros(case["tiles"], 3, side, side, dtype=width, device="cuda") if case["tiles"] else None
    masked = case["stack"] == "nano" and case.get("mask", True)
    return {
        "ids": torch.zeros(shape, **whole),
        "labels": torch.zeros(shape, **whole),
        "mask": torch.ones(shape, **whole) if masked else None,
        "pixels": pixels,
    }


def trace(case: Case, *, capacity: int | None = None, steps: int = 2) -> Tracer:
    """Run optimizer steps of a case on fake tensors and return what was seen.

    Raises:
        OutOfMemoryError: If a capacity is given and not enough.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = Reference(case) if case["stack"] == "nano" else Composed(case)
    tracer = Tracer(capacity)
    with FakeTensorMode(allow_non_fake_inputs=True), tracer.tracing():
        on_gpu(model, torch.bfloat16 if case["dtype"] == "bf16" else None)
        if case.get("lora"):
            model.adapt(case["lora"], ADAPTED[case["lora_targets"]])
        parts = model.parts()
        for name in case.get("freeze", []):
            for parameter in parts[name]:
                parameter.requires_grad_(False)
        for _ in range(2):  # cuBLAS workspaces of forward and backward
            tracer.keep(32 * MIB)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=True)
        held = None
        for number in range(steps):
            for part in range(2 if case.get("accum", 1) > 1 else 1):
                batch = batch_of(case)
                tracer.phase = f"forward {number}.{part}"
                with torch.autocast("cuda", torch.bfloat16, enabled=case["dtype"] == "amp_bf16"):
                    held, loss = model(batch)
                tracer.phase = f"backward {number}.{part}"
                loss.backward()
            tracer.phase = f"step {number}"
            optimizer.step()
            optimizer.zero_grad()
        del held
    return tracer


def largest(case: Case, capacity: int, by_tokens: int) -> Case:
    """Return the most tiles that run at a capacity: bisection, and a look beyond; -1: not even none.

    Whether a batch runs depends on where free memory lies, so fewer tiles may fail where more run: four
    counts below are tried as well, and those that fail are `holes`.
    """
    tried: dict[int, bool] = {}

    def runs(tiles: int) -> bool:
        if tiles not in tried:
            try:
                trace({**case, "tiles": tiles}, capacity=capacity)
                tried[tiles] = True
            except OutOfMemoryError:
                tried[tiles] = False
        return tried[tiles]

    if not runs(0):
        return {"max_tiles": -1, "holes": []}
    low, high = 0, by_tokens + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if runs(middle) else (low, middle)
    for beyond in (low + 2, low + 3):  # fragmentation is not monotone
        if beyond <= by_tokens and runs(beyond):
            low = beyond
    for percent in (95, 90, 85, 75):
        runs(low * percent // 100)
    return {"max_tiles": low, "holes": sorted(n for n, ran in tried.items() if n < low and not ran)}


def main(names: list[str]) -> None:
    """Fill the file."""
    from benchmarks.memory_case_list import LIMITS, STEPS

    data = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
    data["_source"] = f"python -m benchmarks.trace_memory, torch {torch.__version__.split('+')[0]}"
    traced, limits = data.setdefault("traced", {}), data.setdefault("limits", {})
    for name, case in STEPS.items():
        if name in names or not (names or name in traced):
            tracer = trace(case)
            truth = {
                "peak_requested": tracer.peak_requested,
                "peak_allocated": tracer.allocator.peak,
                "peak_reserved": tracer.allocator.peak_reserved,
                "peak_at": " ".join(tracer.peak_at),
            }
            traced[name] = {"case": case, "truth": truth}
            sys.stdout.write(f"{name}: {truth}\n")
    for name, (case, mib, by_tokens) in LIMITS.items():
        if name in names or not (names or name in limits):
            truth = largest(case, mib * MIB, by_tokens)
            limits[name] = {"case": case, "capacity_MiB": mib, "truth": truth}
            sys.stdout.write(f"{name}: {truth}\n")
            sys.stdout.flush()
    TARGET.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
