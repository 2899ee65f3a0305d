from __future__ import annotations

import json

import pytest

from rsplugins.errors import RspluginsWarning, RunError
from rsplugins.machine.files import write_whole
from rsplugins.runs.record import Record, Writer, read_file, read_records, shard_name

ONE = Record(4, 1, {"votes": {"1": 99, "2": 1}}, 100, 0.25)
TWO = Record(5, 0, {}, 100, 0.5, error="NaN")


def write(path, *records):
    with Writer(path) as writer:
        for record in records:
            writer.append(record)


def test_what_is_appended_is_read_back_as_plain_json_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    write(path, ONE)
    write(path, TWO)
    assert read_file(path).records == [ONE, TWO]
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [4, 5]


def test_each_record_is_on_disk_before_the_next_begins(tmp_path):
    path = tmp_path / "records.jsonl"
    with Writer(path) as writer:
        writer.append(ONE)
        assert read_file(path).records == [ONE]


@pytest.mark.parametrize("cut", range(1, len(TWO.to_json()) + 1, 7))
def test_a_torn_last_line_is_cut_and_said_wherever_it_was_torn(tmp_path, cut):
    path = tmp_path / "records.jsonl"
    write(path, ONE, TWO)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.warns(RspluginsWarning, match="ends in a torn line"):
        assert read_records(tmp_path) == {4: ONE}
    with pytest.warns(RspluginsWarning, match="repaired"):
        write(path, TWO)
    assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_refused_by_number(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(ONE.to_json() + "\n{broken\n" + TWO.to_json() + "\n")
    with pytest.raises(RunError, match="line 2"):
        read_file(path)


@pytest.mark.parametrize(
    "line", ["[1]", '"text"', "{}", '{"index": 1}', '{"index":"1","label":0,"evidence":{},"samples":0,"seconds":0}']
)
def test_json_that_is_no_record_is_refused(tmp_path, line):
    (tmp_path / "records.jsonl").write_text(line + "\n")
    with pytest.raises(RunError, match="line 1"):
        read_records(tmp_path)


def test_shards_are_read_as_one_and_may_repeat_but_not_contradict(tmp_path):
    write(tmp_path / shard_name((0, 2)), ONE)
    write(tmp_path / shard_name((1, 2)), TWO)
    assert read_records(tmp_path) == {4: ONE, 5: TWO}
    write(tmp_path / shard_name(None), Record(**{**ONE.__dict__, "seconds": 9.0}))
    assert read_records(tmp_path).keys() == {4, 5}
    write(tmp_path / shard_name((2, 3)), Record(**{**ONE.__dict__, "label": 7}))
    with pytest.raises(RunError, match="contradicts another record of input 4"):
        read_records(tmp_path)


def test_a_second_writer_of_the_same_file_is_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    with Writer(path), pytest.raises(RunError, match="another process"), Writer(path):
        pass
    write(path, ONE)


def test_a_number_that_is_not_json_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        Record(0, 0, {"score": float("nan")}, 1, 0.1).to_json()


def test_a_whole_file_write_keeps_or_replaces(tmp_path):
    path = tmp_path / "file"
    assert write_whole(path, "first", replace=False)
    assert not write_whole(path, "second", replace=False)
    assert path.read_text() == "first"
    assert write_whole(path, "third")
    assert path.read_text() == "third"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
