"""The report counts each row once, adds up over workers, stays small, and survives JSON."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import costs
from vlmpack.budget import PackBudget, SampleCost
from vlmpack.errors import REASONS
from vlmpack.images import accelerators
from vlmpack.packing import PackingReport
from vlmpack.packing.report import MAX_EXAMPLES, count_pack
from vlmpack.samples import Refusal

BUDGET = PackBudget(max_tokens=100, max_images=4, max_patches=40)


def cost(tokens, images=0, patches=0):
    return SampleCost(num_tokens=tokens, num_images=images, num_patches=patches)


def counted(*packs, budget=BUDGET, appended=0, tiles=0):
    report = PackingReport(budget=budget)
    for pack in packs:
        report.num_read += len(pack)
        report.add_pack(pack, num_tiles=tiles, num_supervised=1, num_appended=appended)
    return report


def test_two_packs_worked_by_hand():
    # Pack 1: 50 + 30 tokens, 1 + 2 images, 8 + 16 patches. Pack 2: 60 tokens, no image.
    report = counted([cost(50, 1, 8), cost(30, 2, 16)], [cost(60)], appended=1, tiles=3)
    assert (report.num_packs, report.num_packed, report.num_tiles, report.num_supervised) == (2, 3, 6, 2)
    assert report.load == cost(140, 3, 24)
    assert report.max_load == (80, 3, 24)
    assert report.fill == {"tokens": 140 / 200, "images": 3 / 8, "patches": 24 / 80}
    # ceil(140 / 100) = 2 packs for the tokens, ceil(3 / 4) = 1 for the images, ceil(24 / 40) = 1 for patches
    assert report.lower_bound == 2
    # 140 positions of 2 x 100, of which 2 are appended padding
    assert report.padding == pytest.approx(1 - 138 / 200)
    # one sample a row: 3 x 100 positions
    assert report.padding_unpacked == pytest.approx(1 - 138 / 300)
    assert report.samples_per_pack == {2: 1, 1: 1}
    assert report.tokens_per_pack == {80: 1, 60: 1}
    assert report.patches_per_pack == {24: 1, 0: 1}
    assert report.attention == 50**2 + 30**2 + 60**2


def test_patches_per_pack_worked_by_hand():
    # 20 packs: 18 with 8 patches, one with 16, one with 40. At least 95 % are 19 packs: the 19th has 16.
    packs = [[cost(10, 1, 8)]] * 18 + [[cost(10, 1, 8)] * 2, [cost(10, 1, 40)]]
    report = counted(*packs)
    assert report.patches_per_pack_mean == (18 * 8 + 16 + 40) / 20 == 10.0
    assert report.patches_per_pack_p95 == 16
    assert report.patches_per_pack_max == 40
    # Of 21 packs 95 % are 19.95, so 20 packs: with one more pack of 8, the 20th is still the one with 16.
    assert counted(*packs, [cost(10, 1, 8)]).patches_per_pack_p95 == 16
    # Of 40 packs they are 38: with 20 more of 8, the first 38 have 8.
    assert counted(*packs, *[[cost(10, 1, 8)]] * 20).patches_per_pack_p95 == 8
    derived = report.as_dict()["derived"]
    assert [derived[f"patches_per_pack_{name}"] for name in ("mean", "p95", "max")] == [10.0, 16, 40]


def test_one_pack_is_its_own_mean_p95_and_maximum():
    report = counted([cost(50, 1, 8), cost(30, 2, 16)])
    figures = (report.patches_per_pack_mean, report.patches_per_pack_p95, report.patches_per_pack_max)
    assert figures == (24.0, 24, 24)


def test_an_axis_without_a_limit_has_no_fill():
    report = counted([cost(50, 9, 900)], budget=PackBudget(max_tokens=100, max_images=0))
    assert report.fill == {"tokens": 0.5, "images": None, "patches": None}
    assert report.lower_bound == 1


def test_an_empty_report_divides_by_nothing():
    report = PackingReport(budget=BUDGET)
    assert report.fill == {"tokens": None, "images": None, "patches": None}
    assert (report.lower_bound, report.padding, report.padding_unpacked, report.total_refused) == (0, 0, 0, 0)
    figures = (report.patches_per_pack_mean, report.patches_per_pack_p95, report.patches_per_pack_max)
    assert figures == (0, 0, 0)
    assert "empty" in report.why_nothing()
    assert json.loads(json.dumps(report.as_dict()))["num_read"] == 0


def refusal(number, reason="bad_row", message="m"):
    return Refusal(key=str(number), reason=reason, message=message, numbers={"n": number})


def test_refusals_beyond_the_examples_are_counted_only():
    report = PackingReport(budget=BUDGET)
    for number in range(MAX_EXAMPLES + 50):
        report.refuse(refusal(number))
    report.refuse(refusal(0, "no_text"))
    assert report.num_refused == {"bad_row": MAX_EXAMPLES + 50, "no_text": 1}
    assert report.total_refused == MAX_EXAMPLES + 51
    assert len(report.refusals) == MAX_EXAMPLES + 1
    assert report.refusals[-1].reason == "no_text"


def test_what_a_refusal_says_is_kept_short():
    report = PackingReport(budget=BUDGET)
    numbers = {"path": "p" * 10**6, "n": 3}
    report.refuse(Refusal(key="k" * 10**6, reason="bad_row", message="m" * 10**6, numbers=numbers))
    assert len(json.dumps(report.as_dict())) < 10_000
    kept = report.refusals[0]
    assert kept.message.startswith("mmm")
    assert kept.numbers["n"] == 3


def test_why_nothing_names_the_reasons_and_the_first_refusal():
    report = PackingReport(budget=BUDGET, num_read=3)
    report.refuse(refusal(7, "no_text", "it has no text"))
    report.refuse(refusal(8))
    report.refuse(refusal(9))
    said = report.why_nothing()
    assert "none of 3 rows can be packed: 2 bad_row, 1 no_text" in said
    assert "of row 7: it has no text" in said


@st.composite
def reports(draw):
    report = PackingReport(budget=BUDGET)
    for pack in draw(st.lists(st.lists(costs(100, 4, 40), min_size=1, max_size=3), max_size=4)):
        report.num_read += len(pack)
        report.add_pack(pack, num_tiles=1, num_supervised=len(pack), num_appended=len(pack))
        report.add_delays(range(len(pack)))
    for number in range(draw(st.integers(0, 5))):
        report.num_read += 1
        report.refuse(refusal(number, draw(st.sampled_from(REASONS))))
    return report


@given(reports())
def test_a_report_survives_json(report):
    twin = PackingReport.from_dict(json.loads(json.dumps(report.as_dict())))
    assert twin == report
    assert twin.as_dict() == report.as_dict()


@given(st.lists(reports(), min_size=1, max_size=4))
def test_reports_add_up_in_any_order(parts):
    totals = []
    for order in (parts, parts[::-1]):
        total = PackingReport(budget=BUDGET)
        for part in order:
            total.merge(part)
        totals.append(total)
    first, second = ({**total.as_dict(), "refusals": sorted(map(str, total.refusals))} for total in totals)
    assert first == second
    for name in ("num_read", "num_packed", "num_packs", "num_tiles", "attention", "total_delay"):
        assert getattr(totals[0], name) == sum(getattr(part, name) for part in parts)
    assert totals[0].max_delay == max(part.max_delay for part in parts)
    assert totals[0].num_read == totals[0].num_packed + totals[0].total_refused
    assert totals[0].max_load == tuple(max(part.max_load[axis] for part in parts) for axis in range(3))


def test_merging_leaves_the_other_report_alone_and_bounds_the_examples():
    first, second = PackingReport(budget=BUDGET), PackingReport(budget=BUDGET)
    for number in range(MAX_EXAMPLES):
        first.refuse(refusal(number))
        second.refuse(refusal(number))
    before = second.as_dict()
    first.merge(second)
    assert second.as_dict() == before
    assert len(first.refusals) == MAX_EXAMPLES
    assert first.num_refused == {"bad_row": 2 * MAX_EXAMPLES}


def test_decoders_are_named_where_pixels_were_made():
    def pack(num_tiles):
        tiles = torch.zeros((num_tiles, 3, 2, 2), dtype=torch.uint8)
        return SimpleNamespace(costs=(cost(5),), tiles_per_image=(), labels=torch.zeros(5), tiles=tiles)

    planned, decoded = PackingReport(budget=BUDGET), PackingReport(budget=BUDGET)
    count_pack(planned, pack(0), appends_pad=False)
    assert planned.decoders == {}
    count_pack(decoded, pack(1), appends_pad=False)
    assert decoded.decoders == accelerators() != {}
    planned.merge(decoded)
    assert planned.decoders == decoded.decoders
    assert PackingReport.from_dict(json.loads(json.dumps(planned.as_dict()))).decoders == decoded.decoders


def test_a_report_without_decoders_loads():
    plain = PackingReport(budget=BUDGET).as_dict()
    del plain["decoders"]
    assert PackingReport.from_dict(plain).decoders == {}
