"""Tries on disk: a search goes on after a crash, and what killed it twice is not tried again."""

from __future__ import annotations

import pytest

from tests.unit.batching.test_search import probe_up_to
from vlmpack.batching import BatchSizeSearch, SearchStore, Trial
from vlmpack.errors import ConfigError


class KilledError(BaseException):
    """Stands for the end of the process."""


def killed_at(sizes, largest):
    def probe(size):
        if size in sizes:
            sizes.remove(size)
            raise KilledError
        return probe_up_to(largest)(size)

    return probe


def search_through_kills(path, kills, monkeypatch):
    """Run a search whose process dies at each of the sizes; a dead process writes nothing more."""
    monkeypatch.setattr(SearchStore, "cancel", lambda *_: None)
    probe, tried = killed_at(kills, 25), []
    while True:
        try:
            search = BatchSizeSearch(
                "documented",
                store=SearchStore(path),
                on_trial=lambda name, trial: tried.append(trial.batch_size),
            )
            return search.run(probe, estimate=19, cap=64, name="max_crops=12"), tried
        except KilledError:
            continue


def test_a_killed_search_goes_on_and_tries_nothing_twice(tmp_path, monkeypatch):
    result, tried = search_through_kills(tmp_path / "tries.jsonl", [28], monkeypatch)
    assert (result.batch_size, tried) == (23, [19, 28, 23]), "as without the kill"


def test_a_size_that_kills_twice_does_not_fit(tmp_path, monkeypatch):
    result, tried = search_through_kills(tmp_path / "tries.jsonl", [28, 28], monkeypatch)
    assert (result.batch_size, tried) == (23, [19, 23])
    assert Trial(28, fits=False, peak_bytes=None) in result.trials


def test_an_interrupted_try_is_made_again_however_often(tmp_path):
    path, kills = tmp_path / "tries.jsonl", [28, 28, 28]
    probe = killed_at(kills, 40)
    for _ in range(3):
        with pytest.raises(KilledError):
            BatchSizeSearch("documented", store=SearchStore(path)).run(probe, estimate=19, cap=64)
    result = BatchSizeSearch("documented", store=SearchStore(path)).run(probe, estimate=19, cap=64)
    assert [trial.batch_size for trial in result.trials] == [19, 28, 42, 35], "28 works after all"


def test_a_line_that_the_kill_cut_short_is_forgotten_and_a_foreign_file_refused(tmp_path):
    path = tmp_path / "tries.jsonl"
    search = BatchSizeSearch("documented", store=SearchStore(path))
    whole = search.run(probe_up_to(25), estimate=19, cap=64)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + '\n{"search": "abc", "ba')
    again = BatchSizeSearch("documented", store=SearchStore(path)).run(probe_up_to(25), estimate=19, cap=64)
    assert again.trials == whole.trials
    path.write_text("not a record\n{}\n")
    with pytest.raises(ConfigError, match="line 1"):
        BatchSizeSearch("documented", store=SearchStore(path)).run(probe_up_to(25), estimate=19, cap=64)


def test_tries_of_another_search_are_not_taken(tmp_path):
    store, tried = SearchStore(tmp_path / "tries.jsonl"), []
    BatchSizeSearch("documented", store=store).run(probe_up_to(25), estimate=19, cap=64, name="a")
    BatchSizeSearch("documented", store=store).run(probe_up_to(25, tried), estimate=19, cap=64, name="b")
    BatchSizeSearch("documented", store=store, min_gain=0.2).run(
        probe_up_to(25, tried), estimate=19, cap=64, name="a"
    )
    BatchSizeSearch("documented", store=store).run(probe_up_to(25, tried), estimate=19, cap=32, name="a")
    assert tried == [19, 28, 23] * 3
