from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rsplugins
from rsplugins.certificate import Gathered
from rsplugins.certification import prepare, run_certifier
from rsplugins.certifier import Execution
from rsplugins.errors import ParameterError, PluginError, RspluginsWarning, RunError, UsageError
from rsplugins.models import load
from rsplugins.runs.execute import parse_shard
from rsplugins.runs.merge import finish, merge
from rsplugins.runs.record import Writer, read_file, read_records
from rsplugins.runs.run import open_run


def results(directory):
    return [record.result() for record in read_file(directory / "records.jsonl").records]


def test_a_run_writes_the_whole_directory(make_run):
    run = make_run("a", pages=True)
    names = {path.name for path in run.directory.iterdir()}
    derived = {"results.tsv", "summary.json", "curve.png", "report.html", "digests.json"}
    assert names == {"manifest.json", "records.jsonl", *derived}
    assert len(run.rows) == 40
    assert run.missing == ()
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert manifest["parameters"] == {"sigma": 0.25, "n": 1000, "alpha": 0.001, "delay": 0.0, "stop_at": []}
    assert len(manifest["model"]["sha256"]) == len(manifest["data"]["sha256"]) == 64
    assert manifest["plugin"] == {"distribution": "tiny", "version": "1.2"}
    assert manifest["execution"]["device"] == "cpu"
    assert json.loads((run.directory / "summary.json").read_text())["inputs"] == 40
    assert (run.directory / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_certified_radii_stay_below_the_exact_ones_and_reach_most_of_them(make_run):
    exact = {row.index: row for row in make_run("exact", "margin").rows if not row.failed}
    votes = [row for row in make_run("votes", n=20_000).rows if row.index in exact and row.prediction is not None]
    assert len(votes) > 20
    for row in votes:
        assert row.radius <= exact[row.index].radius
    assert sum(row.radius for row in votes) > 0.8 * sum(min(exact[row.index].radius, 0.25 * 3.4) for row in votes)


def test_resuming_certifies_only_what_is_missing_and_ends_with_the_same_records(make_run):
    whole = results(make_run("whole").directory)
    directory = make_run("part").directory
    lines = (directory / "records.jsonl").read_bytes().splitlines(keepends=True)
    (directory / "records.jsonl").write_bytes(b"".join(lines[:17]) + lines[17][:20])
    with pytest.warns(RspluginsWarning, match="repaired"):
        make_run("part")
    assert results(directory) == whole
    after = (directory / "records.jsonl").read_bytes().splitlines(keepends=True)
    assert after[:17] == lines[:17]


def test_a_finished_run_is_left_as_it_is(make_run):
    directory = make_run("a").directory
    before = (directory / "records.jsonl").read_bytes()
    make_run("a")
    assert (directory / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sigma": 0.5}, "parameters.sigma: 0.25 -> 0.5"),
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"indices": [1, 2]}, "selection.start: 0 -> 1"),
        ({"options": {"scale": 2.0}}, "model.sha256"),
        ({"data": "tiny:50"}, "data.sha256"),
    ],
)
def test_resuming_with_other_parameters_is_refused_with_the_difference(make_run, change, line):
    directory = make_run("a").directory
    before = (directory / "records.jsonl").read_bytes()
    with pytest.raises(UsageError, match=re.escape(line)):
        make_run("a", **change)
    assert (directory / "records.jsonl").read_bytes() == before


def test_an_input_that_fails_is_a_failure_and_no_abstention(make_run):
    run = make_run("a", "margin", pages=True)
    assert [(row.index, row.failed, row.abstained, row.correct) for row in run.rows if row.index == 13] == [
        (13, True, False, False)
    ]
    assert "13\t" in (run.directory / "results.tsv").read_text()
    assert "unlucky" in (run.directory / "report.html").read_text()


def test_what_was_certified_before_a_failure_is_kept(make_run, tmp_path):
    with pytest.raises(PluginError, match=r"'breaks' \(tiny 1.2\)"):
        make_run("a", "breaks")
    assert list(read_records(tmp_path / "a")) == [0, 1]


def test_an_input_that_cannot_be_read_is_not_blamed_on_the_certifier(make_run, tmp_path, monkeypatch):
    from rsplugins.data import Dataset

    read = Dataset.__getitem__

    def damaged(self, index):
        if index == 5:
            raise OSError("broken image")
        return read(self, index)

    make_run("whole", indices=range(5))
    monkeypatch.setattr(Dataset, "__getitem__", damaged)
    monkeypatch.setattr(Dataset, "fingerprint", lambda self: "aa")
    with pytest.raises(RunError, match="Input 5 of tiny cannot be read: OSError: broken image"):
        make_run("a", indices=range(8))
    assert list(read_records(tmp_path / "a")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_merged_shards_equal_an_unsharded_run(make_run, count):
    whole = results(make_run("whole").directory)
    for number in reversed(range(count)):
        run = make_run("shards", shard=(number, count))
        if number:
            assert len(run.missing) == len([k for k in range(40) if k % count < number])
            assert not (run.directory / "records.jsonl").exists()
    assert results(run.directory) == whole
    assert [path.name for path in run.directory.glob("records*")] == ["records.jsonl"]
    assert (run.directory / "results.tsv").exists()


def test_shards_in_directories_of_their_own_merge_too(make_run, tmp_path):
    whole = results(make_run("whole", indices=[3, 1, 8, 9, 20]).directory)
    for number in range(2):
        make_run(f"machine{number}", indices=[3, 1, 8, 9, 20], shard=(number, 2))
    run = merge([tmp_path / "machine1", tmp_path / "machine0"], tmp_path / "merged")
    assert results(run.directory) == whole
    assert run.missing == ()


def test_an_incomplete_merge_says_what_is_missing_and_can_be_resumed_by_anybody(make_run, tmp_path):
    make_run("shards", shard=(0, 3))
    run = merge([tmp_path / "shards"], tmp_path / "shards")
    assert run.missing == tuple(index for index in range(40) if index % 3)
    assert results(make_run("shards").directory) == results(make_run("whole").directory)


def test_parts_of_different_runs_do_not_merge(make_run, tmp_path):
    make_run("a", shard=(0, 2))
    make_run("b", shard=(1, 2), sigma=0.5)
    with pytest.raises(UsageError, match=r"parameters\.sigma: 0\.25 -> 0\.5"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


def test_a_shard_that_is_being_written_is_not_merged_away(make_run, tmp_path):
    make_run("a", shard=(0, 2))
    with Writer(tmp_path / "a" / "records-1-of-2.jsonl"), pytest.raises(RunError, match="another process"):
        merge([tmp_path / "a"], tmp_path / "a")


@pytest.mark.parametrize("text", ["", "1", "4/4", "-1/2", "a/b", "1/0", "1/2/3"])
def test_a_malformed_shard_is_refused(text):
    with pytest.raises(ParameterError, match="allowed: i/n"):
        parse_shard(text)


def test_finishing_twice_changes_nothing(make_run):
    run = make_run("a")
    texts = {path.name: path.read_bytes() for path in run.directory.iterdir() if path.suffix in (".tsv", ".json", ".jsonl")}
    finish(run.directory)
    assert texts == {name: (run.directory / name).read_bytes() for name in texts}


def test_a_moved_directory_still_opens(make_run, tmp_path):
    run = make_run("a")
    shutil.move(run.directory, tmp_path / "elsewhere")
    moved = open_run(tmp_path / "elsewhere")
    assert [row.radius for row in moved.rows] == [row.radius for row in run.rows]


def test_a_certifier_that_answers_out_of_order_is_named(tiny):
    entry = tiny.find("certifier", "margin")
    certifier = prepare(entry, load("tiny:x"), {}, Execution())
    certifier.gather = lambda inputs: (Gathered(index + 1, {}, 1, 0.0) for index, _ in inputs)
    image = load("tiny:x")(__import__("torch").zeros(1, 3, 2, 2)).new_zeros(3, 2, 2)
    with pytest.raises(PluginError, match="out of order"):
        list(run_certifier(entry, certifier, [(0, image)]))


def test_a_fresh_run_reads_its_records_once(tmp_path):
    """Opened for reading, by the auditing hook of Python: a run of a million inputs is not parsed again and again."""
    program = (
        "import sys, os\n"
        "opened = []\n"
        "def hook(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith('records.jsonl'):\n"
        "        opened.append((arguments[1], arguments[2]))\n"
        "sys.addaudithook(hook)\n"
        "from rsplugins.cli import main\n"
        "sys.argv = ['rsplugins', 'certify', '--out', 'x', '--method', 'gaussian', '--set', 'n=100', '--stop', '5',\n"
        "            '--model', 'zoo:digits-cnn.digits-gaussian025-v2', '--data', 'digits']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "reading = [flags for mode, flags in opened if not flags & (os.O_WRONLY | os.O_APPEND)]\n"
        "print('read', len(reading), 'written', len(opened) - len(reading))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(rsplugins.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "read 1 written 1"
