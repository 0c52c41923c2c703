"""The report: figures that are counted again here, a page that asks for nothing, and packs to look into."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest

from tests.unit.offline.conftest import HERE, LIMITS, write_corpus
from vlmpack.errors import ConfigError
from vlmpack.offline import build_index, build_plan, load_packed, prepack
from vlmpack.report import figures_of, write_report
from vlmpack.report.charts import histogram


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    corpus = write_corpus(root / "corpus", {"a.parquet": range(12), "b<i>.parquet": range(12, 20)})
    index = build_index(corpus, root / "index", engine=HERE)
    prepack(build_plan(index, root / "plan", LIMITS), root / "packed", engine=HERE)
    return root


@pytest.fixture(scope="module")
def page(made):
    write_report(made / "packed", made / "report.html", gpu="A100-40")
    return (made / "report.html").read_text()


def test_figures_are_those_of_the_packs(made):
    figures = figures_of(made / "packed")
    packs = [load_packed(made / "packed", decode=False)[n] for n in range(figures.num_packs)]
    assert figures.tokens_per_pack == Counter(pack.cost.num_tokens for pack in packs)
    assert figures.patches_per_pack == Counter(pack.cost.num_patches for pack in packs)
    assert figures.samples_per_pack == Counter(len(pack.keys) for pack in packs)
    assert figures.fill["tokens"] == pytest.approx(
        sum(p.cost.num_tokens for p in packs) / (4096 * len(packs))
    )
    assert figures.fill["patches"] is None, "no limit was set"
    assert figures.num_read == 20 == figures.num_samples + sum(figures.refused.values())
    assert figures.padding(figures.num_packs) < figures.padding(figures.num_samples)


def test_a_plan_has_the_figures_that_its_packs_will_have(made):
    plan, packed = figures_of(made / "plan"), figures_of(made / "packed")
    for name in (
        "num_packs",
        "num_samples",
        "num_read",
        "load",
        "tokens_per_pack",
        "samples_per_pack",
        "refused",
    ):
        assert getattr(plan, name) == getattr(packed, name), name
    assert plan.group_price is not None
    assert [each.key for each in plan.examples] == [each.key for each in packed.examples]


def test_refused_rows_are_shown_with_numbers_and_their_picture(made, page):
    figures = figures_of(made / "packed")
    assert figures.refused["too_many_images"] >= 1
    example = figures.examples[0]
    assert re.match(r"\d+ images; the limit is 4", example.message)
    assert example.picture is not None
    assert html.escape(example.message) in page
    assert page.count('<img alt="picture"') == len([each for each in figures.examples if each.picture])


def test_the_page_asks_for_nothing_runs_nothing_and_escapes_what_comes_from_data(page):
    assert "b&lt;i&gt;.parquet" in page
    assert "b<i>" not in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert "<script" not in page
    assert "default-src 'none'" in page


def test_every_pack_can_be_opened_with_its_tiles_and_what_is_learnt(made, page):
    packed = load_packed(made / "packed")
    assert len(re.findall(r'<details class="pack"', page)) == len(packed)
    first = packed[0]
    assert page.count('id="pack-0"') == 1
    tokenizer = packed.load_tokenizer()
    learnt = first.input_ids[(first.labels != -100) & (first.segment_ids == 1)].tolist()
    marked = "".join(re.findall(r"<mark>(.*?)</mark>", page.split('id="pack-0"')[1].split("</section>")[0]))
    words = html.unescape(marked.replace("<br>", "\n"))
    assert words
    assert tokenizer.decode(learnt).startswith(words[:40])
    assert page.count('<img alt="tile"') > 10


def test_the_gpus_line_is_drawn(page):
    assert "A100-40, nanovlm-460m, 1 a batch" in page


def test_a_json_report_of_a_run_is_enough(made, tmp_path):
    from vlmpack import ConstantLengthDataset, VQADataset, add_image_tokens
    from vlmpack.corpus import load_corpus, load_tokenizer
    from vlmpack.geometry import Tiling

    tokenizer = load_tokenizer()
    add_image_tokens(tokenizer, Tiling())
    samples = VQADataset(load_corpus().select(range(12)), tokenizer)
    packs = ConstantLengthDataset(samples, seq_length=4096, decode=False)
    number = sum(1 for _ in packs)
    (tmp_path / "run.json").write_text(json.dumps(packs.report.as_dict()))
    figures = write_report(tmp_path / "run.json", tmp_path / "run.html")
    assert figures.num_packs == number
    assert "samples a pack" in (tmp_path / "run.html").read_text()


def test_what_is_no_report_says_what_is(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder"):
        figures_of(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="no JSON report"):
        figures_of(tmp_path / "x.json")


def test_bars_are_as_high_as_what_they_count():
    chart = histogram(Counter({1: 2, 3: 4}), "samples a pack")
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" class="bar"', chart)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert "<title>3: 4 packs</title>" in chart
    wide = histogram(Counter(np.arange(5000).tolist()), "tokens", line=(4096, "budget"))
    assert 40 < wide.count('class="bar"') <= 48
    assert "budget" in wide


def test_commands_write_the_page_and_show_a_pack(made, vlmpack, tmp_path):
    result = vlmpack("report", made / "packed", "--html", tmp_path / "page.html", "--packs", 2)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "page.html").read_text().count('<details class="pack"') == 2
    shown = vlmpack("inspect", made / "packed", "--pack", 1)
    assert shown.exit_code == 0
    keys = load_packed(made / "packed", decode=False)[1].keys
    assert all(key in shown.stdout for key in keys)
    assert vlmpack("inspect", made / "packed", "--pack", 999).exit_code == 2
    assert vlmpack("report", tmp_path / "nothing").exit_code == 2


@pytest.mark.slow
def test_a_browser_shows_the_page(made, page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    opened = page.replace('<details class="pack" id="pack-0">', '<details class="pack" id="pack-0" open>')
    (tmp_path / "page.html").write_text(opened)
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-component-update",
            "--disable-background-networking", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1240,1600", f"--screenshot={picture}", f"file://{tmp_path / 'page.html'}",
        ],
        check=True, capture_output=True, timeout=100,
    )  # fmt: skip
    from PIL import Image

    with Image.open(picture) as screenshot:
        pixels = np.asarray(screenshot.convert("RGB"))
    assert pixels.shape[:2] == (1600, 1240)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500, "charts, bars and thumbnails have colours"
