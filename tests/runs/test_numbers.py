"""Summaries and tables, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import random
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import pytest
from scipy.stats import binomtest

from rsplugins.certificate import Claim, Guarantee, Norm
from rsplugins.rounding import exactly, round_down
from rsplugins.runs.manifest import Manifest, Selection
from rsplugins.runs.record import Record
from rsplugins.runs.rows import Row
from rsplugins.runs.run import Run
from rsplugins.runs.summary import average_radius, certified_count, interval, radius_grid, records_sha256, summarise
from rsplugins.runs.tables import compare_tables, result_tables
from rsplugins.runs.tsv import format_time, to_tsv


def row(index, label, prediction, radius, *, guarantee=Guarantee.PROBABILISTIC, norm=Norm.L2, error=None, seconds=1.0):
    alpha = 0.001 if guarantee is Guarantee.PROBABILISTIC else None
    claim = None if error else Claim(prediction, radius, guarantee, norm, alpha, "rule")
    return Row(Record(index, label, {}, 10, seconds, error), claim)


def run(*rows, method="votes", name="run", **parameters):
    manifest = Manifest(method=method, parameters=parameters, selection=Selection.of([row.index for row in rows]))
    return Run(Path(name), manifest, rows)


FIVE = (row(0, 1, 1, 0.75), row(1, 1, 1, 0.5), row(2, 1, 0, 0.9), row(3, 1, None, 0.0), row(4, 1, None, 0.0, error="NaN"))


def test_acr_is_over_all_inputs_with_zero_where_wrong_abstained_or_failed():
    assert average_radius(FIVE) == pytest.approx((0.75 + 0.5) / 5)


def test_the_summary_counts_each_kind_of_input_once():
    summary = summarise(run(*FIVE, sigma=0.25, n=100))
    assert (summary["inputs"], summary["correct"], summary["abstained"], summary["failed"]) == (5, 2, 1, 1)
    assert (summary["accuracy"], summary["abstention_rate"]) == (0.4, 0.2)
    assert (summary["guarantee"], summary["norm"], summary["alpha"], summary["sigma"], summary["n"]) == (
        "probabilistic", "l2", 0.001, 0.25, 100,
    )  # fmt: skip
    assert [(point["radius"], point["count"]) for point in summary["curve"]] == [(0.0, 2), (0.25, 2), (0.5, 2), (0.75, 1)]
    json.dumps(summary)


def test_certified_at_r_includes_radius_r_itself():
    assert [certified_count(FIVE, radius) for radius in (0.0, 0.5, 0.5000001, 0.75, 0.76)] == [2, 2, 1, 1, 0]


def test_a_run_is_labelled_with_its_weakest_claim():
    mixed = run(row(0, 1, 1, 1.0, guarantee=Guarantee.DETERMINISTIC), row(1, 1, 1, 1.0, guarantee=Guarantee.ESTIMATE))
    assert summarise(mixed)["guarantee"] == "estimate"
    assert not summarise(mixed)["certifies"]


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (257, 500), (1, 1000)])
def test_the_interval_is_wilsons(count, total):
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert interval(count, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_grid_suits_the_largest_radius():
    assert radius_grid(1.0) == [0, 0.25, 0.5, 0.75, 1.0]
    assert radius_grid(3.2) == [0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    for largest in (0.001, 0.0313, 0.2, 0.49, 2.0, 7.3, 40.0):
        grid = radius_grid(largest)
        assert 2 <= len(grid) <= 10
        assert grid[-1] <= largest < grid[-1] + grid[1] + 1e-12


def test_radii_are_never_printed_above_their_value():
    generator = random.Random(0)
    for _ in range(2000):
        value = generator.choice([generator.uniform(0, 4), generator.randrange(40) / 10, 10 ** generator.uniform(-9, 1)])
        printed = round_down(value)
        assert float(printed) <= value
        assert Fraction(repr(value)) - Fraction(printed) < Fraction(1, 10**6)
        assert float(exactly(value)) == value
    assert exactly(math.inf) == "inf"


@pytest.mark.parametrize("seconds", [0.0, 0.5, 59.999999, 61.25, 3599.5, 86399.75, 12.3456789])
def test_times_are_printed_as_python_prints_a_duration(seconds):
    hours = str(timedelta(seconds=round(seconds, 6)))
    assert format_time(seconds) == (hours if "." in hours else hours + ".000000")


def test_the_tsv_is_the_fields_format():
    lines = to_tsv(FIVE).splitlines()
    assert lines[0].split("\t") == ["idx", "label", "predict", "radius", "correct", "time"]
    assert lines[1] == "0\t1\t1\t0.750000\t1\t0:00:01.000000"
    assert lines[3] == "2\t1\t0\t0.900000\t0\t0:00:01.000000"
    assert [line.split("\t")[2:5] for line in lines[4:]] == [["-1", "0.000000", "0"]] * 2


def test_the_records_fingerprint_ignores_times_and_order_only():
    records = [one.record for one in FIVE]
    slower = [Record(**{**record.__dict__, "seconds": 99.0}) for record in reversed(records)]
    other = [*records[:-1], Record(**{**records[-1].__dict__, "label": 2})]
    assert records_sha256(records) == records_sha256(slower) != records_sha256(other)


def test_estimates_never_stand_in_a_certified_table():
    certified = run(row(0, 1, 1, 0.75), row(1, 1, 1, 0.5), method="votes")
    estimate = run(
        row(0, 1, 1, 9.0, guarantee=Guarantee.ESTIMATE), row(1, 1, 1, 9.0, guarantee=Guarantee.ESTIMATE), method="guess"
    )
    attack = run(row(0, 1, 1, 8.0, guarantee=Guarantee.EMPIRICAL), method="attack")
    box = run(row(0, 1, 1, 0.01, guarantee=Guarantee.DETERMINISTIC, norm=Norm.LINF), method="box")
    tables = {table.title: table for table in result_tables([estimate, attack, certified, box])}
    assert {title: [cells[0] for cells in table.rows] for title, table in tables.items()} == {
        "Certified, l2 norm": ["votes"],
        "Certified, linf norm": ["box"],
        "Estimates, not certificates, l2 norm": ["guess"],
        "Under attack, not certificates, l2 norm": ["attack"],
    }
    assert [title.partition(",")[0] for title in tables] == ["Certified", "Certified", "Estimates", "Under attack"]
    assert tables["Certified, l2 norm"].rows[0][1] == "probabilistic, alpha=0.001"
    assert tables["Certified, l2 norm"].header[-1] == "r=0.75"


def columns(*runs):
    [table] = result_tables(runs, [str(k) for k in range(len(runs))])
    return table.header[10:]


def box(*radii, **parameters):
    rows = [row(k, 1, 1, radius, guarantee=Guarantee.DETERMINISTIC, norm=Norm.LINF) for k, radius in enumerate(radii)]
    return run(*rows, method="box", **parameters)


def test_small_linf_radii_stand_in_columns_of_grey_levels():
    assert columns(box(0.001, 4 / 255, eps=None)) == ("r=0", *(f"r={k / 2:g}/255" for k in range(1, 9)))
    assert columns(box(0.0, 0.0)) == columns(box(4 / 255))
    assert columns(box(8 / 255))[-1] == "r=8/255"
    assert columns(box(0.3)) == ("r=0", "r=0.05", "r=0.1", "r=0.15", "r=0.2", "r=0.25", "r=0.3")
    assert columns(run(*FIVE))[-1] == "r=0.75"
    [table] = result_tables([box(4 / 255, 0.0)])
    assert table.rows[0][-1] == "50.0", "an input at the last radius counts there"


def test_runs_that_verified_one_radius_have_that_column_alone():
    assert columns(box(8 / 255, 0.0, eps=8 / 255)) == ("r=0", "r=8/255")
    assert columns(box(0.0, 0.0, eps=0.3), box(0.1, eps=0.1)) == ("r=0", "r=0.1", "r=0.3")
    assert columns(box(0.0, 0.02, eps=0.02), box(0.01))[1:3] == ("r=1/255", "r=2/255")
    assert "r=0.02" in columns(box(0.0, 0.02, eps=0.02), box(0.01))


def test_markdown_and_latex_hold_the_same_cells():
    table = result_tables([run(*FIVE, method="a_b", sigma=0.25, n=1000)])[0]
    markdown, latex = table.to_markdown(), table.to_latex()
    cells = [
        "probabilistic, alpha=0.001",
        "1,000",
        "0.25",
        "5",
        "1",
        "20.0",
        "-",
        "40.0",
        "0.2500",
        "40.0",
        "40.0",
        "40.0",
        "20.0",
    ]
    assert f"| a_b | {' | '.join(cells)} |" in markdown
    assert rf"a\_b & {' & '.join(cells)} \\" in latex
    assert latex.count("\\begin") == latex.count("\\end") == 2


def test_comparing_pairs_by_index_over_the_common_inputs():
    first = run(row(0, 1, 1, 0.5), row(1, 1, 0, 0.9), row(2, 1, 1, 0.2), name="one")
    second = run(row(1, 1, 1, 0.4), row(2, 1, 1, 0.1), row(7, 1, 1, 5.0), name="two")
    *results, paired = compare_tables(first, second)
    values = dict(paired.rows)
    assert values["inputs in both"] == "2"
    assert values["inputs only in votes (one)"] == values["inputs only in votes (two)"] == "1"
    assert values["correct only in votes (two)"] == "1"
    assert values["larger radius in votes (one)"] == values["larger radius in votes (two)"] == "1"
    assert values["mean radius difference, votes (two) minus votes (one)"] == "+0.150000"
    assert [cells[4] for cells in results[0].rows] == ["2", "2"]


def test_comparing_a_certificate_with_an_estimate_says_so():
    first = run(row(0, 1, 1, 0.5), name="one")
    second = run(row(0, 1, 1, 0.4, guarantee=Guarantee.ESTIMATE), name="two")
    assert "not certificates" in compare_tables(first, second)[-1].note


def test_radii_of_different_norms_are_not_compared():
    first, second = run(row(0, 1, 1, 0.5), name="one"), run(row(0, 1, 1, 0.01, norm=Norm.LINF), name="two")
    paired = compare_tables(first, second)[-1]
    assert not [name for name, _ in paired.rows if "radius" in name]
    assert ("both correct", "1") in paired.rows
    assert "norms differ (l2 and linf)" in paired.note
