"""One HTML file about a set of packs, for a person. It asks for nothing else and runs no script.

All that comes from data is escaped, and the page's own policy forbids requests and scripts.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from vlmpack.budget import PackBudget
from vlmpack.report.charts import histogram
from vlmpack.report.figures import RANKS, Figures, figures_of
from vlmpack.report.style import STYLE
from vlmpack.report.viewer import pack_viewer, thumbnail_of

if TYPE_CHECKING:
    from vlmpack.offline import PackedFolder

DEFAULT_PACKS: Final = 24
"""Packs in the viewer, spread evenly over all."""


def write_report(
    where: str | Path,
    out: str | Path,
    *,
    gpu: str | None = None,
    model: str = "nanovlm-460m",
    rows: int = 1,
    num_packs: int = DEFAULT_PACKS,
) -> Figures:
    """Write the page about packs on disk, a plan, or a JSON report, and return its figures.

    Args:
        where: A folder of `vlmpack prepack` or `vlmpack plan`, or a JSON report of `vlmpack pack`.
        out: The HTML file.
        gpu: Draw what this GPU takes, such as "H100".
        model: Of the GPU's line: a preset's name, or a config.json.
        rows: Of the GPU's line: packs of a batch on one device.
        num_packs: Packs in the viewer, of those on disk.

    Raises:
        ConfigError: If there is nothing to report on, or the GPU or model is unknown.
    """
    figures = figures_of(where)
    limit = None
    if gpu is not None:
        budget = PackBudget.for_gpu(gpu, model, max_tokens=figures.budget.max_tokens, rows=rows)
        limit = (float(budget.max_patches or 0), f"{gpu}, {model}, {rows} a batch")
    viewer = _viewer(figures.packs, num_packs) if figures.packs is not None else ""
    Path(out).write_text(_page(figures, limit, viewer), encoding="utf-8")
    return figures


def _viewer(packs: PackedFolder, num_packs: int) -> str:
    tokenizer = packs.load_tokenizer()
    numbers = np.unique(np.linspace(0, len(packs) - 1, min(num_packs, len(packs))).astype(int)).tolist()
    shown = pack_viewer(
        [(number, packs[number]) for number in numbers], packs.budget, tokenizer, packs.image_ids(tokenizer)
    )
    which = "All" if len(numbers) == len(packs) else f"{len(numbers)} of {len(packs):,}"
    return (
        f"<h2>Packs</h2><p class='sub'>{which} packs. A bar is a pack, a colour a sample; the grey end is "
        "padding. Click one to see its tiles and its text, <mark>what is learnt</mark> in green.</p>"
        f"{shown}"
    )


def _page(figures: Figures, limit: tuple[float, str] | None, viewer: str) -> str:
    body = [
        f"<h1>{figures.num_samples:,} samples in {figures.num_packs:,} packs</h1>",
        f"<p class='sub'>{escape(figures.source)}: {figures.num_read:,} rows read, "
        f"{sum(figures.refused.values()):,} of them in no pack</p>",
        _cards(figures),
        "<h2>What packs hold</h2>",
        "<div class='charts'>",
        histogram(figures.tokens_per_pack, "tokens a pack", line=(figures.budget.max_tokens, "budget")),
        histogram(figures.patches_per_pack, "ViT patches a pack", line=limit or _patch_budget(figures)),
        histogram(figures.samples_per_pack, "samples a pack"),
        "</div>",
        _balance(figures),
        _refused(figures),
        viewer,
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>vlmpack: {escape(figures.source)}</title><style>{STYLE}</style></head><body><main>"
        + "\n".join(body)
        + "</main></body></html>\n"
    )


def _patch_budget(figures: Figures) -> tuple[float, str] | None:
    patches = figures.budget.max_patches
    return None if patches is None else (float(patches), "budget")


def _cards(figures: Figures) -> str:
    over = figures.num_packs / figures.lower_bound - 1 if figures.lower_bound else 0.0
    cards = [(f"{share:.1%}", f"{axis} filled") for axis, share in figures.fill.items() if share is not None]
    cards += [
        (f"{over:.2%}", f"packs over the lower bound of {figures.lower_bound:,}"),
        (f"{figures.padding(figures.num_packs):.1%}", "padding"),
        (f"{figures.padding(figures.num_samples):.1%}", "padding with one sample a row"),
        (f"{figures.num_samples / max(figures.num_packs, 1):.1f}", "samples a pack"),
    ]
    if figures.group_price is not None:
        cards.append((f"{figures.group_price:.2%}", "packs more than one plan over all files"))
    inner = "".join(
        f"<div class='card'><b>{value}</b><span>{escape(name)}</span></div>" for value, name in cards
    )
    return f"<div class='cards'>{inner}</div>"


def _balance(figures: Figures) -> str:
    if figures.imbalance is None:
        return ""
    rows = "".join(
        f"<tr><td>{name}</td><td>{random.mean:.3f}</td><td>{balanced.mean:.3f}</td><td>{balanced.p95:.3f}</td></tr>"
        for name, random, balanced in zip(
            ("ViT patches", "attention"),
            (figures.imbalance[0].patches, figures.imbalance[0].attention),
            (figures.imbalance[1].patches, figures.imbalance[1].attention),
            strict=True,
        )
    )
    return (
        f"<h2>Balance over {RANKS} ranks</h2><p class='sub'>The busiest rank of a step over the mean of its "
        "ranks: 1 is even, and the rest is waiting.</p><table><tr><th></th><th>random order</th>"
        f"<th>balanced steps</th><th>balanced, 95 % of steps</th></tr>{rows}</table>"
    )


def _refused(figures: Figures) -> str:
    if not figures.refused:
        return "<h2>Refused rows</h2><p class='sub'>None: every row that was read is in a pack.</p>"
    rows = []
    for reason, count in figures.refused.most_common():
        stories = "<br>".join(
            f"{thumbnail_of(each.picture)}<b>{escape(each.key)}</b> {escape(each.message)}"
            for each in figures.examples
            if each.reason == reason
        )
        rows.append(f"<tr><td>{escape(reason)}</td><td>{count:,}</td><td>{stories}</td></tr>")
    return (
        "<h2>Refused rows</h2><table><tr><th>reason</th><th>rows</th><th>for example</th></tr>"
        + "".join(rows)
        + "</table>"
    )
