"""Draw the pictures of docs/schedules.md and docs/batch_size_search.md: python -m docs.draw_schedules."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib.figure import Figure

from vlmpack.batching import BatchSizeScheduler, parse_schedule
from vlmpack.batching.search_rules import DocumentedRule, GuidedRule, Trial

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#666666"
LINES = {
    "type=step,step_size=20,gamma=2,max_batch_size=2048": BLUE,
    "type=linear,final_batch_size=2048,duration=80": ORANGE,
    "type=exponential,final_batch_size=2048,duration=80": GREEN,
    "type=cosine,final_batch_size=2048,duration=80": PURPLE,
}


def save(figure: Figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


def draw_schedules() -> None:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for line, colour in LINES.items():
        config = parse_schedule(line)
        scheduler = BatchSizeScheduler(config, 256)
        sizes = [scheduler.get_batch_size(epoch) for epoch in range(101)]
        axes.step(range(101), sizes, where="post", color=colour, label=config.type, linewidth=1.8)
    axes.set(xlabel="epoch", ylabel="samples a step", xlim=(0, 100), ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "schedules")


def draw_search() -> None:
    """Draw both searches in one hidden memory function: 10 GB and 0.52 GB a sample, 60 GB in all."""

    def memory(size: int) -> float:
        return 10 + 0.52 * size

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    rules = {"documented": DocumentedRule(), "guided": GuidedRule(limit_bytes=60)}
    for axes, (name, rule) in zip(
        figure.subplots(1, 2, sharex=True, sharey=True), rules.items(), strict=True
    ):
        trials: list[Trial] = []
        while (size := rule.next_size(trials, 40, 512)) is not None:
            fits = memory(size) <= 60
            trials.append(Trial(size, fits, int(1e6 * memory(size)) / 1e6 if fits else None))  # type: ignore[arg-type]
        axes.plot([0, 150], [memory(0), memory(150)], color=GREY, linewidth=0.8, label="memory, hidden")
        axes.axhline(60, color=ORANGE, linestyle=":", label="limit")
        for number, trial in enumerate(trials, start=1):
            colour = GREEN if trial.fits else ORANGE
            axes.plot(trial.batch_size, memory(trial.batch_size), "o" if trial.fits else "X", color=colour)
            offset = (6, -12) if number % 2 else (-14, 6)
            axes.annotate(
                str(number), (trial.batch_size, memory(trial.batch_size)), offset, textcoords="offset points"
            )
        best = max(trial.batch_size for trial in trials if trial.fits)
        axes.set(title=f"{name}: {best} of 96 after {len(trials)} tries", xlabel="batch size", xlim=(0, 150))
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.axes[0].set_ylabel("GB")
    save(figure, "search")


if __name__ == "__main__":
    draw_schedules()
    draw_search()
