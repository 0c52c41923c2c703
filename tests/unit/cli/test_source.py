"""Every form of a data set gives the same packs."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from tests import fakes
from tests.unit.cli.conftest import SMALL_ROWS, rows_of, write_json_lines
from vlmpack.corpus import load_corpus


def parquet_file(folder):
    load_corpus().select(SMALL_ROWS).to_parquet(folder / "data [1].parquet")
    return folder / "data [1].parquet"


def parquet_folder(folder):
    load_corpus().select(SMALL_ROWS[:2]).to_parquet(folder / "train-00000-of-00002.parquet")
    load_corpus().select(SMALL_ROWS[2:]).to_parquet(folder / "train-00001-of-00002.parquet")
    return folder


def image_folder(folder):
    lines = []
    for number, row in enumerate(rows_of()):
        (image,) = row["images"]
        name = f"{number}-{image['path']}"
        (folder / name).write_bytes(image["bytes"])
        lines.append(json.dumps({"file_name": name, "texts": row["texts"]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def json_lines_file(folder):
    write_json_lines(folder / "rows.jsonl", rows_of())
    return folder / "rows.jsonl"


def json_lines_folder(folder):
    json_lines_file(folder)
    return folder


def json_array(folder):
    path = json_lines_file(folder)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    path.unlink()
    return folder / "rows.json"


def saved_to_disk(folder):
    load_corpus().select(SMALL_ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder):
    train, test = load_corpus().select(SMALL_ROWS), load_corpus().select([0])
    DatasetDict({"test": test, "train": train}).save_to_disk(folder / "saved")
    return folder / "saved"


def arrow_file(folder):
    return next(saved_to_disk(folder).glob("*.arrow"))


FORMS = [
    parquet_file, parquet_folder, image_folder, json_lines_file, json_lines_folder, json_array,
    saved_to_disk, saved_splits, arrow_file,
]  # fmt: skip


def num_tokens() -> int:
    """Return the tokens of the rows: the text's, 64 image tokens and a position token instead of the image's
    placeholder, and an appended padding token."""
    total = 0
    for row in rows_of():
        contents = [turn[role] for turn in row["texts"] for role in ("user", "assistant")]
        contents[0] = "<|image|>" + contents[0]
        roles = ("user", "assistant") * len(row["texts"])
        text = "".join(
            f"<|im_start|>{role}\n{content}<|im_end|>\n"
            for role, content in zip(roles, contents, strict=True)
        )
        total += len(fakes.tokenizer()(text, add_special_tokens=False)["input_ids"]) - 1 + 65 + 1
    return total


@pytest.mark.parametrize(
    ("form", "options"),
    [(form, ()) for form in FORMS]
    + [(form, ("--streaming",)) for form in (parquet_file, parquet_folder, image_folder)],
)
def test_every_form_gives_the_same_report(vlmpack, tmp_path, form, options):
    path = form(tmp_path)
    result = vlmpack("pack", path, "--json", "-", "--no-decode", *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["num_read"] == report["num_packed"] == 4
    # One picture of one tile each: 4 images, 4 tiles of 1,024 patches.
    assert report["load"]["num_images"] == report["num_tiles"] == 4
    assert report["load"]["num_patches"] == 4 * 1024
    assert report["load"]["num_tokens"] == num_tokens()
    assert report["num_packs"] == 1


def test_rows_can_be_limited(vlmpack, tmp_path):
    for form, options in (
        (parquet_file, ()),
        (parquet_file, ("--streaming",)),
        (json_lines_file, ()),
        (json_array, ()),
    ):
        result = vlmpack("pack", form(tmp_path), "--json", "-", "--no-decode", "--max-rows", 3, *options)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["num_read"] == 3


def test_a_split_is_chosen(vlmpack, tmp_path):
    result = vlmpack("pack", saved_splits(tmp_path), "--split", "test", "--json", "-", "--no-decode")
    assert json.loads(result.stdout)["num_read"] == 1


def test_a_missing_split_names_those_that_there_are(vlmpack, tmp_path):
    result = vlmpack("pack", saved_splits(tmp_path), "--split", "validation")
    assert result.exit_code == 2
    assert "has no split 'validation'; it has test, train" in result.stderr


def test_several_splits_without_train_ask_for_a_choice(vlmpack, tmp_path):
    rows = Dataset.from_list([{"texts": [{"user": "Hello?", "assistant": "Yes."}]}])
    DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "saved")
    result = vlmpack("pack", tmp_path / "saved")
    assert result.exit_code == 2
    assert "has the splits a, b; choose one with --split" in result.stderr


def test_json_lines_files_of_a_folder_are_its_splits(vlmpack, tmp_path):
    for name in ("train", "test"):
        write_json_lines(tmp_path / f"{name}.jsonl", rows_of()[: 4 if name == "train" else 2])
    assert json.loads(vlmpack("pack", tmp_path, "--json", "-", "--no-decode").stdout)["num_read"] == 4
    result = vlmpack("pack", tmp_path, "--split", "test", "--json", "-", "--no-decode")
    assert json.loads(result.stdout)["num_read"] == 2


def test_a_file_without_splits_refuses_the_option(vlmpack, tmp_path):
    result = vlmpack("pack", json_lines_file(tmp_path), "--split", "test")
    assert result.exit_code == 2
    assert "has no splits; leave the option out" in result.stderr


def test_a_broken_line_is_one_refused_row(vlmpack, tmp_path):
    path = json_lines_file(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"texts": oops', "", lines[1], "7"]) + "\n")
    result = vlmpack("pack", path, "--json", "-", "--no-decode")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["num_packed"] == 2
    # The second line is not JSON, the third is empty and no row, the last is no mapping.
    assert [(refusal["key"], refusal["reason"]) for refusal in report["refusals"]] == [
        ("1", "source_error"),
        ("3", "bad_row"),
    ]


def test_contents_of_mixed_types_in_json_lines_stay_what_they_are(vlmpack, tmp_path):
    text = {"role": "user", "content": "Hello?"}
    typed = {"role": "user", "content": [{"type": "text", "text": "Hello?"}]}
    reply = {"role": "assistant", "content": "Yes."}
    for name, first in (("plain", text), ("typed", typed)):
        rows = [{"id": 1, "messages": [first, reply]}, {"id": "b", "messages": [text, reply]}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loads = [
        json.loads(vlmpack("pack", tmp_path / f"{name}.jsonl", "--json", "-").stdout)["load"]
        for name in ("plain", "typed")
    ]
    assert loads[0] == loads[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no file or folder ./nowhere"),
        ("/nowhere/at/all", "there is no file or folder /nowhere/at/all"),
        ("rows.jsonl", "there is no file or folder rows.jsonl"),
        ("owner/name", "if it is a data set on the Hugging Face Hub, add --streaming"),
    ],
)
def test_no_such_path(vlmpack, name, message):
    result = vlmpack("pack", name)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_misspelt_path_is_corrected(vlmpack, tmp_path):
    json_lines_file(tmp_path)
    result = vlmpack("pack", tmp_path / "row.jsonl")
    assert f"did you mean {tmp_path / 'rows.jsonl'}?" in result.stderr


def test_an_empty_folder_says_what_belongs_there(vlmpack, tmp_path):
    (tmp_path / "empty").mkdir()
    result = vlmpack("pack", tmp_path / "empty")
    assert result.exit_code == 2
    assert "has no data in it; a folder must hold Parquet or JSON Lines files" in result.stderr


def test_a_file_of_another_kind_says_which_are_known(vlmpack, tmp_path):
    (tmp_path / "data.xlsx").write_bytes(b"PK")
    result = vlmpack("pack", tmp_path / "data.xlsx")
    assert result.exit_code == 2
    assert "must end in one of .arrow, .json, .jsonl, .ndjson, .parquet" in result.stderr


@pytest.mark.parametrize(("name", "data"), [("a.parquet", b"PAR1 but no more"), ("a.json", b'[{"texts": ')])
def test_a_broken_file_is_named(vlmpack, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    result = vlmpack("pack", tmp_path / name)
    assert result.exit_code == 1
    assert str(tmp_path / name) in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_an_empty_file_is_an_empty_data_set(vlmpack, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    result = vlmpack("pack", tmp_path / "rows.jsonl")
    assert result.exit_code == 1
    assert "the data set is empty" in result.stderr
