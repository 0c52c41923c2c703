"""The guardian asks before, splits by what it knows, lowers its cap after an error, and recovers it."""

from __future__ import annotations

import json
import logging
import math

import pytest

from vlmpack.batching import OOMGuardian, SampleShape
from vlmpack.errors import ConfigError
from vlmpack.memory import TASKS_3D, CalibratedCost, FakeMemory, MemoryPredictor

GB = 10**9


def shapes(*tasks: str) -> list[SampleShape]:
    return [SampleShape(key=str(number), task_type=task) for number, task in enumerate(tasks)]


def texts(*lengths: int) -> list[SampleShape]:
    return [SampleShape(key=str(number), num_tokens=length) for number, length in enumerate(lengths)]


def test_a_batch_is_checked_before_it_runs():
    # 0.27 + 0.63 * n GB against 10 GB less a tenth
    guardian = OOMGuardian(TASKS_3D, backend=FakeMemory(total=10 * GB))
    assert guardian.limit_bytes == pytest.approx(9 * GB)
    assert guardian.preflight(shapes(*["T1"] * 13))  # 8.46 GB
    assert not guardian.preflight(shapes(*["T1"] * 14))  # 9.09 GB
    assert guardian.safe_batch_size(shapes("T1")[0]) == 13
    assert guardian.safe_batch_size(shapes("T3")[0]) == 7  # 0.27 + 7 * 1.1781 = 8.5
    assert guardian.safe_batch_size(shapes("T1")[0], max_batch_size=5) == 5
    assert OOMGuardian().preflight(texts(10**9))  # nothing is known: nothing is refused


def test_the_margin_is_a_fraction_under_its_documented_name():
    guardian = OOMGuardian(TASKS_3D, backend=FakeMemory(total=10 * GB))
    assert guardian.memory_margin_percent == 0.10
    guardian.memory_margin_percent = 0.20  # the document calls this reducing the margin: it raises it
    assert guardian.limit_bytes == pytest.approx(8 * GB)
    with pytest.raises(ConfigError, match=r"fraction, 0 <= margin < 1 .*got 20; 20 per cent is 0\.2"):
        guardian.memory_margin_percent = 20
    for wrong in (-0.1, 1.0, True, "0.1"):
        with pytest.raises(ConfigError, match="fraction"):
            OOMGuardian(memory_margin_percent=wrong)


def test_a_step_is_split_by_what_the_formula_says_fits():
    guardian = OOMGuardian(TASKS_3D, backend=FakeMemory(total=10 * GB))
    parts = guardian.plan(shapes(*["T1"] * 20))
    assert [len(part) for part in parts] == [10, 10]  # 13 would fit; the two are even
    assert guardian.plan(shapes(*["T1"] * 13)) == [range(13)]


@pytest.mark.parametrize("predictor", [MemoryPredictor(), CalibratedCost(TASKS_3D), TASKS_3D])
def test_every_kind_of_formula_is_taken(predictor):
    guardian = OOMGuardian(predictor, backend=FakeMemory(total=10 * GB))
    parts = guardian.plan(shapes(*["T1", "T2"] * 10))
    assert sum(len(part) for part in parts) == 20
    for part in parts:
        assert guardian.preflight(shapes(*["T1", "T2"] * 10)[part.start : part.stop])


def test_the_ratio_method_is_taken_too():
    guardian = OOMGuardian(MemoryPredictor(method="ratio"), backend=FakeMemory(total=10 * GB))
    assert guardian.preflight(shapes(*["T1"] * 12))
    assert not guardian.preflight(shapes(*["T1"] * 13))  # 8.46 GB, and a tenth on top of it


def test_after_an_error_the_cap_is_seven_tenths_of_what_failed():
    guardian = OOMGuardian()
    guardian.failed(texts(40, 60))  # 100 tokens and two samples
    assert guardian.cap == pytest.approx(0.7 * 102)
    assert guardian.num_ooms == 1
    guardian.failed(texts(200))  # larger than the cap: the cap is what counts
    assert guardian.cap == pytest.approx(0.7 * 0.7 * 102)
    before = guardian.cap
    guardian.failed(texts(10), lower_cap=False)
    assert (guardian.cap, guardian.num_ooms) == (before, 3)


def test_the_cap_grows_by_a_twentieth_after_fifty_clean_steps_up_to_what_failed():
    guardian = OOMGuardian()
    guardian.failed(texts(99))
    caps = []
    for _ in range(600):
        guardian.step_was_clean(texts(50))
        caps.append(guardian.cap)
    assert caps[48] == pytest.approx(70)
    assert caps[49] == pytest.approx(70 * 1.05)
    assert caps[99] == pytest.approx(70 * 1.05**2)
    assert caps[-1] == pytest.approx(70 * 1.05**6)  # 93.8; the next one would pass 95 % of 100
    assert OOMGuardian().cap == math.inf


def test_with_a_calibrated_formula_the_cap_grows_as_far_as_the_formula_allows():
    guardian = OOMGuardian(CalibratedCost(TASKS_3D), backend=FakeMemory(total=10 * GB))
    guardian.failed(shapes(*["T1"] * 10))
    allowed = guardian._room(shapes("T1"))
    for _ in range(5000):
        guardian.step_was_clean(shapes("T1"))
    assert guardian.cap <= allowed < guardian.cap * 1.05


def test_it_learns_from_measured_micro_batches():
    backend = FakeMemory(total=100 * GB)
    guardian = OOMGuardian(CalibratedCost(TASKS_3D), backend=backend)
    for number in range(30):  # the truth: 0.5 + 0.9 GB a sample
        batch = shapes(*["T1"] * (1 + number % 7))
        guardian.measure()
        backend.peak = int((0.5 + 0.9 * len(batch)) * GB)
        guardian.succeeded(batch, after_failure=False)
    counts = guardian.costs.counts(shapes(*["T1"] * 10))
    assert guardian.costs.predict(counts) == pytest.approx(9.5 * GB, rel=0.01)


def test_its_state_survives_json():
    guardian = OOMGuardian(CalibratedCost(TASKS_3D), backend=FakeMemory(total=10 * GB))
    guardian.failed(shapes("T1", "T2"))
    guardian.succeeded(shapes("T1"), after_failure=True)
    twin = OOMGuardian(CalibratedCost(TASKS_3D), backend=FakeMemory(total=10 * GB))
    twin.load_state_dict(json.loads(json.dumps(guardian.state_dict())))
    assert twin.state_dict() == guardian.state_dict()
    assert twin.plan(shapes("T1", "T2")) == guardian.plan(shapes("T1", "T2"))
    fresh = OOMGuardian()
    fresh.load_state_dict(json.loads(json.dumps(OOMGuardian().state_dict())))
    assert fresh.cap == math.inf


def test_a_batch_size_is_reduced_until_one():
    guardian = OOMGuardian()
    sizes = [16]
    while sizes[-1] > 1:
        sizes.append(guardian.reduce_batch_size(sizes[-1]))
    assert sizes == [16, 11, 7, 4, 2, 1]
    with pytest.raises(ConfigError, match="a batch of 1 cannot be made smaller"):
        guardian.reduce_batch_size(1)


def test_cleaning_up_while_an_error_is_handled_is_called_useless(caplog):
    guardian = OOMGuardian()
    guardian.emergency_cleanup()
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        try:
            raise RuntimeError
        except RuntimeError:
            guardian.emergency_cleanup(thorough=False)
    assert "inside an except block" in caplog.text


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="single_sample must be one of"):
        OOMGuardian(single_sample="hope")
    with pytest.raises(ConfigError, match="needs a memory_predictor and a device"):
        OOMGuardian().safe_batch_size(texts(1)[0])
    with pytest.raises(ConfigError, match="sample 0 is of task 'T9'"):
        OOMGuardian(TASKS_3D, backend=FakeMemory(total=GB)).plan(shapes("T9"))
    guardian = OOMGuardian(TASKS_3D)
    guardian.adopt(MemoryPredictor())
    assert guardian.costs.formula is TASKS_3D  # what it was made with stays
