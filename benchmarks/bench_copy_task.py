"""Does isolation matter? A copy task, trained on packs with it and without it, into docs/training.md.

python -m benchmarks.bench_copy_task
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

from benchmarks.copy_task import LENGTH, PAD, WAYS, batches, evaluate, train

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- copy task: benchmarks/bench_copy_task.py -->", "<!-- end of copy task -->"
STEPS, SEEDS = 200, (0, 1)


def test_the_packs_are_full_of_samples_to_copy():
    batch = next(batches(0, num_packs=4))
    assert batch["segment_ids"].shape == (4, LENGTH)
    assert float((batch["input_ids"] != PAD).float().mean()) > 0.9
    ids, labels, segments = batch["input_ids"][0], batch["labels"][0], batch["segment_ids"][0]
    for segment in range(1, int(segments.max()) + 1):
        sample, learnt = ids[segments == segment], labels[segments == segment]
        length = (len(sample) - 2) // 2
        assert torch.equal(sample[1 : 1 + length], sample[-length:])
        assert torch.equal(learnt[-length:], sample[-length:])
        assert bool((learnt[:-length] == -100).all())


def table() -> str:
    lines = [
        "| Trained on packs | seed | evaluated isolated: loss | accuracy | in one context: loss | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        for seed in SEEDS:
            model = train(way, steps=STEPS, seed=seed)
            cells = [
                f"{number:{form}}"
                for other in WAYS
                for number, form in zip(evaluate(model, other), (".3f", ".1%"), strict=True)
            ]
            lines.append(f"| {way}: {WAYS[way]} | {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    torch.set_num_threads(1)
    head, rest = PAGE.read_text().split(BEGIN)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    block = f"{BEGIN}\n\n{STEPS} steps of 2 packs of {LENGTH} tokens; {versions}.\n\n{table()}\n\n{END}"
    PAGE.write_text(head + block + rest.split(END)[1])
    print(block)
    return 0


if __name__ == "__main__":
    sys.exit(main())
