from __future__ import annotations

import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from tests.unit.packing.test_charts import run_of
from vlmpack.cli.figures import show_figures
from vlmpack.cli.simulate import simulate
from vlmpack.packing.methods import METHODS
from vlmpack.packing.simulate import PATCHES_PER_TILE
from vlmpack.packing.workloads import MAX_IMAGES, MAX_TILES, MAX_TOKENS, WORKLOADS, costs_of

# Four samples that fill two packs of 100 tokens: 60 + 40 and 50 + 50.
TABLE = {"num_tokens": [60, 50, 40, 50], "num_images": [1, 0, 2, 0], "num_tiles": [1, 0, 2, 0]}
SMALL = ("--seq-length", 100, "--max-tiles", 5)


def write_csv(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


@pytest.fixture
def data(tmp_path):
    pq.write_table(pa.table({**TABLE, "name": ["a", "b", "c", "d"]}), tmp_path / "costs.parquet")
    return tmp_path / "costs.parquet"


def figures_of(result) -> dict:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def lines_of(text: str, method: str) -> list[str]:
    """Return the lines of both tables that begin with a method."""
    return [line for line in text.splitlines() if line.startswith(f" {method} ")]


def test_the_tables_have_every_figure_worked_by_hand(vlmpack, data):
    result = vlmpack("simulate", data, *SMALL, "--lookahead", "4", "--max-images", "none")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    head, body = result.stdout.splitlines()[:2]
    assert head == f"Simulated {data}"
    assert body == "4 samples; a pack holds 100 tokens, 5,120 patches: any packing needs at least 2 packs"
    packs, loads = lines_of(result.stdout, "auto")
    # 2 packs, the lower bound; 200 of 200 tokens; no limit of images; 3 of 2 x 5 tiles; 2 samples a pack.
    assert packs.split()[:8] == ["auto", "4", "2", "0.00%", "100.0%", "-", "30.0%", "2.0"]
    # 3 x 1,024 patches in one of two packs; 2 x 100^2 pairs of tokens in packs, 60^2 + 2 x 50^2 + 40^2 alone.
    # Both packs come with the fourth sample: the others waited for 3, 2 and 1 samples, 1.5 on average.
    assert loads.split() == ["auto", "4", "1,536", "3,072", "3,072", "x", "2.0", "1.5", "3"]


def test_the_figures_in_json_are_those_of_the_tables(vlmpack, data):
    figures = figures_of(
        vlmpack("simulate", data, *SMALL, "--lookahead", "4,all", "--json", "-", "--seed", 3)
    )
    assert (figures["source"], figures["num_samples"], figures["seed"]) == (str(data), 4, 3)
    assert figures["budget"] == {"max_tokens": 100, "max_images": 18, "max_patches": 5 * 1024}
    stream, whole = figures["simulations"]
    assert (stream["method"], stream["lookahead"], whole["lookahead"]) == ("auto", 4, None)
    assert (stream["mean_delay"], stream["max_delay"]) == (1.5, 3)
    assert (whole["mean_delay"], whole["max_delay"]) == (None, None)
    for run in (stream, whole):
        assert (run["lower_bound"], run["over_bound"], run["report"]["num_packs"]) == (2, 0.0, 2)
        assert run["attention_factor"] == 20_000 / 10_200
        assert run["report"]["num_tiles"] == 3
        assert run["report"]["patches_per_pack"] == {"0": 1, "3072": 1}
        assert run["report"]["derived"]["fill"] == {"tokens": 1.0, "images": 3 / 36, "patches": 0.3}
        assert run["samples_per_second"] == pytest.approx(4 / run["seconds"])


def test_every_form_of_a_file_gives_the_same_packs(vlmpack, data, tmp_path):
    rows = list(zip(*TABLE.values(), strict=True))
    text = "num_tokens,num_images,num_tiles\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows)
    patches = "num_images,num_patches,num_tokens\n" + "".join(f"{b},{1024 * c},{a}.0\n" for a, b, c in rows)
    small = pa.table({
        name: pa.array(values, kind)
        for (name, values), kind in zip(TABLE.items(), (pa.uint16(), pa.int8(), pa.float32()), strict=True)
    })
    pq.write_table(small, tmp_path / "small.parquet", row_group_size=1)
    files = [
        data,
        write_csv(tmp_path / "tiles.csv", text),
        write_csv(tmp_path / "patches.csv", patches),
        write_csv(tmp_path / "windows.csv", "\ufeff" + text.replace("\n", "\r\n")),
        tmp_path / "small.parquet",
    ]
    reports = [
        figures_of(vlmpack("simulate", file, *SMALL, "--lookahead", "all", "--json", "-"))["simulations"][0][
            "report"
        ]
        for file in files
    ]
    assert reports[0]["load"] == {"num_tokens": 200, "num_images": 3, "num_patches": 3072}
    assert all(report == reports[0] for report in reports)


def test_a_missing_axis_is_nothing(vlmpack, tmp_path):
    file = write_csv(tmp_path / "costs.csv", "num_tokens\n60\n40\n")
    (run,) = figures_of(vlmpack("simulate", file, *SMALL, "--lookahead", "2", "--json", "-"))["simulations"]
    assert run["report"]["load"] == {"num_tokens": 100, "num_images": 0, "num_patches": 0}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_named_workload_is_drawn(vlmpack, name):
    figures = figures_of(
        vlmpack("simulate", name, "--num-samples", 300, "--seed", 2, "--lookahead", "64", "--json", "-")
    )
    (run,) = figures["simulations"]
    tokens, images, tiles = costs_of(name, 300, seed=2).sum(axis=0).tolist()
    assert run["report"]["load"] == {
        "num_tokens": tokens,
        "num_images": images,
        "num_patches": 1024 * tiles,
    }
    assert run["report"]["num_packed"] == 300
    assert run["lower_bound"] <= run["report"]["num_packs"] < 1.2 * run["lower_bound"]


def test_rows_of_a_file_can_be_limited(vlmpack, data):
    figures = figures_of(
        vlmpack("simulate", data, *SMALL, "--num-samples", 2, "--lookahead", "all", "--json", "-")
    )
    assert figures["num_samples"] == 2
    assert figures["simulations"][0]["report"]["load"]["num_tokens"] == 110


def test_every_method_and_look_ahead_has_its_line(vlmpack):
    names = [method for method in METHODS if method != "auto"]
    result = vlmpack(
        "simulate",
        "vlm_tiles",
        "--num-samples",
        200,
        "--method",
        ",".join(names),
        "--lookahead",
        "50, all,50",
    )
    assert result.exit_code == 0, result.stderr
    for method in names:
        assert len(lines_of(result.stdout, method)) == 2  # in each of two tables
    assert len([line for line in result.stdout.splitlines() if line.split()[:1] == ["all"]]) == 2 * len(names)
    assert "chose" not in result.stdout


def test_what_auto_chose_is_said(vlmpack):
    result = vlmpack("simulate", "text", "--num-samples", 200, "--lookahead", "50,all")
    chosen = [line for line in result.stdout.splitlines() if " chose " in line]
    assert [line.rsplit(" for ", 1)[1] for line in chosen] == ["50", "all"]
    assert all(line.split()[2] in METHODS for line in chosen)


def test_limits_in_tiles_and_in_patches_are_the_same(vlmpack):
    common = ("simulate", "vlm_tiles", "--num-samples", 200, "--lookahead", "all", "--json", "-")
    budgets = {}
    for option, value in (("--max-tiles", 40), ("--max-patches", 40 * 1024), ("--max-tiles", "none")):
        budgets[option, value] = figures_of(vlmpack(*common, option, value))["budget"]["max_patches"]
    assert list(budgets.values()) == [40960, 40960, None]
    figures = figures_of(vlmpack(*common, "--patches-per-tile", 256))
    assert figures["budget"]["max_patches"] == 48 * 256
    tiles = int(costs_of("vlm_tiles", 200)[:, 2].sum())
    report = figures["simulations"][0]["report"]
    assert (report["load"]["num_patches"], report["num_tiles"]) == (256 * tiles, tiles)


def test_samples_over_the_budget_are_left_out_and_counted(vlmpack, data):
    result = vlmpack("simulate", data, "--seq-length", 50, "--max-images", 1, "--lookahead", "all")
    assert result.exit_code == 0, result.stderr
    # Row 0 has 60 tokens, row 2 has 2 images; two of 50 tokens are left.
    assert "2 samples, 2 refused; a pack holds 50 tokens, 1 images" in result.stdout
    (line,) = (line for line in result.stdout.splitlines() if "over_budget" in line)
    assert line.split("   ")[-1].strip() == "0: 60 tokens where a pack holds 50. Raise the limit"
    assert "2" in line.split()


def test_balance_spreads_what_it_is_told_to(vlmpack):
    common = ("simulate", "vlm_tiles", "--num-samples", 4000, "--lookahead", "256", "--json", "-")
    (plain,) = figures_of(vlmpack(*common))["simulations"]
    (even,) = figures_of(vlmpack(*common, "--balance", "attention"))["simulations"]
    assert even["balance"] == "attention"
    spread = [run["attention_per_pack"]["p95"] / run["attention_per_pack"]["mean"] for run in (plain, even)]
    assert spread[1] < spread[0]


def test_a_picture_is_drawn(vlmpack, data, tmp_path):
    result = vlmpack("simulate", data, *SMALL, "--lookahead", "2,all", "--plot", tmp_path / "figures.png")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"picture: {tmp_path / 'figures.png'}"
    with Image.open(tmp_path / "figures.png") as picture:
        assert picture.width == 13 * 150
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10  # it is not blank


def test_long_names_take_two_lines_where_the_terminal_is_narrow(vlmpack, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = vlmpack(
        "simulate", "text", "--num-samples", 100, "--method", "worst_fit_decreasing", "--lookahead", "50,100"
    )
    lines = result.stdout.splitlines()
    first = next(at for at, line in enumerate(lines) if line.split()[:2] == ["worst_fit_", "50"])
    assert lines[first + 1].split()[:2] == ["decreasing", "100"]
    assert max(map(len, lines)) <= 80


def test_a_name_and_one_look_ahead_share_a_line_of_the_table():
    console = Console(file=io.StringIO(), width=80)
    show_figures(console, [run_of("worst_fit_decreasing", 64)], title="A [title]")
    text = console.file.getvalue()
    assert "A [title]" in text
    assert "worst_fit_" in text
    assert "decreasing     64" in text


def test_speeds_have_three_digits():
    from vlmpack.cli.figures import _short

    shown = [_short(number) for number in (7.4, 999, 1234, 45678, 456789, 1_290_000, 32_100_000)]
    assert shown == ["7", "999", "1.23 k", "45.7 k", "457 k", "1.29 M", "32.1 M"]


BAD_FILES = {
    "no tokens": ("num_images\n1\n", "has no column 'num_tokens'; there are 'num_images'"),
    "other name": ("n_tokens\n1\n", "has no column 'num_tokens' (rename 'n_tokens'?); there are 'n_tokens'"),
    "empty": ("", "is empty; its first line must name the columns, num_tokens among them"),
    "header only": ("num_tokens\n", "has no row"),
    "negative": ("num_tokens\n5\n-3\n", "row 1: num_tokens is -3; it must be a whole number from 1 to"),
    "zero": ("num_tokens\n0\n0\n5\n", "row 0: num_tokens is 0; it must be a whole number from 1 to"),
    "how many": ("num_tokens\n0\n0\n5\n", "(2 such rows of 3)"),
    "NaN": ("num_tokens\n5\nnan\n", "row 1: num_tokens is nan; it must"),
    "missing": (
        "num_tokens,num_images\n5,1\n6,\n",
        "row 1: num_images is nan; it must be a whole number from 0",
    ),
    "infinite": ("num_tokens\ninf\n", "row 0: num_tokens is inf"),
    "broken": ("num_tokens\n5\n1.5\n", "row 1: num_tokens is 1.5"),
    "huge": (
        "num_tokens\n99999999999999999999\n",
        "row 0: num_tokens is 1e+20; it must be a whole number from 1",
    ),
    "text": ("num_tokens\nfive\n", "invalid value 'five'"),
    "no value": ("num_tokens,num_tiles\n5,\n6,\n", "the column num_tiles is empty"),
    "twice": ("num_tokens,num_tokens\n5,6\n", "has more than one column num_tokens; keep one"),
    "both": (
        "num_tokens,num_tiles,num_patches\n5,1,1024\n",
        "has num_patches and num_tiles, which stand for",
    ),
    "ragged": (
        "num_tokens,num_images\n5,1,3\n",
        "Expected 2 columns, got 3",
    ),
    "too large": ("num_tokens\n5000\n6000\n", "none of 2 rows can be packed: 2 over_budget"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line(vlmpack, tmp_path, case):
    text, message = BAD_FILES[case]
    result = vlmpack("simulate", write_csv(tmp_path / "costs.csv", text))
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"num_tokens": ["5"]}, "the column num_tokens must hold whole numbers, it holds string"),
        ({"num_tokens": [True]}, "it holds bool"),
        ({"num_tokens": [[5]]}, "it holds list"),
        ({"num_tokens": [5, None]}, "row 1: num_tokens is nan"),
        ({"num_tokens": [2**62]}, "row 0: num_tokens is 4.61168601842739e+18"),
        ({"num_tokens": pa.array([], pa.int64())}, "has no row"),
        ({"tokens": [5]}, "has no column 'num_tokens' (rename 'tokens'?)"),
    ],
)
def test_a_bad_parquet_file_is_one_line(vlmpack, tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "costs.parquet")
    result = vlmpack("simulate", tmp_path / "costs.parquet")
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_file_that_is_no_parquet_is_one_line(vlmpack, tmp_path):
    result = vlmpack("simulate", write_csv(tmp_path / "costs.parquet", "num_tokens\n5\n"))
    assert result.exit_code == 1
    assert f"{tmp_path / 'costs.parquet'} cannot be loaded: " in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vlmtiles",), "vlmtiles is neither a workload nor a Parquet or CSV file (did you mean vlm_tiles?)"),
        (("costs",), "the workloads are text, vlm_tiles, planted_half, over_half, anticorrelated"),
        (("nothing.csv",), "there is no file nothing.csv"),
        (("text", "--method", "best_fitt"), "--method: no packing method 'best_fitt'; choose of auto"),
        (("text", "--method", "auto,,"), "--method must be names with commas between them, got 'auto,,'"),
        (
            ("text", "--lookahead", "256,none"),
            "--lookahead must be numbers of at least 1, or all, got 'none'",
        ),
        (("text", "--lookahead", "0"), "--lookahead must be numbers of at least 1, or all, got '0'"),
        (("text", "--lookahead", "99999999"), "lookahead is 99999999, at most 65536 samples can wait"),
        (("text", "--seq-length", "0"), "--seq-length must be from 1 to 1,000,000,000, got 0"),
        (("text", "--max-images", "-1"), "--max-images must be from 0 to 1,000,000,000, got -1"),
        (("text", "--max-tiles", "many"), "'many' is neither a whole number nor 'none'"),
        (("text", "--patches-per-tile", "0"), "--patches-per-tile must be from 1 to"),
        (("text", "--max-tiles", "9", "--max-patches", "9"), "--max-tiles and --max-patches limit the same"),
        (("text", "--balance", "tokens"), "--balance must be one of patches, attention, both, got 'tokens'"),
        (("text", "--balance", "both", "--method", "next_fit"), "balance='both' needs one of fast, balanced"),
        (("text", "--json", "/nowhere/figures.json"), "--json: there is no folder /nowhere"),
        (("text", "--plot", "/nowhere/figures.png"), "--plot: there is no folder /nowhere"),
        (("text", "--plot", "figures.doc"), "--plot: figures.doc must end in one of ."),
        (("text", "--num-samples", "0"), "--num-samples"),
        (("text", "--seed", "-1"), "--seed"),
    ],
)
def test_a_wrong_setting_is_explained(vlmpack, arguments, message):
    result = vlmpack("simulate", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_missing_file_beside_another_is_named(vlmpack, data):
    result = vlmpack("simulate", data.with_name("cost.parquet"))
    assert f"(did you mean {data}?)" in result.stderr


def test_without_matplotlib_the_command_says_so_before_it_packs(vlmpack, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = vlmpack("simulate", data, "--plot", tmp_path / "figures.png")
    assert result.exit_code == 2
    assert result.stderr == "error: pictures need matplotlib: pip install 'vlmpack[plot]'\n"


def test_defaults_are_the_budget_of_the_workloads():
    defaults = {name: parameter.default for name, parameter in inspect.signature(simulate).parameters.items()}
    assert (defaults["seq_length"], defaults["max_images"], defaults["max_tiles"]) == (
        MAX_TOKENS,
        MAX_IMAGES,
        MAX_TILES,
    )
    assert defaults["patches_per_tile"] == PATCHES_PER_TILE
    assert defaults["method"] in METHODS


def test_help_names_every_workload(vlmpack):
    shown = " ".join(vlmpack("simulate", "--help").stdout.replace("│", " ").split())
    for name in WORKLOADS:
        assert name in shown


def test_progress_is_shown_on_a_terminal_and_removed(monkeypatch):
    from vlmpack.budget import PackBudget
    from vlmpack.cli.simulate import _run

    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    runs = [("fast", 256), ("next_fit", None)]
    costs = costs_of("text", 3000)
    done = _run(
        costs, PackBudget(max_tokens=4096), runs, {"seed": 0, "balance": None, "patches_per_tile": 1}, console
    )
    assert [(run.method, run.lookahead) for run in done] == runs
    assert "1 of 2 · fast, look-ahead 256" in console.file.getvalue()


def test_the_command_itself_prints_the_figures_alone_on_standard_output(tmp_path):
    arguments = ("simulate", "text", "--num-samples", "100", "--method", "next_fit", "--json", "-")
    done = subprocess.run(
        [Path(sys.executable).with_name("vlmpack"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["simulations"]) == 4
    assert done.stderr.startswith("Simulated text\n")
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
