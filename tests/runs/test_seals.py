"""Every edit of every file of a run directory is seen, and no door prints an edited run as certified."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from rsplugins.certificate import Guarantee
from rsplugins.errors import ParameterError, RspluginsError, RunError
from rsplugins.rounding import exactly, round_down, round_up
from rsplugins.runs.imports import claimed_parameters, import_log, read_log
from rsplugins.runs.manifest import Manifest, Selection
from rsplugins.runs.merge import finish
from rsplugins.runs.rescore import copy_rescored, with_alpha
from rsplugins.runs.run import open_run
from rsplugins.runs.summary import summarise
from rsplugins.runs.tables import EDITED, group_runs, guarantee_label, result_tables
from rsplugins.runs.tsv import to_tsv
from rsplugins.runs.verify import examine, verify


def leaves(value, path=()):
    """Paths to every node below the root of a JSON tree."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from leaves(child, (*path, key))


def flipped(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return value + "x" if isinstance(value, str) else "x"


def changed(tree, path, *, delete):
    copy = json.loads(json.dumps(tree))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if delete:
        del place[path[-1]]
    else:
        place[path[-1]] = flipped(place[path[-1]])
    return copy


def seen(directory):
    try:
        return bool(verify(directory)[1])
    except RspluginsError:
        return True


def edits(tree):
    for path in leaves(tree):
        for delete in (False, True):
            yield f"{'delete' if delete else 'flip'} {path}", changed(tree, path, delete=delete)


@pytest.mark.parametrize("file", ["manifest.json", "summary.json", "digests.json"])
def test_every_edit_of_every_field_is_seen(make_run, file):
    directory = make_run("a", indices=range(6), pages=True).directory
    assert verify(directory)[1] == []
    text = (directory / file).read_text()
    count = 0
    for name, tree in edits(json.loads(text)):
        (directory / file).write_text(json.dumps(tree, indent=2) + "\n")
        assert seen(directory), name
        count += 1
    assert count > 10
    (directory / file).write_text(text)
    assert verify(directory)[1] == []


def test_every_edit_of_a_record_is_seen_also_without_the_digests(make_run):
    directory = make_run("a", indices=range(6)).directory
    lines = (directory / "records.jsonl").read_text().splitlines()
    (directory / "digests.json").unlink()
    for name, tree in edits(json.loads(lines[2])):
        (directory / "records.jsonl").write_text("\n".join([*lines[:2], json.dumps(tree), *lines[3:]]) + "\n")
        try:
            found = bool(examine(directory).edited)
        except RspluginsError:
            found = True
        assert found, name


@pytest.mark.parametrize(
    "arranged",
    [
        lambda lines: lines[:-1],
        lambda lines: [*lines, lines[0]],
        lambda lines: lines[::-1],
        lambda lines: [lines[1], lines[0], *lines[2:]],
    ],
)
def test_records_deleted_doubled_or_reordered_are_seen(make_run, arranged):
    directory = make_run("a", indices=range(6)).directory
    lines = (directory / "records.jsonl").read_text().splitlines()
    (directory / "records.jsonl").write_text("\n".join(arranged(lines)) + "\n")
    assert seen(directory)
    (directory / "digests.json").unlink()
    assert [problem for problem in verify(directory)[1] if "digests" not in problem]


def test_records_of_another_run_are_seen_and_not_finished(make_run):
    directory = make_run("a", indices=range(6)).directory
    other = make_run("b", seed=1, indices=range(6)).directory
    shutil.copy(other / "records.jsonl", directory / "records.jsonl")
    assert any("not of the run" in problem for problem in verify(directory)[1])
    with pytest.raises(RunError, match="was edited"):
        finish(directory, pages=False)


@pytest.mark.filterwarnings("ignore::rsplugins.errors.RspluginsWarning")  # torn lines are said as well
@pytest.mark.parametrize("file", ["results.tsv", "curve.png", "report.html", "records.jsonl", "manifest.json"])
def test_one_byte_or_the_loss_of_a_file_is_seen(make_run, file):
    directory = make_run("a", indices=range(4), pages=True).directory
    data = (directory / file).read_bytes()
    (directory / file).write_bytes(data + b" ")
    assert seen(directory)
    (directory / file).write_bytes(data[:-1])
    assert seen(directory)
    (directory / file).unlink()
    assert seen(directory)


def relabelled(run, method):
    path = run.directory / "manifest.json"
    path.write_text(path.read_text().replace(f'"method": "{run.manifest.method}"', f'"method": "{method}"'))
    return open_run(run.directory)


def test_an_estimate_relabelled_never_prints_as_certified(make_run, tmp_path):
    run = relabelled(make_run("a", "guess", indices=range(5)), "margin")
    assert {row.claim.guarantee for row in run.rows} == {Guarantee.DETERMINISTIC}, "the relabelling is worth seeing"
    assert not summarise(run)["certifies"]
    (title,) = group_runs([run])
    assert title.startswith(EDITED)
    assert guarantee_label(run).startswith("NOT VERIFIED")
    assert "ACR" not in result_tables([run])[0].header
    with pytest.raises(RunError, match="does not verify"):
        copy_rescored(run, tmp_path / "copy")


def test_resuming_an_edited_run_does_not_wash_it(make_run):
    directory = make_run("a", indices=range(5)).directory
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"created": "2', '"created": "1'))
    with pytest.raises(RunError, match="was edited"):
        make_run("a", indices=range(5))


def test_a_run_of_an_earlier_release_still_verifies_and_says_what_it_lacks(make_run):
    run = make_run("a", indices=range(5))
    values = json.loads((run.directory / "manifest.json").read_text())
    values["format"] = 1
    del values["seal"]
    (run.directory / "manifest.json").write_text(json.dumps(values))
    lines = [replace(row.record, run="", seal="", by="").to_json() + "\n" for row in run.rows]
    (run.directory / "records.jsonl").write_text("".join(lines))
    (run.directory / "digests.json").unlink()
    found = examine(run.directory)
    assert found.problems == []
    assert "cannot be noticed" in found.notes[0]


def test_the_table_of_an_estimate_says_so_and_stays_one_on_import(make_run, tmp_path):
    run = make_run("a", "guess", indices=range(5))
    path = run.directory / "results.tsv"
    lines = path.read_text().splitlines()
    assert "radius" not in lines[0].split("\t")
    with pytest.raises(ValueError, match="could not convert"):
        float(lines[1].split("\t")[3])
    certified = claimed_parameters(guarantee="probabilistic", norm="l2", alpha=0.001, sigma=0.25, n=1000)
    for text in ("\n".join(lines), "\n".join(lines[1:])):
        path.write_text(text)
        assert read_log(path).sign == "estimate"
        with pytest.raises(ParameterError, match="no certificates"):
            import_log(path, tmp_path / "x", method="x", claimed=certified)
    claimed = claimed_parameters(guarantee="estimate", norm="l2", alpha=None, sigma=None, n=None)
    import_log(path, tmp_path / "y", method="y", claimed=claimed)
    imported = finish(tmp_path / "y", pages=False)
    assert not summarise(imported)["certifies"]
    assert [row.radius for row in imported.rows] == [row.radius for row in run.rows]
    assert not examine(tmp_path / "y").verifiable


@pytest.mark.parametrize(("radius", "good"), [("0.978", False), ("0.954", False), ("0.953", True), ("0.9528", True)])
def test_a_radius_past_what_the_settings_can_give_is_refused(tmp_path, radius, good):
    cap = 0.25 * norm.ppf(0.001 ** (1 / 100_000))
    log = tmp_path / "sigma_0.25"
    log.write_text(f"0\t1\t1\t{radius}\t1\t1.0\n")
    claimed = claimed_parameters(guarantee="probabilistic", norm="l2", alpha=0.001, sigma=0.25, n=100_000)
    if good:
        import_log(log, tmp_path / "run", method="x", claimed=claimed)
        assert open_run(tmp_path / "run").rows[0].radius <= cap + 1e-9
    else:
        with pytest.raises(RunError, match=r"0\.95286"):
            import_log(log, tmp_path / "run", method="x", claimed=claimed)


@given(st.floats(0, 1e6), st.integers(0, 9))
def test_printed_is_never_above_the_claim_and_reads_back(value, digits):
    assert float(round_down(value, digits)) <= value <= float(round_up(value, digits))
    assert float(exactly(value)) == value
    assert len(exactly(value).partition(".")[2]) >= 6


@given(st.integers(0, 10**8))
def test_a_claim_of_six_decimals_prints_as_itself(millionths):
    value = millionths / 10**6
    assert float(round_down(value, 6)) == value
    assert exactly(value) == f"{value:.6f}"


def test_a_field_script_counts_what_was_claimed(make_run):
    run = make_run("a", "margin", indices=[0, 1])
    for claim in (0.3, 8 / 255):
        rows = [replace(row, claim=replace(row.claim, radius=claim)) for row in run.rows]
        radii = [float(line.split("\t")[3]) for line in to_tsv(rows).splitlines()[1:]]
        assert all(radius >= claim for radius in radii)
    assert Manifest(method="x", parameters={}, selection=Selection.of([0])).format == 2
    assert with_alpha(make_run("b", indices=[0]).manifest, 0.01).format == 2
