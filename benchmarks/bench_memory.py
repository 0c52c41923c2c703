"""How far the memory model is from what was traced and published, and from the allocator's real limits.

python -m benchmarks.bench_memory                  print the tables
python -m benchmarks.bench_memory --cases FILE     score another file of the same form
python -m benchmarks.bench_memory --calibration    and what calibration does in 90 simulated worlds
python -m benchmarks.bench_memory --write-docs     put them into docs/memory_model.md
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import timeit
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import memory_worlds
from vlmpack.memory.estimate import estimate
from vlmpack.memory.limits import TileLimit, max_tiles
from vlmpack.memory.model_shape import ConnectorShape, LanguageShape, ModelShape, VisionShape
from vlmpack.memory.regime import TrainingRegime
from vlmpack.memory.replay import can_replay, replay

HERE = Path(__file__).parent
CASES = HERE / "memory_cases.json"
OWN_CASES = HERE / "memory_traced.json"
DOCS = HERE.parent / "docs" / "memory_model.md"
BEGIN, END = "<!-- bench_memory: begin -->", "<!-- bench_memory: end -->"

Case = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure beside the truth, in bytes."""

    group: str
    name: str
    truth: int
    predicted: int

    @property
    def error(self) -> float:
        """Relative error in per cent; negative is too low."""
        return 100 * (self.predicted / self.truth - 1)


# ---- from a case's dictionary to the model's arguments -----------------------------------------
KNOWN_KEYS = {
    *("stack", "vit", "lm", "dtype", "attn", "tiles", "batch", "seq", "ckpt_vit", "ckpt_lm", "shuffle"),
    *(
        "accum",
        "mask",
        "packed_mask",
        "freeze",
        "lora",
        "lora_targets",
        "optimizer",
        "expandable",
        "name",
        "loss",
        "sub_batch",
    ),
}


def shape_of(case: Case) -> ModelShape:
    """Return a traced case's model: the reference pipeline's ("nano") or transformers' classes ("hf")."""
    v, m, reference = case["vit"], case["lm"], case["stack"] == "nano"
    vision = VisionShape(
        layers=v["layers"],
        hidden=v["hidden"],
        intermediate=v["inter"],
        heads=v["heads"],
        patch_size=v["patch"],
        tile_size=v["image"],
        fused_qkv=reference,
    )
    language = LanguageShape(
        layers=m["layers"],
        hidden=m["hidden"],
        intermediate=m["inter"],
        heads=m["heads"],
        kv_heads=m["kv_heads"],
        vocab=m["vocab"],
        head_dim=m.get("head_dim", 0),
        tied=m.get("tied", True),
        attention_bias=m.get("qkv_bias", False),
        qk_norm=m.get("qk_norm", False),
        always_repeats_keys=reference,
        float_logits=not reference,
        plain_eager=reference,
    )
    # buffers: rotary frequencies, once or twice, and SigLIP's position ids
    tables = 2 * language.head_width if reference else 4 * language.head_width + 8 * vision.patches_per_tile
    return ModelShape(
        name=f"{case['stack']}-{m.get('name', 'lm')}",
        vision=vision,
        connector=ConnectorShape(factor=case["shuffle"]),
        language=language,
        merge="index",
        buffer_bytes=tables,
    )


def regime_of(case: Case) -> TrainingRegime:
    """Return how a traced case is trained."""
    unknown = set(case) - KNOWN_KEYS
    if unknown:  # scored all the same: an option that nobody knows may not matter
        sys.stderr.write(f"the case has keys that this adapter does not know: {sorted(unknown)}\n")
    reference = case["stack"] == "nano"
    mask = "padding" if reference and case.get("mask", True) else "none"
    amp, width = case["dtype"].startswith("amp_"), case["dtype"].removeprefix("amp_")
    return TrainingRegime(
        weights="fp32" if amp else width,
        autocast=width if amp else None,
        attention=case["attn"],
        mask="packed" if case.get("packed_mask") else mask,
        checkpoint_vision=case.get("ckpt_vit", False),
        checkpoint_language=case.get("ckpt_lm", False),
        holds_logits=reference,
        accumulation=case.get("accum", 1) > 1,
        frozen=tuple(dict.fromkeys(PARTS[name] for name in case.get("freeze", []))),
        lora_rank=case.get("lora"),
        lora_targets=case.get("lora_targets", "attention"),
        optimizer=case.get("optimizer", "adamw_foreach"),
        expandable_segments=case.get("expandable", False),
        cross_entropy=case.get("loss", "full"),
        vision_sub_batch=case.get("sub_batch"),
    )


PARTS = {
    "vit": "vision",
    "vision": "vision",
    "lm": "language",
    "language": "language",
    "mp": "connector",
    "connector": "connector",
    "projector": "connector",
}
"""What a case calls the parts that are frozen."""


def load_of(case: Case) -> dict[str, int]:
    """Return a case's batch."""
    return {"rows": case["batch"], "tokens_per_row": case["seq"], "tiles": case["tiles"]}


# ---- groups ------------------------------------------------------------------------------------
def traced_scores(cases: Case, group: str = "traced") -> list[Score]:
    """Score whole traced steps."""
    return [
        Score(
            group=group,
            name=name,
            truth=entry["truth"]["peak_allocated"],
            predicted=estimate(
                shape_of(entry["case"]), regime_of(entry["case"]), **load_of(entry["case"])
            ).peak_bytes,
        )
        for name, entry in cases.items()
    ]


SPEC_LOADS = {
    "seed-b4-1224": (4, 1224, {}),
    "seed-b2-160": (2, 160, {}),
    "seed-b4-408": (4, 408, {}),
    "seed-b2-160-accum": (2, 160, {"accum": 8}),
    "seed-b2-16tiles": (2, 16, {}),
    "seed-b4-1224-eager": (4, 1224, {"attn": "eager"}),
    "seed-b4-1224-ckptvit": (4, 1224, {"ckpt_vit": True}),
    "seed-b2-160-ckptvit": (2, 160, {"ckpt_vit": True}),
}
"""The reference document's scenarios: rows, tiles, and what differs from the reference model's case."""


def spec_cases(data: Case) -> Case:
    """Return the reference document's scenarios as traced cases."""
    base = data["traced"]["nano460-b4-p252"]["case"]
    return {
        name: {
            "case": {**base, "batch": rows, "tiles": tiles, **changes},
            "truth": data["spec_claims"][name],
        }
        for name, (rows, tiles, changes) in SPEC_LOADS.items()
        if name in data.get("spec_claims", {})
    }


def published_scores(data: Case) -> list[Score]:
    """Score GPU peaks that others have published, of the rows whose set-up is fully known."""
    return [*_nanovlm_scores(data), *_litgpt_scores(data)]


def _nanovlm_scores(data: Case) -> list[Score]:
    """nanoVLM-222M on an H100. Its script doubles the batch and still holds the logits of the half one."""
    entry = data["published"]["nanovlm-222m-june2025"]
    case = json.loads(json.dumps(data["traced"]["nano222-b32"]["case"]))
    case["vit"]["image"], case["lm"]["vocab"], case["seq"] = 256, 49153, 128
    scores = []
    for batch, mib in entry["table"]:
        case["batch"] = case["tiles"] = batch
        peak = estimate(shape_of(case), regime_of(case), **load_of(case)).peak_bytes
        older = 2 * (batch // 2) * case["seq"] * case["lm"]["vocab"]
        scores.append(
            Score(
                group="published",
                name=f"nanoVLM-222M batch {batch}",
                truth=int(mib * 2**20),
                predicted=peak + older,
            )
        )
    return scores


PHI_1_5 = ModelShape(
    name="phi-1.5",
    language=LanguageShape(
        layers=24,
        hidden=2048,
        intermediate=8192,
        heads=32,
        kv_heads=32,
        vocab=51200,
        tied=False,
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        parallel=True,
        rotary_share=0.5,
    ),
)


def _litgpt_scores(data: Case) -> list[Score]:
    """litgpt LoRA on phi-1.5, an A100: adapters on q and v with dropout, logits held as a list of chunks."""
    regime = TrainingRegime(
        weights="bf16",
        autocast=None,
        lora_rank=8,
        lora_targets="qv",
        lora_dtype="bf16",
        lora_dropout=True,
        holds_logits=True,
        workspace_bytes=2 * 8_519_680,
    )
    return [
        Score(
            group="published",
            name=f"litgpt phi-1.5 LoRA batch {batch}",
            truth=int(gb * 1e9),
            predicted=estimate(PHI_1_5, regime, rows=batch, tokens_per_row=1044).peak_bytes,
        )
        for batch, gb in data["published"]["litgpt-phi-1.5-lora"]["table"]
    ]


def limit_of(entry: Case, *, by_replay: bool = False) -> TileLimit:
    """Return the rule's answer for a case of known limit; the truth counts 64 tokens a tile, no position."""
    case, regime = entry["case"], regime_of(entry["case"])
    if entry.get("expandable"):
        regime = regime.model_copy(update={"expandable_segments": True})
    return max_tiles(
        shape_of(case),
        regime,
        entry["capacity_MiB"] * 2**20 + regime.context_bytes,
        rows=case["batch"],
        tokens_per_row=case["seq"],
        position_tokens=0,
        replay=by_replay,
    )


def safe_limit(entry: Case) -> int:
    """Return the most tiles of which no smaller count is known to fail."""
    truth = entry["truth"]
    return min([truth["max_tiles"], *(hole - 1 for hole in truth.get("holes", []))])


# ---- printing ----------------------------------------------------------------------------------
def summary(scores: list[Score]) -> list[str]:
    """Return a table of each group's errors."""
    lines = [
        "| group | cases | median | 90 % within | largest | furthest below |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for group in dict.fromkeys(score.group for score in scores):
        errors = sorted(abs(s.error) for s in scores if s.group == group)
        low = min(s.error for s in scores if s.group == group)
        p90 = errors[min(len(errors) - 1, int(0.9 * len(errors)))]
        lines.append(
            f"| {group} | {len(errors)} | {statistics.median(errors):.2f} % | {p90:.2f} % "
            f"| {errors[-1]:.2f} % | {min(low, 0.0):.2f} % |"
        )
    return lines


def details(scores: list[Score]) -> list[str]:
    """Return a table of every case."""
    lines = ["| group | case | truth GiB | predicted GiB | error |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {s.group} | {s.name} | {s.truth / 2**30:.3f} | {s.predicted / 2**30:.3f} | {s.error:+.2f} % |"
        for s in scores
    ]
    return lines


def limit_table(limits: Case) -> list[str]:
    """Return the tile limits of the rule and of a replay beside the allocator's."""
    lines = [
        "| case | allocator | all run up to | rule | used | replay | used |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in limits.items():
        safe = safe_limit(entry)
        counts = [limit_of(entry, by_replay=asked).tiles for asked in (False, True)]
        shares = " | ".join(f"{count} | {100 * count / safe:.0f} %" for count in counts)
        lines.append(f"| {name} | {entry['truth']['max_tiles']} | {safe} | {shares} |")
    return lines


def replay_table(groups: dict[str, Case]) -> list[str]:
    """Return a table of the errors of replayed steps: bytes asked for, allocated, reserved."""
    lines = [
        "| group | cases | asked for: largest | allocated: median, largest | reserved: median, 90 %, all |",
        "| --- | --- | --- | --- | --- |",
    ]
    for group, cases in groups.items():
        errors: dict[str, list[float]] = {"requested": [], "allocated": [], "reserved": []}
        replayable = [e for e in cases.values() if can_replay(regime_of(e["case"]))]
        for entry in replayable:
            run = replay(shape_of(entry["case"]), regime_of(entry["case"]), **load_of(entry["case"]))
            for name, found in errors.items():
                truth = entry["truth"].get(f"peak_{name}")
                if truth:
                    found.append(100 * abs(getattr(run, f"peak_{name}") / truth - 1))
        asked, allocated, reserved = (sorted(errors[name]) or [math.nan] for name in errors)
        p90 = reserved[min(len(reserved) - 1, int(0.9 * len(reserved)))]
        lines.append(
            f"| {group} | {len(replayable)} | {asked[-1]:.3f} % "
            f"| {statistics.median(allocated):.2f} %, {allocated[-1]:.2f} % "
            f"| {statistics.median(reserved):.2f} %, {p90:.2f} %, {reserved[-1]:.2f} % |"
        )
    return lines


def speed_line(data: Case) -> str:
    """Return how long one estimate takes."""
    case = data["traced"]["nano460-p17"]["case"]
    shape, regime, load = shape_of(case), regime_of(case), load_of(case)
    estimate(shape, regime, **load)
    number = 500
    each = min(timeit.repeat(lambda: estimate(shape, regime, **load), number=number, repeat=5)) / number
    return f"One estimate of a known model takes about {each * 1e6:.0f} µs on one core."


def tables(path: Path = CASES, *, replays: bool = True) -> list[str]:
    """Return all tables as Markdown lines; without replays only those of the closed forms."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data.setdefault("traced", data.get("truth", {}))
    scores = traced_scores(data["traced"])
    if "nano460-b4-p252" in data["traced"]:
        scores += traced_scores(spec_cases(data), "document's scenarios")
    if "nano222-b32" in data["traced"] and data.get("published"):
        scores += published_scores(data)
    limits = dict(data.get("limits", {}))
    groups = {"traced": data["traced"]}
    if path == CASES and OWN_CASES.exists():
        own = json.loads(OWN_CASES.read_text(encoding="utf-8"))
        scores += traced_scores(own["traced"], "traced here")
        limits |= own["limits"]
        groups["traced here"] = own["traced"]
    return [
        *("Errors of the predicted peak (`max_memory_allocated`):", "", *summary(scores), ""),
        *(_replay_tables(groups, limits) if replays else ()),
        *("Every case:", "", *details(scores)),
    ]


def _replay_tables(groups: dict[str, Case], limits: Case) -> list[str]:
    return [
        *("Errors of steps replayed in the allocator:", "", *replay_table(groups), ""),
        *("Most tiles that run in the allocator, by the rule and by a replay:", "", *limit_table(limits), ""),
    ]


def write_docs(lines: list[str]) -> None:
    """Replace the generated section of the documentation."""
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    DOCS.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


def main() -> None:
    """Print the tables, or write them into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--write-docs", action="store_true")
    parser.add_argument("--calibration", action="store_true", help="run 90 worlds too, about two minutes")
    options = parser.parse_args()
    lines = tables(options.cases)
    if options.calibration or options.write_docs:
        lines += ["", "A formula that is 30 % off, in 30 worlds of 1,000 batches each:", ""]
        lines += memory_worlds.table()
    if options.write_docs:
        write_docs(lines)
        return
    print("\n".join(lines))
    print()
    print(speed_line(json.loads(CASES.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
