"""Batch-size searches: the documented scenarios to the last line, the guided rule, and what goes wrong."""

from __future__ import annotations

import gc
import json
import logging
import threading
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bench_search import meets, summary
from vlmpack.batching import (
    BatchSizeExperiment,
    BatchSizeSearch,
    DocumentedRule,
    GuidedRule,
    NoFeasibleBatchSize,
    ProbeError,
    ProbeOutcome,
    Trial,
    estimate_batch_size_for_max_crops,
    search_configurations,
    simulated_oom,
    write_results,
)
from vlmpack.errors import ConfigError


def probe_up_to(largest, tried=None):
    def probe(size):
        if tried is not None:
            tried.append(size)
        if size > largest:
            raise simulated_oom()
        return 10**9 + size * 10**6

    return probe


@pytest.mark.parametrize(
    ("largest", "estimate", "tried", "found"),
    [
        (64, 19, [19, 28, 42, 63], 63),  # A: 64 would gain 1.6 %
        (18, 19, [19, 9, 14, 16], 16),  # B: 17 would gain 6 %
        (25, 19, [19, 28, 23], 23),  # C: 25 would gain 8.7 %
        (2, 19, [19, 9, 4, 2, 3], 2),
        (1, 1, [1, 2], 1),
    ],
)
def test_the_documented_scenarios(largest, estimate, tried, found):
    made = []
    result = BatchSizeSearch("documented").run(probe_up_to(largest, made), estimate=estimate, cap=64)
    assert (made, result.batch_size) == (tried, found)
    assert result.num_ooms == sum(size > largest for size in tried)


def test_a_growth_that_failed_can_end_the_search_as_one_of_the_logs_does(caplog):
    caplog.set_level(logging.INFO)
    made = []
    search = BatchSizeSearch("documented", after_growth_oom="last_good")
    assert search.run(probe_up_to(30, made), estimate=16, cap=64, name="max_crops=13").batch_size == 24
    assert made == [16, 24, 36]
    assert [record.getMessage() for record in caplog.records][-3:] == [
        "✗ Batch size 36 caused OOM",
        "  → Trying 24...",
        "Using batch size: 24 for max_crops=13",
    ]


def test_the_documented_log_line_for_line(caplog):
    caplog.set_level(logging.INFO)
    results = search_configurations(
        BatchSizeSearch("documented"),
        {"max_crops=12": estimate_batch_size_for_max_crops(12, 64)},
        lambda name: probe_up_to(64),
        cap=64,
        measure=lambda name, size: {"accuracy": 0.85},
    )
    assert [record.getMessage() for record in caplog.records] == [
        "Testing max_crops=12",
        "Finding optimal batch size for max_crops=12 (estimated: 19, starting with: 19)...",
        "✓ Batch size 19 works for max_crops=12",
        "  Trying larger batch size: 28...",
        "✓ Batch size 28 works for max_crops=12",
        "  Trying larger batch size: 42...",
        "✓ Batch size 42 works for max_crops=12",
        "  Trying larger batch size: 63...",
        "✓ Batch size 63 works for max_crops=12",
        "Using batch size: 63 for max_crops=12",
        "Measuring accuracy for max_crops=12...",
    ]
    assert all(record.levelname == "INFO" for record in caplog.records)
    assert (results[0].batch_size, results[0].metrics) == (63, {"accuracy": 0.85})


def test_configurations_do_not_learn_from_each_other():
    largest = {"max_crops=12": 63, "max_crops=13": 24}
    results = search_configurations(
        BatchSizeSearch("documented"),
        {"max_crops=12": 19, "max_crops=13": 16},
        lambda name: probe_up_to(largest[name]),
        cap=64,
    )
    assert [result.batch_size for result in results] == [63, 24]


def test_results_are_valid_json_with_the_documented_keys(tmp_path):
    search = BatchSizeSearch("documented")
    results = search_configurations(
        search,
        {"max_crops=12": 19},
        lambda name: probe_up_to(25),
        cap=64,
        measure=lambda *_: {"accuracy": 0.85},
    )
    write_results(tmp_path / "out" / "results.json", results)
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]
    assert row["max_crops"] == 12
    assert (row["accuracy"], row["batch_size_used"], row["estimate"]) == (0.85, 23, 19)
    assert (row["attempts"], row["ooms"], row["probe_peak_bytes"]) == (3, 1, 10**9 + 23 * 10**6)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"], "no draft is left"


def test_a_fixed_size_is_tried_once_and_measured():
    tried = []
    experiment = BatchSizeExperiment(
        lambda crops: probe_up_to(64, tried),
        base_batch_size=32,
        search=None,
        measure=lambda crops, size: {"seen": (crops, size)},
    )
    results = experiment.run([12, 14])
    assert [result.batch_size for result in results] == [32, 32]
    assert tried == [32, 32]
    assert results[1].metrics == {"seen": (14, 32)}


def test_an_experiment_has_the_documented_methods():
    experiment = BatchSizeExperiment(
        lambda crops: probe_up_to(25), base_batch_size=64, search=BatchSizeSearch("documented")
    )
    assert experiment._find_optimal_batch_size(12, 19) == 23
    assert experiment._estimate_batch_size_for_max_crops(12, 64) == 19
    assert experiment._estimate_batch_size_for_top_k(4, 64) == 57
    assert experiment._estimate_batch_size_for_num_blocks(8, 16, 64) == 32
    assert [result.estimate for result in experiment.run([2, 13])] == [64, 16]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"knob": "depth"}, "max_crops"),
        ({"knob": "num_blocks"}, "total_blocks"),
    ],
)
def test_experiments_without_a_knob_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        BatchSizeExperiment(lambda _: probe_up_to(1), base_batch_size=1, search=None, **settings)


def test_other_knobs_have_their_own_estimates():
    def starts(knob, values, **settings):
        experiment = BatchSizeExperiment(
            lambda _: probe_up_to(64),
            base_batch_size=64,
            search=BatchSizeSearch("documented", max_attempts=1),
            knob=knob,
            **settings,
        )
        return [result.trials[0].batch_size for result in experiment.run(values)]

    assert starts("top_k", [1, 4, 16]) == [64, 57, 44]
    assert starts("num_blocks", [4, 16], total_blocks=16) == [64, 64]


# ---- the guided rule ---------------------------------------------------------------------------


def test_the_guided_search_draws_a_line_through_the_peaks():
    # 10 + 0.5 a sample, limit 60: 100 samples. From 40 (30 bytes) in proportion 40 * 60 * 0.999 / 30 = 79,
    # there 49.5; the line through both meets 59.94 at 99.88, so 99 is next.
    rule = GuidedRule(limit_bytes=60)
    trials = []
    while (size := rule.next_size(trials, 40, 1000)) is not None:
        trials.append(Trial(size, size <= 100, 10 + 0.5 * size if size <= 100 else None))
    assert [trial.batch_size for trial in trials][:3] == [40, 79, 99]
    assert max(trial.batch_size for trial in trials if trial.fits) >= 99


def test_what_is_held_without_a_batch_saves_a_try():
    known = GuidedRule(limit_bytes=60, static_bytes=10)
    # With 10 at 0 the first reading (30 at 40) is a line already: it meets 59.94 at 99.88.
    assert known.next_size([Trial(40, fits=True, peak_bytes=30)], 40, 1000) == 99


def test_without_readings_it_doubles_and_cuts_the_gap():
    rule = GuidedRule(limit_bytes=1.0)
    tried = [Trial(8, fits=True, peak_bytes=None)]
    assert rule.next_size(tried, 8, 1000) == 16
    tried.append(Trial(16, fits=False, peak_bytes=None))
    assert rule.next_size(tried, 8, 1000) == 13


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_goals_are_met_in_worlds_whose_memory_is_hidden(factor):
    row = summary("guided", factor, 400)
    assert meets(row), row
    assert not meets(summary("documented", factor, 100)), "the goals are not met by anything"


def test_a_calibrated_model_saves_tries():
    row = summary("guided, calibrated", 1.05, 200)
    assert meets(row), row


@given(
    slope=st.floats(0.01, 10),
    static=st.floats(0, 50),
    start=st.integers(1, 400),
    cap=st.integers(1, 500),
)
def test_the_guided_rule_stays_between_what_works_and_what_failed(slope, static, start, cap):
    rule = GuidedRule(limit_bytes=100)
    trials, start = [], min(start, cap)
    while (size := rule.next_size(trials, start, cap)) is not None:
        assert 1 <= size <= cap
        assert size not in [trial.batch_size for trial in trials]
        assert not any(not trial.fits and trial.batch_size <= size for trial in trials)
        assert not any(trial.fits and trial.batch_size >= size for trial in trials)
        peak = static + slope * size
        trials.append(Trial(size, peak <= 100, int(peak) if peak <= 100 else None))
    assert 1 <= len(trials) <= 8


def test_a_peak_that_does_not_grow_is_no_reason_to_divide_by_zero():
    rule = GuidedRule(limit_bytes=100)
    flat = [Trial(4, fits=True, peak_bytes=50), Trial(8, fits=True, peak_bytes=50)]
    assert rule.next_size(flat, 4, 1000) == 16
    assert rule.next_size(flat, 4, 10) == 10


# ---- what goes wrong ---------------------------------------------------------------------------


def test_a_range_without_a_feasible_size_names_every_try():
    with pytest.raises(NoFeasibleBatchSize, match=r"max_crops=14.*tried 8, 4, 2, 1.*smaller"):
        BatchSizeSearch("documented").run(probe_up_to(0), estimate=8, cap=64, name="max_crops=14")
    with pytest.raises(NoFeasibleBatchSize, match="tried 8, 3, 1"):
        BatchSizeSearch(limit_bytes=100).run(probe_up_to(0), estimate=8, cap=64)


def test_another_error_than_oom_ends_the_search_with_its_words():
    def probe(size):
        raise KeyError("pixel_values")

    with pytest.raises(ProbeError, match=r"batch size 8.*not for lack of memory: KeyError: 'pixel_values'"):
        BatchSizeSearch("documented").run(probe, estimate=8, cap=64)


def test_a_probe_that_hangs_is_given_up():
    released = threading.Event()
    with pytest.raises(ProbeError, match=r"batch size 8 did not end within 0.05 s"):
        BatchSizeSearch("documented", timeout_s=0.05).run(
            lambda size: released.wait(30) and None, estimate=8, cap=64
        )
    released.set()


def test_a_probe_with_a_time_limit_that_ends_is_like_any_other():
    found = BatchSizeSearch("documented", timeout_s=30).run(probe_up_to(25), estimate=19, cap=64)
    assert found.batch_size == 23


def test_a_probe_that_returns_nonsense_is_told_what_to_return():
    with pytest.raises(ProbeError, match="returns bytes"):
        BatchSizeSearch("documented").run(lambda size: "fine", estimate=8, cap=64)


def test_an_outcome_may_say_itself_that_it_does_not_fit():
    def probe(size):
        return ProbeOutcome(fits=size <= 25, peak_bytes=size)

    assert BatchSizeSearch("documented").run(probe, estimate=19, cap=64).batch_size == 23


def test_nothing_of_a_failed_try_stays_in_memory():
    alive = []

    class Activation:
        pass

    def probe(size):
        gc.collect()
        assert not any(reference() is not None for reference in alive), "the last try's tensors are gone"
        tensor = Activation()
        alive.append(weakref.ref(tensor))
        if size > 10:
            raise simulated_oom()

    assert BatchSizeSearch("documented").run(probe, estimate=40, cap=64).batch_size == 10
    assert len(alive) == 5, "40, 20, 10, 15 and 12 were tried"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "bisect"}, "method"),
        ({"method": "guided"}, "limit_bytes"),
        ({"method": "documented", "growth": 1.0}, "growth above 1"),
        ({"method": "documented", "max_attempts": 0}, "max_attempts"),
        ({"method": "guided", "limit_bytes": 0}, "limit_bytes positive"),
        ({"method": "guided", "limit_bytes": 1, "growth": 2.0}, "no such setting"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        BatchSizeSearch(**settings)


@pytest.mark.parametrize("cap", [0, True, 1.5])
def test_wrong_limits_are_refused(cap):
    with pytest.raises(ConfigError, match="largest batch size"):
        BatchSizeSearch("documented").run(probe_up_to(1), estimate=1, cap=cap)


def test_no_configuration_is_no_search():
    with pytest.raises(ConfigError, match="no configuration"):
        search_configurations(BatchSizeSearch("documented"), {}, lambda name: probe_up_to(1), cap=1)


def test_rules_are_pure_functions_of_the_tries():
    rule = DocumentedRule()
    tries = [Trial(19, fits=True, peak_bytes=None), Trial(28, fits=False, peak_bytes=None)]
    assert [rule.next_size(tries, 19, 64) for _ in range(3)] == [23, 23, 23]
