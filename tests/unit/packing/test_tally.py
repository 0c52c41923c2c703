"""Every row is accounted for, in numbers and line by line; too many refusals stop a pass, a full disk too."""

from __future__ import annotations

import json
import logging
import resource

import pytest
from torch.utils.data import DataLoader

from tests.fakes import jpeg, packs_of, row, samples_of
from vlmpack.errors import ConfigError, RefusalRatioError, StorageError
from vlmpack.loader import ResumableLoader
from vlmpack.packing import ConstantLengthDataset, PackingReport
from vlmpack.packing.account import read_account
from vlmpack.packing.shards import write_shards

BROKEN = row(images=[jpeg(64, 64)[:900]])  # the header is fine


def mixed(num_good, num_bad, num_broken=0):
    return [row(f"q{i}") for i in range(num_good)] + [{}] * num_bad + [BROKEN] * num_broken


@pytest.mark.parametrize(
    ("rows", "ratio", "stops"),
    [
        (mixed(95, 10), 0.05, True),  # 10 of 105
        (mixed(95, 5), 0.05, False),  # 5 of 100, not more
        (mixed(40, 59), 0.05, False),  # too few rows to tell
        (mixed(95, 0, 10), 0.05, True),  # found by the decoder
        (mixed(95, 10), None, False),
        (mixed(150, 1), 0, True),
    ],
)
def test_a_pass_stops_when_too_many_rows_are_refused(rows, ratio, stops):
    dataset = packs_of(rows, max_refusal_ratio=ratio)
    if not stops:
        assert sum(len(pack.keys) for pack in dataset) == sum("texts" in item for item in rows)
        return
    with pytest.raises(RefusalRatioError, match=r"of 1\d\d rows are refused, .*%: .*over max_refusal_ratio"):
        list(dataset)


def test_workers_count_their_own_and_the_last_of_them_all():
    rows = mixed(120, 0) + mixed(85, 20)
    assert len(list(packs_of(rows, max_refusal_ratio=0.15))) > 1, "20 of 225"
    with pytest.raises(RefusalRatioError, match=r"max_refusal_ratio=0\.15"):
        list(DataLoader(packs_of(rows, max_refusal_ratio=0.15), batch_size=None, num_workers=2))


def test_an_index_stops_as_well():
    with pytest.raises(RefusalRatioError, match="bad_row"):
        packs_of(mixed(95, 10), max_refusal_ratio=0.05).index()


def test_a_warning_comes_once(caplog):
    with caplog.at_level(logging.WARNING):
        list(packs_of(mixed(95, 10), warn_refusal_ratio=0.01))
    told = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(told) == 1
    assert "Row 99 for example" in told[0] or "Row 100 for example" in told[0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_refusal_ratio": 1.5}, "max_refusal_ratio must lie between 0 and 1"),
        ({"warn_refusal_ratio": -0.1}, "warn_refusal_ratio must lie between 0 and 1"),
        ({"max_refusal_ratio": True}, "max_refusal_ratio must lie"),
        ({"max_refusal_ratio": 0.1, "warn_refusal_ratio": 0.2}, "the error would come before the warning"),
    ],
)
def test_ratios_that_make_no_sense_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        packs_of([row()], **settings)


# The account


def outcomes(table):
    return {line["key"]: (line["pack"], line["reason"]) for line in table.to_pylist()}


def test_the_account_has_a_line_for_each_row(tmp_path):
    rows = [*mixed(20, 2, 1), row("a")]
    dataset = packs_of(rows, account=tmp_path / "account")
    packs = list(dataset)
    table = read_account(tmp_path / "account")
    assert table["row"].to_pylist() == list(range(24))
    expected = {key: (number, None) for number, pack in enumerate(packs) for key in pack.keys}
    expected |= {"20": (None, "bad_row"), "21": (None, "bad_row"), "22": (None, "image_truncated")}
    assert outcomes(table) == expected


def test_keys_that_repeat_keep_lines_of_their_own(tmp_path):
    rows = [{"id": "same", **row(f"q{i}")} for i in range(6)] + [{"id": "same", **BROKEN}]
    samples = samples_of(rows, key_column="id")
    list(ConstantLengthDataset(samples, seq_length=120, account=tmp_path))
    assert read_account(tmp_path)["row"].to_pylist() == list(range(7))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_account_of_a_resumed_run_has_each_row_once(tmp_path, num_workers):
    def loader():
        dataset = packs_of(mixed(60, 3, 3), lookahead=6, account=tmp_path / "account")
        return ResumableLoader(dataset, batch_size=1, collate_fn=list, num_workers=num_workers)

    first = loader()
    batches = iter(first)
    for _ in range(5):
        next(batches)
    state = first.state_dict()
    del batches
    second = loader()
    second.load_state_dict(state)
    list(second)
    table = read_account(tmp_path / "account")
    assert sorted(table["key"].to_pylist(), key=int) == [str(number) for number in range(66)]
    assert not list((tmp_path / "account").glob(".*")), "nothing unfinished is left"
    report = second.packs.report
    assert report.num_read == 66 == report.num_packed + report.total_refused


def test_there_is_no_account_to_read(tmp_path):
    with pytest.raises(ConfigError, match="there is no account in"):
        read_account(tmp_path)


# Files


def test_a_report_is_saved_whole_and_reports_of_ranks_add_up(tmp_path):
    halves = [packs_of(mixed(10, 1)), packs_of(mixed(20, 2))]
    for number, half in enumerate(halves):
        list(half)
        half.report.save(tmp_path / f"{number}.json")
    total = PackingReport.from_file(tmp_path / "0.json")
    total.merge(PackingReport.from_file(tmp_path / "1.json"))
    assert (total.num_read, total.num_packed, total.num_refused["bad_row"]) == (33, 30, 3)
    assert json.loads((tmp_path / "0.json").read_text())["num_packed"] == 10
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.json", "1.json"]


@pytest.fixture
def full_disk():
    """Let no file of this process grow over 600 bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_that_leaves_no_shard(tmp_path, full_disk):
    dataset = packs_of(mixed(30, 0), keep_images=True)
    with pytest.raises(StorageError, match=r"packs in .* cannot be written: .*Make room"):
        write_shards(dataset, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_an_error_that_leaves_the_old_report(tmp_path):
    report = packs_of([]).report
    report.save(tmp_path / "report.json")
    before = (tmp_path / "report.json").read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StorageError, match=r"the report .* cannot be written"):
            report.save(tmp_path / "report.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "report.json").read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_full_disk_stops_a_pass_that_keeps_an_account(tmp_path, full_disk):
    with pytest.raises(StorageError, match=r"the account in .* cannot be written"):
        list(packs_of(mixed(30, 0), account=tmp_path / "account"))
