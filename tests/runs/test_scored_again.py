"""rescore, verify and report: from evidence, without the model."""

from __future__ import annotations

import json
import re

import pytest
from scipy.stats import beta, norm

from rsplugins.errors import ParameterError, RspluginsWarning, RunError
from rsplugins.runs.report import to_html
from rsplugins.runs.rescore import copy_rescored, with_alpha
from rsplugins.runs.run import open_run
from rsplugins.runs.verify import verify


def expected_radius(record, alpha):
    lower = beta.ppf(alpha, record.evidence["count"], 1000 - record.evidence["count"] + 1)
    return 0.25 * norm.ppf(lower) if lower > 0.5 else 0.0


def test_rescoring_equals_certifying_at_that_confidence(make_run, tmp_path):
    old = make_run("old", alpha=0.001)
    new = open_run(old.directory, manifest=with_alpha(old.manifest, 0.05))
    fresh = make_run("fresh", alpha=0.05)
    assert [row.claim for row in new.rows] == [row.claim for row in fresh.rows]
    for row in new.rows:
        assert row.radius == pytest.approx(expected_radius(row.record, 0.05), rel=1e-6)
    copy = copy_rescored(new, tmp_path / "copy")
    assert (copy.directory / "results.tsv").read_text().splitlines()[1].split("\t")[:5] == (
        (fresh.directory / "results.tsv").read_text().splitlines()[1].split("\t")[:5]
    )
    assert verify(copy.directory)[1] == []
    assert open_run(copy.directory).manifest.rescored == {"alpha_before": 0.001}


def test_a_data_set_alpha_is_shared_among_all_inputs(make_run):
    run = make_run("a")
    shared = open_run(run.directory, manifest=with_alpha(run.manifest, 0.02, inputs=40))
    assert {row.claim.alpha for row in shared.rows} == {0.02 / 40}
    for row in shared.rows:
        assert row.radius == pytest.approx(expected_radius(row.record, 0.0005), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5])
def test_an_alpha_out_of_range_is_refused(make_run, alpha):
    with pytest.raises(ParameterError, match="alpha is"):
        with_alpha(make_run("a", indices=[0]).manifest, alpha)


def test_a_method_without_alpha_is_not_rescored(make_run):
    with pytest.raises(ParameterError, match="has no alpha"):
        with_alpha(make_run("a", "margin", indices=[0]).manifest, 0.01)


def test_an_untouched_run_verifies(make_run):
    for method in ("votes", "margin", "guess"):
        run, problems = verify(make_run(method, method).directory)
        assert problems == []
        assert len(run.rows) == 40


def edit(path, old, new):
    text = path.read_text()
    changed = re.sub(old, new, text, count=1)
    assert changed != text
    path.write_text(changed)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("results.tsv", r"(?m)^(3\t\d\t)\d", r"\g<1>2", "input 3: predict is 2"),
        ("results.tsv", r"(?m)^(5\t\d\t-?\d\t)\d\.\d+", r"\g<1>9.000000", "input 5: radius is 9.000000, recomputed"),
        ("results.tsv", r"(?m)^(6\t\d\t-?\d\t\d\.\d{5})\d", r"\g<1>x", "input 6: radius"),
        ("results.tsv", r"(?m)^7\t.*\n", "", "input 7"),
        ("results.tsv", r"\Z", "99\t1\t1\t1.0\t1\t0:00:00.0\n", "a line without a record"),
        ("results.tsv", r"idx", "id", "another header"),
        ("summary.json", r'"acr": 0\.\d', '"acr": 0.9', "summary.json: acr is"),
        ("summary.json", r'"guarantee": "probabilistic"', '"guarantee": "deterministic"', "guarantee"),
        ("summary.json", r"\A\{", "[", "not JSON"),
        ("manifest.json", r'"alpha": 0\.001', '"alpha": 0.0001', "radius is"),
        ("manifest.json", r'"stop": 40', '"stop": 41', "1 selected inputs have no record: 40"),
        ("manifest.json", r'"stop": 40', '"stop": 38', "2 records are of inputs that were not selected: 38, 39"),
        ("records.jsonl", r'"count":\d{3}\b', '"count":501', "results.tsv: input"),
        ("records.jsonl", r'"samples":1000', '"samples":1001', "records_sha256"),
        ("records.jsonl", r"\A(.*\n)", r"\1\1", "more than one record for inputs 0"),
    ],
)
def test_whatever_is_altered_is_found_and_named(make_run, file, old, new, said):
    directory = make_run("a").directory
    edit(directory / file, old, new)
    _, problems = verify(directory)
    assert any(said in problem for problem in problems), problems


def test_a_torn_record_does_not_verify(make_run):
    directory = make_run("a").directory
    with (directory / "records.jsonl").open("a") as file:
        file.write('{"index": 99')
    with pytest.warns(RspluginsWarning, match="torn"):
        _, problems = verify(directory)
    assert "records.jsonl ends in a torn line" in problems


def test_evidence_that_cannot_be_read_names_the_input(make_run):
    directory = make_run("a").directory
    edit(directory / "records.jsonl", r'"count"', '"kount"')
    with pytest.raises(RunError, match="input 0 cannot be read: KeyError"):
        verify(directory)


def test_the_report_is_one_small_page_with_no_outside_address(make_run):
    runs = [
        make_run("a", indices=range(20)),
        make_run("b", "margin", indices=range(20)),
        make_run("c", "guess", indices=range(20)),
    ]
    page = to_html(runs)
    assert len(page.encode()) < 1_000_000
    assert not re.search(r"https?://|<script|<link", page)
    for caption in ("sigma=0.25, n=1,000, alpha=0.001", "probabilistic, alpha=0.001", "deterministic", "input 13: unlucky"):
        assert caption in page
    certified, estimates = page.split("Estimates, not certificates, l2 norm")
    certified = certified.split("<tbody>")[1].split("</tbody>")[0]
    assert "votes" in certified
    assert "guess" not in certified
    assert "guess" in estimates.split("<tbody>")[1].split("</tbody>")[0]


def test_the_report_escapes_what_a_run_says(make_run):
    directory = make_run("a", indices=[0, 1]).directory
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["model"]["reference"] = "<b>bold</b>"
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert "<b>bold" not in to_html([open_run(directory)])


def test_a_run_in_which_everything_abstains_can_be_reported(make_run):
    run = make_run("a", n=5, indices=[0, 1, 2], pages=True)
    assert all(row.abstained for row in run.rows)
    assert "100.0" in (run.directory / "report.html").read_text()
