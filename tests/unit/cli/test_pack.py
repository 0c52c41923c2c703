from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from tests import fakes
from tests.unit.cli.conftest import rows_of, write_json_lines
from vlmpack.corpus import load_tokenizer
from vlmpack.errors import SourceError


@pytest.fixture
def data(tmp_path):
    """Four real rows with a small picture each."""
    path = tmp_path / "data" / "rows.jsonl"
    write_json_lines(path, rows_of())
    return path


def text_rows(folder: Path, num_rows: int, *, words: int = 1) -> Path:
    """Write rows without images."""
    rows = [{"texts": [{"user": f"Question {i}?", "assistant": "word " * words}]} for i in range(num_rows)]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_table_has_every_figure_of_the_report(vlmpack, data, tmp_path):
    result = vlmpack("pack", data, "--json", tmp_path / "report.json", "--max-patches", 8192)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    report = json.loads((tmp_path / "report.json").read_text())
    lines = {
        line.split("  ")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("  ")
    }
    tokens, derived = report["load"]["num_tokens"], report["derived"]
    assert "1   no packing of these samples needs fewer" in lines["packs"]
    assert "4   of 4 rows, 4.0 a pack" in lines["samples"]
    assert f"{tokens / 4096:.1%}   {tokens:,} of 1 x 4,096" in lines["fill: tokens"]
    assert "22.2%   4 of 1 x 18" in lines["fill: images"]  # 4 / 18
    assert "50.0%   4,096 of 1 x 8,192" in lines["fill: patches"]
    assert (
        f"{derived['padding']:.1%}   {derived['padding_unpacked']:.1%} with one sample a row"
        in lines["padding"]
    )
    assert "4   4 tiles" in lines["images"]
    assert f"{report['num_supervised']:,}   " in lines["supervised tokens"]
    assert "0   no row" in lines["refused"]


def test_shards_load_back_and_hold_what_the_report_counts(vlmpack, data, tmp_path):
    result = vlmpack("pack", data, "--out", tmp_path / "out", "--json", "-", "--max-images", 2)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert "1 shard, " in result.stderr
    loaded = load_dataset(str(tmp_path / "out"), split="train")
    assert len(loaded) == report["num_packs"] == 2
    assert sorted(key for row in loaded for key in row["keys"]) == ["0", "1", "2", "3"]
    assert sum(len(row["input_ids"]) for row in loaded) == report["load"]["num_tokens"]
    # As wide and as high as in the corpus; row 150 is turned by its EXIF orientation, 128 x 128 all the same.
    sizes = sorted(image.size for row in loaded for image in row["images"])
    assert sizes == [(102, 102), (128, 128), (220, 220), (400, 100)]


def test_shards_carry_the_options_that_made_them(vlmpack, data, tmp_path):
    import pyarrow.parquet as pq

    vlmpack("pack", data, "--out", tmp_path / "out", "--no-decode", "--seed", 3)
    (file,) = (tmp_path / "out").iterdir()
    settings = json.loads(pq.read_schema(file).metadata[b"vlmpack"])
    assert (settings["seed"], settings["dataset"], settings["decode"]) == (3, str(data), False)


def test_workers_pack_the_same_rows(vlmpack, data, tmp_path):
    result = vlmpack("pack", data, "--num-workers", 2, "--json", "-", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["num_read"], report["num_packed"], report["num_tiles"]) == (4, 4, 4)
    loaded = load_dataset(str(tmp_path / "out"), split="train").remove_columns("images")
    assert sorted(key for row in loaded for key in row["keys"]) == ["0", "1", "2", "3"]


def test_a_stream_of_one_file_uses_one_worker(vlmpack, tmp_path):
    rows = [fakes.row(f"Question {i}?") for i in range(3)]
    Dataset.from_list([{"texts": row["texts"]} for row in rows]).to_parquet(tmp_path / "a.parquet")
    result = vlmpack("pack", tmp_path / "a.parquet", "--streaming", "--num-workers", 2, "--json", "-")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["num_packed"] == 3


def test_a_corrupt_image_is_counted_and_the_rest_is_packed(vlmpack, tmp_path):
    rows = rows_of()
    data = rows[3]["images"][0]["bytes"]
    rows[3]["images"][0]["bytes"] = data[: len(data) // 2]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    result = vlmpack("pack", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "3   of 4 rows" in result.stdout
    (line,) = (line for line in result.stdout.splitlines() if "image_truncated" in line)
    assert line.split()[:3] == ["image_truncated", "1", "3:"]


def test_without_decoding_only_headers_are_checked(vlmpack, tmp_path):
    rows = rows_of()
    data = rows[3]["images"][0]["bytes"]
    rows[3]["images"][0]["bytes"] = data[: len(data) // 2]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    result = vlmpack("pack", tmp_path / "rows.jsonl", "--no-decode", "--json", "-")
    assert json.loads(result.stdout)["num_packed"] == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_with_wrong_columns_are_all_refused_with_the_reason(vlmpack, tmp_path, num_workers):
    Dataset.from_list([{"question": "What?", "answer": "That."}] * 3).to_parquet(tmp_path / "a.parquet")
    result = vlmpack("pack", tmp_path / "a.parquet", "--num-workers", num_workers, "--json", "-")
    assert result.exit_code == 1
    assert "bad_row" in result.stderr
    assert "a row needs a column texts, messages or conversations" in result.stderr
    assert "'question', 'answer'" in result.stderr
    assert "error: none of 3 rows can be packed" in result.stderr
    assert json.loads(result.stdout)["num_refused"] == {"bad_row": 3}


def test_nothing_is_written_when_everything_is_refused(vlmpack, tmp_path):
    path = text_rows(tmp_path, 3, words=200)
    result = vlmpack("pack", path, "--seq-length", 100, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "sample_too_long" in result.stderr
    assert not (tmp_path / "out").exists()


def test_limits_can_be_lifted(vlmpack, tmp_path):
    write_json_lines(tmp_path / "rows.jsonl", rows_of((2, 5)))  # 4 and 6 images, each one tile
    path = tmp_path / "rows.jsonl"
    report = json.loads(vlmpack("pack", path, "--json", "-", "--no-decode").stdout)
    assert report["num_refused"] == {"too_many_images": 1}
    options = ("--max-images-per-example", "none", "--max-images", "none")
    report = json.loads(vlmpack("pack", path, "--json", "-", "--no-decode", *options).stdout)
    assert report["num_refused"] == {}
    assert report["budget"]["max_images"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--oversize", "fewertiles"), "--oversize must be 'drop', 'raise'"),
        (("--method", "knapsack"), "--method must be 'auto'"),
        (("--seq-length", "0"), "--seq-length must be greater than 0, got 0"),
        (("--max-patches", "-1"), "--max-patches must be greater than or equal to 0, got -1"),
        (("--tile-size", "500"), "tile_size 500 does not divide max_side 2048"),
        (("--json", "/nowhere/report.json"), "--json: there is no folder /nowhere"),
        (("--tokenizer", "."), "--tokenizer: there is no tokenizer in ."),
        (("--max-images", "many"), "'many' is neither a whole number nor 'none'"),
        (("--num-workers", "two"), "--num-workers"),
        (("--seqlength", "1024"), "--seq-length"),
        (("--max-rows", "0"), "--max-rows"),
    ],
)
def test_a_wrong_setting_is_explained(vlmpack, data, options, message):
    result = vlmpack("pack", data, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_wrong_setting_is_found_before_the_data_is(vlmpack):
    result = vlmpack("pack", "/nowhere", "--seq-length", 0)
    assert "--seq-length" in result.stderr


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_is_one_line_wherever_it_arose(vlmpack, tmp_path, num_workers):
    path = text_rows(tmp_path, 3)
    result = vlmpack("pack", path, "--key-column", "id", "--num-workers", num_workers)
    assert result.exit_code == 2
    assert result.stderr == "error: key_column 'id' is not a column; there are 'texts'\n"


def test_policy_raise_stops_with_the_sample_named(vlmpack, tmp_path):
    path = text_rows(tmp_path, 1, words=200)
    result = vlmpack("pack", path, "--seq-length", 100, "--oversize", "raise")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: sample 0: ")


def test_a_folder_with_files_is_not_written_to(vlmpack, data):
    result = vlmpack("pack", data, "--out", data.parent)
    assert result.exit_code == 2
    assert "is not empty" in result.stderr
    assert sorted(path.name for path in data.parent.iterdir()) == ["images", "rows.jsonl"]


def test_a_traceback_is_shown_on_request(vlmpack, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    result = vlmpack("pack", tmp_path / "rows.jsonl", "--traceback")
    assert isinstance(result.exception, SourceError)


def test_a_tokenizer_folder_and_a_template_file_are_used(vlmpack, tmp_path):
    path = text_rows(tmp_path, 2)
    load_tokenizer().save_pretrained(tmp_path / "tokenizer")
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    own = json.loads(vlmpack("pack", path, "--tokenizer", tmp_path / "tokenizer", "--json", "-").stdout)
    default = json.loads(vlmpack("pack", path, "--json", "-").stdout)
    assert own == default
    other = vlmpack("pack", path, "--chat-template", tmp_path / "chat.jinja", "--json", "-")
    assert json.loads(other.stdout)["load"] != default["load"]


def test_a_missing_template_file_is_one_line(vlmpack, tmp_path):
    result = vlmpack("pack", text_rows(tmp_path, 1), "--chat-template", tmp_path / "none.jinja")
    assert result.exit_code == 1
    assert "none.jinja" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_command_itself_prints_the_report_alone_on_standard_output(data, tmp_path):
    command = [
        Path(sys.executable).with_name("vlmpack"),
        "pack",
        data,
        "--json",
        "-",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_packed"] == 4
    assert done.stderr.startswith(f"Packed {data}")
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
