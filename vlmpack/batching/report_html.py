"""Report: one HTML file about a run, for a person. Figures are inside; it asks for nothing else.

Every text of the run is escaped, and the page's own policy forbids scripts and requests: names of tasks come
from data.
"""

from __future__ import annotations

import base64
import io
import math
from html import escape
from typing import TYPE_CHECKING, Final

from vlmpack.batching.curves import colours, draw_panel, task_panels, training_panels
from vlmpack.errors import ConfigError
from vlmpack.memory.linear_cost import GB

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vlmpack.batching.curves import Panel
    from vlmpack.batching.metrics import BatchMetrics, EpochMetrics
    from vlmpack.batching.monitor import DynamicBatchingMonitor

MAX_ROWS: Final = 50
"""Rows of a table of steps; the JSON file has all."""
_EDGE: Final = 0.1
"""Share of the steps whose mean is the first and the last loss: one step says little."""

_STYLE: Final = """
:root { --ink: #1f2328; --faint: #656d76; --line: #d8dee4; --card: #f6f8fa; --blue: #0072b2; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 4px; }
p.sub { color: var(--faint); margin: 4px 0 0; }
p.verdict { font-size: 17px; margin: 18px 0 20px; max-width: 75ch; }
p.note { color: var(--faint); margin: 6px 0 0; font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 23px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { color: var(--faint); font-size: 13px; }
.card em { font-style: normal; color: var(--faint); font-size: 13px; display: block; }
.warn { border: 1px solid #e8b4b0; background: #fdf3f2; border-radius: 8px; padding: 10px 14px;
        margin: 16px 0 0; }
.warn b { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px 6px; min-width: 0; }
figure img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 500; font-size: 13px; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--blue); }
footer { color: var(--faint); margin-top: 48px; font-size: 13px; }
@media (max-width: 540px) { .figures { grid-template-columns: 1fr; } main { padding: 20px 14px; } }
@media print { figure, .card, tr { break-inside: avoid; } main { max-width: none; } }
"""

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def render(monitor: DynamicBatchingMonitor) -> str:
    """Return the report as HTML.

    Args:
        monitor: With at least one step.

    Raises:
        ConfigError: If there is no step, or matplotlib is not installed.
    """
    if not monitor.batches:
        raise ConfigError("no step was recorded, so there is nothing to report")
    run = monitor.summary()
    parts = [
        f"<h1>{escape(monitor.title)}</h1>",
        f"<p class='sub'>{escape(_extent(monitor, run))}</p>",
        f"<p class='verdict'>{escape(_verdict(monitor, run))}</p>",
        _cards(monitor, run),
        _warnings(monitor, run),
        "<h2>Training</h2>",
        _figures(training_panels(monitor), monitor),
        _tasks(monitor, run),
        _epochs(monitor),
        _recoveries(monitor),
        _settings(monitor),
        f"<footer>{escape(_colophon(monitor))}</footer>",
    ]
    body = "\n".join(part for part in parts if part)
    return _PAGE.format(title=escape(monitor.title), style=_STYLE, body=body)


# ---- the top -----------------------------------------------------------------------------------
def _extent(monitor: DynamicBatchingMonitor, run: EpochMetrics) -> str:
    first, last = monitor.batches[0].step, monitor.batches[-1].step
    epochs = len({each.epoch for each in monitor.batches})
    text = f"steps {first:,} to {last:,} in {epochs} epoch{'s' * (epochs != 1)}, {run.num_samples:,} samples"
    return f"{text}, {duration(run.seconds)}" if run.seconds else text


def _verdict(monitor: DynamicBatchingMonitor, run: EpochMetrics) -> str:
    before, after = edge_losses(monitor.batches)
    said = []
    if math.isfinite(before) and math.isfinite(after):
        verb = "fell" if after < before else "rose"
        change = f" ({abs(after / before - 1):.0%})" if before else ""
        said.append(f"The loss {verb} from {_short(before)} to {_short(after)}{change}.")
    else:
        said.append("No step had a finite loss.")
    if run.num_ooms:
        steps = sum(each.num_ooms > 0 for each in monitor.batches)
        said.append(
            f"Memory ran out {_times(run.num_ooms)} in {steps:,} of {run.num_steps:,} steps; each of these "
            "steps was split finer and finished."
        )
    else:
        said.append("Memory never ran out.")
    if run.peak_bytes and monitor.limit_bytes:
        said.append(f"At most {run.peak_bytes / monitor.limit_bytes:.0%} of the device's memory was in use.")
    return " ".join(said)


def edge_losses(batches: Sequence[BatchMetrics]) -> tuple[float, float]:
    """Return the mean loss of the first and of the last tenth of the steps with a finite one; NaN of none."""
    losses = [each.loss for each in batches if math.isfinite(each.loss)]
    if not losses:
        return math.nan, math.nan
    many = max(1, round(_EDGE * len(losses)))
    return math.fsum(losses[:many]) / many, math.fsum(losses[-many:]) / many


def _cards(monitor: DynamicBatchingMonitor, run: EpochMetrics) -> str:
    before, after = edge_losses(monitor.batches)
    sizes = [each.num_samples for each in monitor.batches]
    parts = [each.num_micro_batches for each in monitor.batches]
    cards = [
        ("final loss", _short(after), f"from {_short(before)}"),
        ("samples", f"{run.num_samples:,}", f"{_range(sizes)} a step"),
    ]
    if run.samples_per_s:
        spread = f"{_short(run.slowest_samples_per_s)} to {_short(run.fastest_samples_per_s)}"
        cards.append(("samples a second", _short(run.samples_per_s), spread))
    if run.peak_bytes:
        limit = f"of {monitor.limit_bytes / GB:.1f} GB" if monitor.limit_bytes else "limit unknown"
        cards.append(("peak memory", f"{run.peak_bytes / GB:.2f} GB", limit))
    cards.append(("out of memory", f"{run.num_ooms:,}", "times, recovered" if run.num_ooms else "never"))
    cards.append(("micro-batches", _short(sum(parts) / len(parts)), f"a step: {_range(parts)}"))
    evaluated = [each.eval_loss for each in monitor.epochs if each.eval_loss is not None]
    if evaluated:
        cards.append(("evaluation loss", _short(evaluated[-1]), f"best {_short(min(evaluated))}"))
    inside = "".join(
        f"<div class='card'><span>{escape(name)}</span><b>{escape(value)}</b><em>{escape(note)}</em></div>"
        for name, value, note in cards
    )
    return f"<div class='cards'>{inside}</div>"


def _warnings(monitor: DynamicBatchingMonitor, run: EpochMetrics) -> str:
    said = []
    if run.num_non_finite:
        steps = [each.step for each in monitor.batches if not math.isfinite(each.loss)]
        shown = ", ".join(f"{step:,}" for step in steps[:10]) + (", ..." if len(steps) > 10 else "")
        said.append(
            f"<b>The loss was not finite {_times(run.num_non_finite)}</b> "
            f"(step{'s' * (len(steps) > 1)} {shown}): such steps are left out of every mean here."
        )
    before, after = edge_losses(monitor.batches)
    if after > before:
        said.append("<b>The loss rose.</b> Lower the learning rate, or look at the tasks below.")
    if run.peak_bytes and monitor.limit_bytes and run.peak_bytes > 0.95 * monitor.limit_bytes:
        said.append(
            "<b>Memory came within 5 % of its limit.</b> A larger margin leaves fewer steps to recover."
        )
    return "".join(f"<div class='warn'>{text}</div>" for text in said)


# ---- figures and tables ------------------------------------------------------------------------
def _figures(panels: Sequence[Panel], monitor: DynamicBatchingMonitor) -> str:
    inside = "".join(
        f"<figure><h3>{escape(panel[0])}</h3><img src='{_picture(panel, monitor)}' "
        f"alt='{escape(panel[0])} over the steps'></figure>"
        for panel in panels
    )
    return f"<div class='figures'>{inside}</div>"


def _picture(panel: Panel, monitor: DynamicBatchingMonitor) -> str:
    figure = draw_panel(panel, monitor)
    import matplotlib as mpl  # there, since a figure was made

    drawn = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vlmpack"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode("ascii")


def _tasks(monitor: DynamicBatchingMonitor, run: EpochMetrics) -> str:
    tasks = monitor.task_types
    if not tasks:
        return ""
    hues = colours(tasks)
    total = sum(run.task_samples.values())
    rows = []
    for task in tasks:
        losses = [each.task_losses[task] for each in monitor.batches if task in each.task_losses]
        losses = [loss for loss in losses if math.isfinite(loss)]
        many = max(1, round(_EDGE * len(losses)))
        weights = [each.task_weights[task] for each in monitor.batches if task in each.task_weights]
        norms = [each.task_grad_norms[task] for each in monitor.batches if task in each.task_grad_norms]
        samples = run.task_samples.get(task, 0)
        rows.append([
            f"<span class='dot' style='background:{hues[task][0]}'></span>{escape(task)}",
            f"{samples:,}",
            f"{samples / total:.1%}" if total else "-",
            _short(math.fsum(losses[:many]) / many) if losses else "-",
            _short(math.fsum(losses[-many:]) / many) if losses else "-",
            _short(weights[-1]) if weights else "-",
            _short(norms[-1]) if norms else "-",
        ])
    head = ("task", "samples", "share", "first loss", "last loss", "last weight", "last gradient norm")
    return "<h2>Tasks</h2>" + _figures(task_panels(monitor), monitor) + _table(head, rows)


def _epochs(monitor: DynamicBatchingMonitor) -> str:
    if not monitor.epochs:
        return ""
    evaluated = any(each.eval_loss is not None for each in monitor.epochs)
    head = ["epoch", "steps", "samples", "loss", "samples / s", "peak GB", "mean GB", "out of memory", "time"]
    rows = [
        [
            str(each.epoch + 1),
            f"{each.num_steps:,}",
            f"{each.num_samples:,}",
            _short(each.average_loss),
            _short(each.samples_per_s),
            f"{each.peak_bytes / GB:.2f}",
            f"{each.average_bytes / GB:.2f}",
            f"{each.num_ooms:,}",
            duration(each.seconds),
            *([_short(each.eval_loss)] if evaluated else []),
        ]
        for each in monitor.epochs
    ]
    return "<h2>Epochs</h2>" + _table([*head, *(["evaluation"] if evaluated else [])], rows)


def _recoveries(monitor: DynamicBatchingMonitor) -> str:
    hit = [each for each in monitor.batches if each.num_ooms]
    if not hit:
        return ""
    rows = [
        [
            f"{each.step:,}",
            f"{each.num_ooms:,}",
            f"{each.num_samples:,}",
            f"{each.num_micro_batches:,}",
            ", ".join(f"{escape(task)} x {count}" for task, count in sorted(each.task_types.items())),
        ]
        for each in hit[:MAX_ROWS]
    ]
    table = _table(("step", "out of memory", "samples", "micro-batches in the end", "tasks"), rows)
    more = f"<p class='note'>the first {MAX_ROWS} of {len(hit):,}</p>" if len(hit) > MAX_ROWS else ""
    shown = "" if len(hit) > 12 else " open"
    return (
        f"<h2>Recovered steps</h2><details{shown}><summary>{len(hit):,} step{'s' * (len(hit) != 1)}</summary>"
        f"{table}{more}</details>"
    )


def _settings(monitor: DynamicBatchingMonitor) -> str:
    if not monitor.settings:
        return ""
    rows = [[escape(str(name)), escape(str(value))] for name, value in monitor.settings.items()]
    table = _table(("setting", "value"), rows)
    return f"<h2>Settings</h2><details><summary>{len(rows)} settings</summary>{table}</details>"


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are HTML already."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _colophon(monitor: DynamicBatchingMonitor) -> str:
    text = "First and last losses are means of the first and last tenth of the steps. GB are 10^9 bytes."
    return text if monitor.folder is None else f"{text} Every figure is in metrics.json beside this page."


# ---- numbers -----------------------------------------------------------------------------------
def _short(value: float | None) -> str:
    """Return a number with three or four digits that count."""
    if value is None or not math.isfinite(value):
        return "-"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{3 if abs(value) < 10 else 1}f}"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
