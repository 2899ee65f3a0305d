"""Large runs: evidence is read from disk when it is asked for; everything says the same, and memory stays flat."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import rsplugins
from rsplugins.errors import RunError
from rsplugins.runs import record as records
from rsplugins.runs.merge import merge
from rsplugins.runs.record import RECORDS, Record, read_file
from rsplugins.runs.stored import StoredEvidence
from rsplugins.runs.verify import examine


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    model = rsplugins.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), input_size=(1, 8, 8))
    directory = tmp_path_factory.mktemp("stored") / "run"
    settings = {"sigma": 0.25, "n0": 20, "n": 100, "out": directory, "indices": range(30), "progress": False}
    rsplugins.certify(model, rsplugins.load_data("digits"), "gaussian", **settings)
    return directory


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture(params=[True, False], ids=["on disk", "in memory"])
def size(request, monkeypatch):
    monkeypatch.setattr(records, "_LARGE", 0 if request.param else 2**40)
    return request.param


def test_what_is_read_is_what_was_written(run, size):
    contents = read_file(run / RECORDS)
    lines = (run / RECORDS).read_text().splitlines()
    assert [record.to_json() for record in contents.records] == lines
    assert all(isinstance(record.evidence, StoredEvidence) is size for record in contents.records)
    assert [dict(record.evidence) for record in contents.records] == [json.loads(line)["evidence"] for line in lines]


def test_runs_say_the_same_wherever_their_evidence_is(run, monkeypatch):
    found = []
    for large in (0, 2**40):
        monkeypatch.setattr(records, "_LARGE", large)
        opened = rsplugins.open_run(run)
        found.append((opened.summary(), opened.certificates(), examine(run).problems))
    assert found[0] == found[1]
    assert found[0][2] == []
    assert all(type(one.evidence) is dict for one in found[0][1])


def test_an_edited_record_and_a_torn_line_are_seen(run, size):
    text = (run / RECORDS).read_text()
    (run / RECORDS).write_text(text.replace('"samples":120', '"samples":121', 1))
    assert "edited" in rsplugins.open_run(run).problems[0]
    (run / RECORDS).write_text(text + '{"index":')
    assert read_file(run / RECORDS).torn == 9
    (run / RECORDS).write_text("{}\n" + text)
    with pytest.raises(RunError, match="line 1 is not a record"):
        read_file(run / RECORDS)


def test_a_file_that_is_replaced_meanwhile_is_still_the_one_that_was_read(run, monkeypatch):
    monkeypatch.setattr(records, "_LARGE", 0)
    contents = read_file(run / RECORDS)
    before = [json.loads(line)["evidence"] for line in (run / RECORDS).read_text().splitlines()]
    (run / RECORDS).unlink()
    (run / RECORDS).write_text("something else\n" * 10_000)
    assert [dict(record.evidence) for record in contents.records] == before


def test_shards_merge_and_a_rescored_copy_is_written(run, tmp_path, size):
    lines = (run / RECORDS).read_text().splitlines(keepends=True)
    before = rsplugins.open_run(run).summary()
    for name in ("results.tsv", "summary.json", "curve.png", "report.html", "digests.json"):
        (run / name).unlink(missing_ok=True)
    (run / RECORDS).unlink()
    for part in range(2):
        (run / f"records-{part}-of-2.jsonl").write_text("".join(lines[part::2]))
    merged = merge([run], run)
    assert merged.summary() == before
    assert (run / RECORDS).read_text() == "".join(lines)
    words = ["rescore", str(run), "--alpha", "0.01", "--out", str(tmp_path / "again")]
    command = [sys.executable, "-c", "from rsplugins.cli.main import main; main()", *words]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert examine(tmp_path / "again").problems == []


def test_a_contradiction_is_found_in_stored_evidence_too(run, size, tmp_path):
    contents = read_file(run / RECORDS)
    union = {}
    records.add(union, contents.records, run)
    other = replace(contents.records[3], evidence={"selection": {"1": 20}, "estimation": {"1": 100}})
    with pytest.raises(RunError, match="contradicts"):
        records.add(union, [other], run)


MEMORY = """
import resource, sys
from rsplugins.runs.record import read_file
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
contents = read_file(Path(sys.argv[1]))
print(len(contents.records), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_what_the_records_hold(tmp_path):
    pytest.importorskip("resource")
    evidence = {"logits": [float(k) / 7 for k in range(1000)]}
    with (tmp_path / RECORDS).open("w") as file:
        for index in range(4000):
            file.write(Record(index, 0, evidence, 0, 0.0).to_json() + "\n")
    size = (tmp_path / RECORDS).stat().st_size
    assert size > 50e6
    out = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / RECORDS)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, out.stdout.split())
    assert count == 4000
    assert kilobytes * 1024 < size / 5
